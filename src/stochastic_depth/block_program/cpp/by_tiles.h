// The convolution of one image, and the gradient of its weight, by tile registers: see tiles.h.

#pragma once

#include <algorithm>
#include <utility>

#include "sources.h"
#include "tiles.h"

constexpr int PIXELS_PER_STEP = 32;  // over which one product of the weight's gradient sums

#ifdef TILES

// As ConvolutionByVectors. The rows of A are 16 neighbouring pixels of the frame, and B has the weights of
// 16 output channels, which four A share. The three taps of a row lie side by side in both.
template <int In, int Out>
class ConvolutionByTiles {
 public:
  explicit ConvolutionByTiles(int side)
      : side_(side),
        pitch_(side % 16 ? side + 2 : side),
        rows_(side % 16 ? 8 : std::max(1, 4 * 16 / side)),
        results_(rows_ * pitch_ * LANES) {}

  template <class Sums, class Ahead>
  void operator()(const factor* padded, const factor* taps, const stored* added, stored* out,
                  Sums& sums, const Ahead& ahead) {
    const Tiles tiles;
    for (int block = 0; block < Out / LANES; block++)
      for (int top = 0; top < side_; top += rows_) {
        const int count = rows_ * pitch_ / 16;
        const factor* weight = taps + block * 9 * In * LANES;
        int tile = 0;
        for (; tile + 4 <= count; tile += 4)
          multiply(padded, weight, top, tile, std::make_index_sequence<4>());
        for (; tile < count; tile++)
          multiply(padded, weight, top, tile, std::make_index_sequence<1>());
        for (int y = 0; y < rows_; y++) {
          const size_t row = (size_t)(top + y) * side_;
          if (block == 0) ahead(row, side_);
          for (int x = 0; x < side_; x += FINISHED) {
            Floats result[FINISHED];
#pragma GCC unroll 8
            for (int t = 0; t < FINISHED; t++)
              result[t] = load(&results_[(y * pitch_ + x + t) * LANES]);
            finish<Out>(result, row + x, block * LANES, added, out, sums);
          }
        }
      }
  }

 private:
  static constexpr int FINISHED = 8;  // pixels of a row at a time

  // Results of some tiles of the rows from `top` on. A tile ends where a row does if 16 divides the
  // side; otherwise tiles run on through the zeros between the rows, and those results are not used.
  template <size_t... I>
  void multiply(const factor* padded, const factor* weight, int top, int tile,
                std::index_sequence<I...> tiles) {
    const int width = side_ + 2;
    const factor* in[sizeof...(I)];
    for (size_t i = 0; i < sizeof...(I); i++) {
      const int at = (tile + i) * 16;
      in[i] = padded + ((top + at / pitch_) * width + at % pitch_) * In;
    }
    (zero_tile<I>(), ...);
    for (int down = 0; down < 3; down++) {
      const int row = down * width * In;
      int at = 0;
      for (; at + 32 <= 3 * In; at += 32, weight += 32 * LANES)
        add_products<32>(in, row + at, weight, tiles);
      for (; at < 3 * In; at += 16, weight += 16 * LANES)
        add_products<16>(in, row + at, weight, tiles);
    }
    (store_tile<I>(&results_[(tile + I) * 16 * LANES], LANES), ...);
  }

  template <int K, size_t... I>
  static void add_products(const factor* const* in, int at, const factor* weight,
                           std::index_sequence<I...>) {
    load_tile<B<K>>(weight, 2 * LANES);
    ((load_tile<A<K>>(in[I] + at, In), multiply_tiles<K, I>()), ...);
  }

  // The pitch is that of the rows of the results. Few rows at a time, if possible those of four tiles:
  // their results are read while they are in the innermost cache.
  const int side_, pitch_, rows_;
  Scratch<float> results_;
};

// ---------------------------------------------------------------------------- gradient of the weight

// Lanes I of a and b; the lanes of b follow those of a.
template <uint32_t... I>
Lanes shuffled(Lanes a, Lanes b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Lanes{I...});
#endif
}

