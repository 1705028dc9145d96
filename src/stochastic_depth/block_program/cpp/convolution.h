// 3x3 convolutions with padding 1 from In to Out channels, and their gradients. With stride 2 the sides
// of the result are half the sides of the input.
// Images are [n][side][side][channels]; `fits` says which sides are possible; channels are multiples of
// 16, or FEW; sums are in float32.
//
// Each image is copied into a frame of zeros that fits into the inner caches. Normalisation, addition and
// ReLU are computed during this copy, so they need no passes over the image.

#pragma once

#include "by_tiles.h"
#include "strided.h"

// The weight, [Out][9][inputs], as [Out/LANES][9][In/PER_LANE][LANES outputs][PER_LANE inputs].
template <int In, int Out>
Scratch<factor> packed(const stored* weight, int inputs) {
  Scratch<factor> result(9 * In * Out);
  factor* to = result.data();
  for (int out = 0; out < Out; out += LANES)
    for (int tap = 0; tap < 9; tap++)
      for (int in = 0; in < In; in += PER_LANE)
        for (int lane = 0; lane < LANES; lane++)
          for (int i = in; i < in + PER_LANE; i++)
            *to++ = i < inputs ? one_factor(weight[((out + lane) * 9 + tap) * inputs + i]) : 0;
  return result;
}

// The weight for the gradient of the input, which is a convolution too: the taps are in reverse order,
// and inputs and outputs are exchanged.
template <int In, int Out>
Scratch<factor> packed_transposed(const stored* weight) {
  Scratch<factor> result(9 * In * Out);
  for (int in = 0; in < In; in += LANES)
    for (int tap = 0; tap < 9; tap++)
      for (int out = 0; out < Out; out += PER_LANE) {
        factor* to = &result[((in / LANES * 9 + tap) * Out + out) * LANES];
        const stored* from = weight + (out * 9 + 8 - tap) * In + in;
        if constexpr (PER_LANE == 1)
          put(to, load_factors(from));
        else
          put(to, paired<LANES>(load_factors(from), load_factors(from + 9 * In)));
      }
  return result;
}

// The classes that convolve an image and compute both gradients; their argument is the side of the
// result.
template <int In, int Out, int STRIDE>
struct Algorithms {
  using Forward = ConvolutionByVectors<In, Out>;
  using WeightGradient = WeightGradientByVectors<In, Out>;
  using InputGradient = Forward;
};
template <int In, int Out>
struct Algorithms<In, Out, 2> {
  using Forward = ConvolutionByVectors<In, Out, 2>;
  using WeightGradient = StridedWeightGradient<In, Out>;
  using InputGradient = StridedInputGradient<In, Out>;
};
#ifdef TILES
template <int C>
struct Algorithms<C, C, 1> {
  using Forward = ConvolutionByTiles<C, C>;
  using WeightGradient = WeightGradientByTiles<C, C>;
  using InputGradient = Forward;
};
#endif

// Whether the algorithms can take images of this side.
template <int In, int Out, int STRIDE>
bool fits(int side) {
#ifdef TILES
  return STRIDE == 1 && side % (Out == 16 ? 16 : 8) == 0;
#else
  return side % (STRIDE * narrow(Out, STRIDE).pixels) == 0;
#endif
}

// The elements of a frame. Tiles read up to two pixels beyond its end, for results that are not used.
template <int C>
size_t frame(int side) {
  return ((size_t)(side + 2) * (side + 2) + 2) * C;
}

// ---------------------------------------------------------------------------- a mini-batch

struct Shape {
  int n, side, threads;

  size_t pixels() const { return (size_t)side * side; }
  long rows() const { return n * (long)pixels(); }
  // The first pixel of the image after image i, which is fetched while image i is computed.
  size_t after(int i) const { return (i + 1 < n ? i + 1 : i) * pixels(); }
  Shape strided(int stride) const { return {n, side / stride, threads}; }
};

// Convolves all images of `source`. `shape` describes `source`; `sums` receives the two sums over the
// results that `normalise` reads.
template <int In, int Out, int STRIDE, class Source>
void convolve(const Source& source, Scratch<factor> taps, stored* out, double* sums,
              const Shape& shape) {
  const int side = shape.side, width = side + 2;
  const Shape result = shape.strided(STRIDE);
  PartSums part_sums(Out, shape.threads);
  in_parts(shape.n, shape.threads, [&](int part, int begin, int end) {
    typename Algorithms<In, Out, STRIDE>::Forward convolve_image(result.side);
    Scratch<factor> padded(frame<In>(side));
    for (int i = begin; i < end; i++) {
      const size_t first = i * shape.pixels(), next = shape.after(i);
      for (int y = 0; y < side; y++)
        pad_row<In>(source, first + y * side, &padded[(y + 1) * width * In], side);
      Moments<Out> moments;
      convolve_image(padded.data(), taps.data(), nullptr, out + i * result.pixels() * Out, moments,
                     [&](size_t at, size_t count) {
                       constexpr size_t INPUT_PIXELS = STRIDE * STRIDE;  // for each of the result
                       source.fetch(next + INPUT_PIXELS * at, INPUT_PIXELS * count);
                     });
      moments.end(result.pixels(), part_sums.first(part), part_sums.second(part));
    }
  });
  part_sums.add_up(sums);
}

