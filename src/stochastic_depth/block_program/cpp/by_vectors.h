// The convolution of one image, and the gradient of its weight, by vectors of channels.

#pragma once

#include "sources.h"

// How many results are summed at a time in registers (pixels times vectors of channels), and how many
// taps of a row share one broadcast of a pixel.
struct Group {
  int pixels, vectors, taps;
};
constexpr Group wide(int outputs, int stride) {
  const int taps = stride == 1 ? 3 : 1;
  if (LANES == 16) return outputs == 16 ? Group{16, 1, taps} : Group{8, 2, taps};
  if (LANES == 8) return {8, 1, taps};
  return {4, 4, 1};
}
// For sides that are not multiples of wide(...).pixels.
constexpr Group narrow(int outputs, int stride) {
  return {128 / outputs, outputs / 16, LANES == 16 && stride == 1 ? 3 : 1};
}

// The convolution of an image, and the sums over its result. The side is that of the result.
template <int In, int Out, int STRIDE = 1>
class ConvolutionByVectors {
 public:
  explicit ConvolutionByVectors(int side) : side_(side) {}

  // padded: the image in a frame of zeros, STRIDE * side + 2 pixels wide; taps: as `packed` returns
  // them; added: null, or what is added to the result; out: [side][side][Out]. `ahead(pixel, count)` is
  // called for every part of the result, to prefetch the next image.
  template <class Sums, class Ahead>
  void operator()(const factor* padded, const factor* taps, const stored* added, stored* out,
                  Sums& sums, const Ahead& ahead) const {
    constexpr Group WIDE = wide(Out, STRIDE), NARROW = narrow(Out, STRIDE);
    if (side_ % WIDE.pixels == 0)
      by<WIDE.pixels, WIDE.vectors, WIDE.taps>(padded, taps, added, out, sums, ahead);
    else
      by<NARROW.pixels, NARROW.vectors, NARROW.taps>(padded, taps, added, out, sums, ahead);
  }

 private:
  template <int T, int V, int R, class Sums, class Ahead>
  void by(const factor* padded, const factor* taps, const stored* added, stored* out, Sums& sums,
          const Ahead& ahead) const {
    const int side = side_, width = STRIDE * side + 2;
    for (int block = 0; block < Out / LANES; block += V)
      for (int y = 0; y < side; y++)
        for (int x = 0; x < side; x += T) {
          const size_t pixel = (size_t)y * side + x;
          if (block == 0) ahead(pixel, T);
          Floats sum[V][T] = {};
          const int above = y == 0, below = STRIDE == 1 && y == side - 1;  // rows of zeros
          for (int down = above; down < 3 - below; down++)
            for (int tap = 0; tap < 3; tap += R) {
              const factor* in = padded + ((STRIDE * y + down) * width + STRIDE * x + tap) * In;
              const factor* w = taps + (block * 9 + 3 * down + tap) * In * LANES;
              for (int c = 0; c < In; c += PER_LANE) {
                Operand k[R][V];
#pragma GCC unroll 3
                for (int right = 0; right < R; right++)
#pragma GCC unroll 4
                  for (int v = 0; v < V; v++)
                    k[right][v] = get<Operand>(w + ((v * 9 + right) * In + c) * LANES);
#pragma GCC unroll 18
                for (int t = 0; t < T + R - 1; t++) {
                  const Operand pixel = broadcast(in + t * STRIDE * In + c);
#pragma GCC unroll 3
                  for (int right = 0; right < R; right++) {
                    if (t < right || t >= T + right) continue;
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++)
                      sum[v][t - right] = multiply_add(sum[v][t - right], k[right][v], pixel);
                  }
                }
              }
            }
#pragma GCC unroll 4
          for (int v = 0; v < V; v++)
            finish<Out>(sum[v], pixel, (block + v) * LANES, added, out, sums);
        }
  }

  const int side_;
};

// ---------------------------------------------------------------------------- gradient of the weight