// As the x86 instructions of these names, in each group of four lanes (128 bits), for dwords and qwords:
//   a: a0 a1 a2 a3   unpacklo: a0 b0 a1 b1   unpacklo_pairs: a0 a1 b0 b1
//   b: b0 b1 b2 b3   unpackhi: a2 b2 a3 b3   unpackhi_pairs: a2 a3 b2 b3
inline Lanes unpacklo(Lanes a, Lanes b) {
  return shuffled<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(a, b);
}
inline Lanes unpackhi(Lanes a, Lanes b) {
  return shuffled<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(a, b);
}
inline Lanes unpacklo_pairs(Lanes a, Lanes b) {
  return shuffled<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(a, b);
}
inline Lanes unpackhi_pairs(Lanes a, Lanes b) {
  return shuffled<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(a, b);
}

// Copies a row of the image channel by channel: the pixels of channel c begin at rows + c * stride.
template <int C, class Source>
void transpose_row(const Source& source, size_t first, factor* rows, size_t stride, int side) {
  constexpr int PIXELS = 8;
  for (int c = 0; c < C; c += LANES) {
    const auto read = source.reader(c);
    for (int x = 0; x < side; x += PIXELS) {
      Lanes pair[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        pair[i] = paired<LANES>(read(first + x + 2 * i), read(first + x + 2 * i + 1));
      const Lanes low01 = unpacklo(pair[0], pair[1]), high01 = unpackhi(pair[0], pair[1]);
      const Lanes low23 = unpacklo(pair[2], pair[3]), high23 = unpackhi(pair[2], pair[3]);
      const Lanes eights[] = {unpacklo_pairs(low01, low23), unpackhi_pairs(low01, low23),
                              unpacklo_pairs(high01, high23), unpackhi_pairs(high01, high23)};
      // The eight pixels of a channel are four lanes; each vector has those of four channels.
#pragma GCC unroll 16
      for (int channel = 0; channel < LANES; channel++)
        memcpy(rows + (c + channel) * stride + x, (const uint32_t*)&eights[channel % 4] + channel / 4 * 4,
               PIXELS * sizeof(factor));
    }
  }
}

// The gradient of the weight, image by image. A holds the pixels of 16 channels of the input, and B those
// of 16 channels of the result. The sum runs over the whole frame, whose zeros add nothing.
template <int In, int Out>
class WeightGradientByTiles {
 public:
  explicit WeightGradientByTiles(int side)
      : side_(side),
        summed_((side * (side + 2) + PIXELS_PER_STEP - 1) / PIXELS_PER_STEP * PIXELS_PER_STEP),
        stride_(summed_ + PIXELS_PER_STEP * (2 * side / PIXELS_PER_STEP + 1)),
        transposed_(In * stride_) {}

  // As those of WeightGradientByVectors.
  static int images_at_a_time(int) { return 1; }

  template <class Source>
  void add(const Source& input, int image, int, const factor* pairs, float* result) {
    const int width = side_ + 2;
    const size_t first = (size_t)image * side_ * side_;
    for (int y = 0; y < side_; y++)
      transpose_row<In>(input, first + y * side_, &transposed_[(y + 1) * width + 1], stride_, side_);
    const Tiles tiles;
    for (int down = 0; down < 3; down++)
      for (int in = 0; in < In; in += 16)
        for (int out = 0; out < Out; out += LANES) {
          float* sums = result + (down * 3 * In + in) * Out + out;
          load_tile<0>(sums, Out);
          load_tile<1>(sums + In * Out, Out);
          load_tile<2>(sums + 2 * In * Out, Out);
          const factor* x = &transposed_[in * stride_ + down * width];
          const factor* g = pairs + width * Out + 2 * out;
          for (size_t at = 0; at < summed_; at += PIXELS_PER_STEP) {
            load_tile<B<32>>(g + at * Out, 2 * Out);
            load_tile<A<32>>(x + at, stride_);
            multiply_tiles<32, 0>();
            load_tile<A<32>>(x + at + 1, stride_);
            multiply_tiles<32, 1>();
            load_tile<A<32>>(x + at + 2, stride_);
            multiply_tiles<32, 2>();
          }
          store_tile<0>(sums, Out);
          store_tile<1>(sums + In * Out, Out);
          store_tile<2>(sums + 2 * In * Out, Out);
        }
  }

 private:
  const int side_;
  const size_t summed_, stride_;  // pixels
  Scratch<factor> transposed_;
};

#endif