// The gradient of the weight, [Out][9][inputs], from `gradient`, that of the result, which `shape`
// describes; fused with other work on the same images. `convolve_backward` computes the gradient of the
// input there, while an image of `gradient` is in the caches.
// The work is visit(i, padded), which is called with the gradient of each image i in a frame of zeros. Each
// part of the images has its own, with memory of its own: make_visitor(part) returns it.
template <int In, int Out, int STRIDE, class Input, class Result, class MakeVisitor>
void fused_weight_gradient(const Input& input, const Result& gradient, float* grad_weight, int inputs,
                           const Shape& shape, const MakeVisitor& make_visitor) {
  const int side = shape.side, width = side + 2;
  std::vector<Scratch<float>> part_gradients(shape.threads);
  in_parts(shape.n, shape.threads, [&](int part, int begin, int end) {
    typename Algorithms<In, Out, STRIDE>::WeightGradient accumulator(side);
    auto visit = make_visitor(part);
    const int group = accumulator.images_at_a_time(side), framed = width * width * Out;
    Scratch<factor> padded((group - 1) * framed + frame<Out>(side));
    Scratch<factor> in_pairs(PER_LANE == 1 ? 0 : group * framed + PIXELS_PER_STEP * Out);
    factor* pairs = PER_LANE == 1 ? &padded[Out] : in_pairs.data();
    Scratch<float>& mine = part_gradients[part] = Scratch<float>(9 * In * Out);
    for (int i = begin; i < end; i += group) {
      const int images = std::min(group, end - i);
      for (int y = 0; y < images * side; y++) {
        const int at = (y + y / side * 2 + 1) * width * Out;
        pad_and_pair_row<Out>(gradient, i * shape.pixels() + y * side, &padded[at], pairs + at, side);
      }
      accumulator.add(input, i, images, pairs, mine.data());
      for (int j = 0; j < images; j++) visit(i + j, padded.data() + j * framed);
    }
  });
  in_parts(Out, shape.threads, [&](int, int begin, int end) {
    for (int out = begin; out < end; out++)
      for (int tap = 0; tap < 9; tap++)
        for (int in = 0; in < inputs; in++) {
          float& sum = grad_weight[(out * 9 + tap) * inputs + in] = 0;
          for (Scratch<float>& part : part_gradients) sum += part[(tap * In + in) * Out + out];
        }
  });
}

// Both gradients of a convolution of `input`, which `shape` describes. `added` is added to grad_input,
// unless it is null. make_sums(pixel) returns a ReLUGradient or NoSums for the image whose first pixel
// this is.
template <int In, int Out, int STRIDE, class Input, class Result, class MakeSums>
void convolve_backward(const Input& input, const Result& gradient, const stored* weight,
                       float* grad_weight, const stored* added, stored* grad_input,
                       const MakeSums& make_sums, double* sums, const Shape& shape) {
  const Shape result = shape.strided(STRIDE);
  Scratch<factor> taps = packed_transposed<In, Out>(weight);
  PartSums part_sums(In, shape.threads);
  const auto make_input_gradient = [&](int part) {
    typename Algorithms<In, Out, STRIDE>::InputGradient convolve_image(result.side);
    return [&, part, convolve_image](int i, const factor* padded) mutable {
      const size_t first = i * shape.pixels(), next = shape.after(i);
      auto image_sums = make_sums(first);
      convolve_image(padded, taps.data(), added ? added + first * In : nullptr,
                     grad_input + first * In, image_sums, [&](size_t at, size_t count) {
                       input.fetch(next + at, count);
                       gradient.fetch(result.after(i) + at / (STRIDE * STRIDE), count / (STRIDE * STRIDE));
                       image_sums.fetch(next - first + at, count);
                       if (added) prefetch(added + (next + at) * In, count * In);
                     });
      image_sums.end(shape.pixels(), part_sums.first(part), part_sums.second(part));
    };
  };
  fused_weight_gradient<In, Out, STRIDE>(input, gradient, grad_weight, In, result, make_input_gradient);
  part_sums.add_up(sums);
}