// Copies a row of the input, between two zeros, as pairs that begin at even pixels and as pairs that
// begin at odd pixels, because the taps shift it by one pixel.
template <int C, class Source>
void pair_row(const Source& source, size_t first, factor* even, factor* odd, int side) {
  if constexpr (PER_LANE == 1) {
    pad_row<C>(source, first, even, side);
  } else {
    constexpr int N = Source::CHANNELS;
    for (int c = 0; c < C; c += N) {
      const auto read = source.reader(c);
      Vector<factor, N> last{};
      for (int x = 0; x < side; x += 2) {
        const auto one = read(first + x), two = read(first + x + 1);
        put(even + x * C + 2 * c, paired<N>(last, one));
        put(odd + x * C + 2 * c, paired<N>(one, two));
        last = two;
      }
      put(even + side * C + 2 * c, paired<N>(last, Vector<factor, N>{}));
    }
  }
}

template <int C>
constexpr int ROWS = PER_LANE == 1 && C == 16 ? 4 : 8;  // at a time, so that they fit into the L1 cache

// Adds the gradient of a few rows, of an image or of several small ones, to result, [9][In][Out].
// even, odd: up to ROWS rows of the input as `pair_row` makes them; pairs: the rows of the gradient
// from the one above them to the one below, for each image. All rows are side + 2 pixels wide.
template <int In, int Out>
void add_weight_gradient(const factor* even, const factor* odd, const factor* pairs, float* result,
                         int rows, int side) {
  constexpr int INPUTS = In < 8 || LANES == 8 ? 4 : 8;  // at a time
  const int width = side + 2;
  int in_pairs[ROWS<In>];  // where the row above each of them begins
  for (int y = 0; y < rows; y++) in_pairs[y] = (y + y / side * 2) * width * Out;
  for (int right = 0; right < 3; right++)
    for (int out = 0; out < Out; out += LANES)
      for (int in = 0; in < In; in += INPUTS) {
        Floats sum[INPUTS][3];
        float* r = result + (right * In + in) * Out + out;
#pragma GCC unroll 8
        for (int t = 0; t < INPUTS; t++)
#pragma GCC unroll 3
          for (int down = 0; down < 3; down++) sum[t][down] = load(r + (3 * down * In + t) * Out);
        for (int y = 0; y < rows; y++) {
          const factor* row = (right % PER_LANE ? odd : even + right * In) + y * width * In;
          const factor* x = row + in * PER_LANE;
          const factor* g = pairs + in_pairs[y] + out * PER_LANE;
          for (const factor* end = x + side * In; x < end; x += In * PER_LANE) {
            Operand k[3];
#pragma GCC unroll 3
            for (int down = 0; down < 3; down++) k[down] = get<Operand>(g + (2 - down) * width * Out);
#pragma GCC unroll 8
            for (int t = 0; t < INPUTS; t++) {
              const Operand v = broadcast(x + t * PER_LANE);
#pragma GCC unroll 3
              for (int down = 0; down < 3; down++)
                sum[t][down] = multiply_add(sum[t][down], k[down], v);
            }
            g += Out * PER_LANE;
          }
        }
#pragma GCC unroll 8
        for (int t = 0; t < INPUTS; t++)
#pragma GCC unroll 3
          for (int down = 0; down < 3; down++) store(r + (3 * down * In + t) * Out, sum[t][down]);
      }
}

// The gradient of the weight.
template <int In, int Out>
class WeightGradientByVectors {
 public:
  explicit WeightGradientByVectors(int side)
      : side_(side), even_(size(side)), odd_(PER_LANE == 1 ? 0 : size(side)) {}

  // How many images are added at a time.
  static int images_at_a_time(int side) { return std::max(1, ROWS<In> / side); }

  // Adds the gradient of `images` images, from number `image` on, to result, [9][In][Out].
  // pairs: the gradient as `pad_and_pair_row` makes it, [images][side + 2][side + 2][Out].
  template <class Source>
  void add(const Source& input, int image, int images, const factor* pairs, float* result) {
    const size_t first = (size_t)image * side_ * side_;
    for (int top = 0; top < images * side_; top += ROWS<In>) {
      const int rows = std::min(ROWS<In>, images * side_ - top);
      for (int y = 0; y < rows; y++) {
        const int at = y * (side_ + 2) * In;
        pair_row<In>(input, first + (top + y) * side_, &even_[at], odd_.data() + at, side_);
      }
      add_weight_gradient<In, Out>(even_.data(), odd_.data(), pairs + top * (side_ + 2) * Out,
                                   result, rows, side_);
    }
  }

 private:
  static size_t size(int side) { return ROWS<In> * (side + 2) * In; }

  const int side_;
  Scratch<factor> even_, odd_;
};
