// Convolutions of 3x3 with padding 1 from In to Out channels, and their gradients. With stride 2 the
// sides of the result are half of those of the input.
// Images, of which `fits` says how large they may be, are [n, side, side, channels]; channels are
// multiples of 16, or FEW; sums are in float32.
//
// Each image is copied into a frame of zeros that the inner caches hold. Normalisation, addition and
// ReLU are computed while it is copied, so that no pass over the image is needed for them.

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

// What computes an image, and both gradients; each is made with the side of the result.
template <int In, int Out, int STRIDE>
struct Forms {
  using Forward = ConvolutionByVectors<In, Out>;
  using OfWeight = WeightGradientByVectors<In, Out>;
  using OfInput = Forward;
};
template <int In, int Out>
struct Forms<In, Out, 2> {
  using Forward = ConvolutionByVectors<In, Out, 2>;
  using OfWeight = StridedWeightGradient<In, Out>;
  using OfInput = StridedInputGradient<In, Out>;
};
#ifdef TILES
template <int C>
struct Forms<C, C, 1> {
  using Forward = ConvolutionByTiles<C, C>;
  using OfWeight = WeightGradientByTiles<C, C>;
  using OfInput = Forward;
};
#endif

// Whether there is a form for images of this side.
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

// Convolves all images of `source`, of which `shape` is; sums: of the results, as `normalise` wants them.
template <int In, int Out, int STRIDE, class Source>
void convolve(const Source& source, Scratch<factor> taps, stored* out, double* sums,
              const Shape& shape) {
  const int side = shape.side, width = side + 2;
  const Shape result = shape.strided(STRIDE);
  Totals totals(Out, shape.threads);
  in_parts(shape.n, shape.threads, [&](int part, int begin, int end) {
    typename Forms<In, Out, STRIDE>::Forward convolve_image(result.side);
    Scratch<factor> padded(frame<In>(side));
    for (int i = begin; i < end; i++) {
      const size_t first = i * shape.pixels(), next = shape.after(i);
      for (int y = 0; y < side; y++)
        pad_row<In>(source, first + y * side, &padded[(y + 1) * width * In], side);
      Moments<Out> of_image;
      convolve_image(padded.data(), taps.data(), nullptr, out + i * result.pixels() * Out, of_image,
                     [&](size_t at, size_t count) {
                       constexpr size_t OF_INPUT = STRIDE * STRIDE;
                       source.fetch(next + OF_INPUT * at, OF_INPUT * count);
                     });
      of_image.end(result.pixels(), totals.first(part), totals.second(part));
    }
  });
  totals.over_parts(sums);
}

// The gradient of the weight, [Out][9][inputs], from the gradient of the result, of which `shape` is.
// For each part of the images `also(part)` returns a function, which is called with every image i of the
// part, and with the gradient of the result of this image in a frame of zeros.
template <int In, int Out, int STRIDE, class Input, class Result, class Also>
void weigh(const Input& input, const Result& gradient, float* of_weight, int inputs,
           const Shape& shape, const Also& also) {
  const int side = shape.side, width = side + 2;
  std::vector<Scratch<float>> of_weights(shape.threads);
  in_parts(shape.n, shape.threads, [&](int part, int begin, int end) {
    typename Forms<In, Out, STRIDE>::OfWeight weight_gradient(side);
    auto also_with = also(part);
    const int together = weight_gradient.together(side), framed = width * width * Out;
    Scratch<factor> padded((together - 1) * framed + frame<Out>(side));
    Scratch<factor> apart(PER_LANE == 1 ? 0 : together * framed + PIXELS_PER_STEP * Out);
    factor* pairs = PER_LANE == 1 ? &padded[Out] : apart.data();
    Scratch<float>& mine = of_weights[part] = Scratch<float>(9 * In * Out);
    for (int i = begin; i < end; i += together) {
      const int images = std::min(together, end - i);
      for (int y = 0; y < images * side; y++) {
        const int at = (y + y / side * 2 + 1) * width * Out;
        pad_and_pair_row<Out>(gradient, i * shape.pixels() + y * side, &padded[at], pairs + at, side);
      }
      weight_gradient.add(input, i, images, pairs, mine.data());
      for (int j = 0; j < images; j++) also_with(i + j, padded.data() + j * framed);
    }
  });
  in_parts(Out, shape.threads, [&](int, int begin, int end) {
    for (int out = begin; out < end; out++)
      for (int tap = 0; tap < 9; tap++)
        for (int in = 0; in < inputs; in++) {
          float& total = of_weight[(out * 9 + tap) * inputs + in] = 0;
          for (Scratch<float>& of_part : of_weights) total += of_part[(tap * In + in) * Out + out];
        }
  });
}

// Both gradients of a convolution of `input`, of which `shape` is. `added` is added to of_input, if it is
// not null. `sums_of(pixel)` returns what sums the gradient of the image that begins at this pixel.
template <int In, int Out, int STRIDE, class Input, class Result, class SumsOf>
void convolve_backward(const Input& input, const Result& gradient, const stored* weight,
                       float* of_weight, const stored* added, stored* of_input,
                       const SumsOf& sums_of, double* sums, const Shape& shape) {
  const Shape result = shape.strided(STRIDE);
  Scratch<factor> taps = packed_transposed<In, Out>(weight);
  Totals totals(In, shape.threads);
  const auto of_parts_input = [&](int part) {
    typename Forms<In, Out, STRIDE>::OfInput convolve_image(result.side);
    return [&, part, convolve_image](int i, const factor* padded) mutable {
      const size_t first = i * shape.pixels(), next = shape.after(i);
      auto of_image = sums_of(first);
      convolve_image(padded, taps.data(), added ? added + first * In : nullptr,
                     of_input + first * In, of_image, [&](size_t at, size_t count) {
                       input.fetch(next + at, count);
                       gradient.fetch(result.after(i) + at / (STRIDE * STRIDE), count / (STRIDE * STRIDE));
                       of_image.fetch(next - first + at, count);
                       if (added) prefetch(added + (next + at) * In, count * In);
                     });
      of_image.end(shape.pixels(), totals.first(part), totals.second(part));
    };
  };
  weigh<In, Out, STRIDE>(input, gradient, of_weight, In, result, of_parts_input);
  totals.over_parts(sums);
}
