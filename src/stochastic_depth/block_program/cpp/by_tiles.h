// The convolution of one image, and the gradient of its weight, by tile registers: see tiles.h.

#pragma once

#include "sources.h"
#include "tiles.h"

constexpr int PIXELS_PER_STEP = 32;  // over which one product of the weight's gradient sums

#ifdef TILES

// As `convolve_image`. The rows of A are neighbouring pixels, and B has the weights of 16 output
// channels, which four A share.
template <int In, int Out, class Sums, class Ahead>
void convolve_image_by_tiles(const factor* padded, const factor* weight, const stored* added,
                             stored* out, int side, Sums& sums, const Ahead& ahead) {
  constexpr int K = In < 32 ? In : 32, SUMMED = 8;
  const int width = side + 2, pixels = side % 16 ? 8 : 16;  // of each A, in one row of the image
  const Tiles tiles(pixels);
  alignas(64) float results[4 * 16 * LANES];
  for (int block = 0; block < Out / LANES; block++)
    for (int pixel = 0; pixel < side * side; pixel += 4 * pixels) {
      if (block == 0) ahead(pixel, 4 * pixels);
      const factor* in[4];
      for (int i = 0; i < 4; i++) {
        const int at = pixel + i * pixels;
        in[i] = padded + (at / side * width + at % side) * In;
      }
      const factor* w = weight + block * 9 * In * LANES;
      zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
      for (int down = 0; down < 3; down++)
        for (int at = down * width * In; at < (down * width + 3) * In; at += K, w += K * LANES) {
          load_tile<B<K>>(w, 2 * LANES);
          load_tile<A<K>>(in[0] + at, In);
          multiply_tiles<K, 0>();
          load_tile<A<K>>(in[1] + at, In);
          multiply_tiles<K, 1>();
          load_tile<A<K>>(in[2] + at, In);
          multiply_tiles<K, 2>();
          load_tile<A<K>>(in[3] + at, In);
          multiply_tiles<K, 3>();
        }
      store_tile<0>(results, LANES);
      store_tile<1>(results + pixels * LANES, LANES);
      store_tile<2>(results + 2 * pixels * LANES, LANES);
      store_tile<3>(results + 3 * pixels * LANES, LANES);
      for (int at = 0; at < 4 * pixels; at += SUMMED) {
        Floats result[SUMMED];
#pragma GCC unroll 8
        for (int t = 0; t < SUMMED; t++) result[t] = load(results + (at + t) * LANES);
        finish<Out>(result, pixel + at, block * LANES, added, out, sums);
      }
    }
}

// ---------------------------------------------------------------------------- gradient of the weight

// Each takes the lanes of a and b in turn, from the first or the last two of every four lanes, one
// lane or two at a time.
inline Lanes first_of(Lanes a, Lanes b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}
inline Lanes last_of(Lanes a, Lanes b) {
  return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
inline Lanes first_two_of(Lanes a, Lanes b) {
  return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
}
inline Lanes last_two_of(Lanes a, Lanes b) {
  return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
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
      const Lanes first01 = first_of(pair[0], pair[1]), last01 = last_of(pair[0], pair[1]);
      const Lanes first23 = first_of(pair[2], pair[3]), last23 = last_of(pair[2], pair[3]);
      const Lanes eights[] = {first_two_of(first01, first23), last_two_of(first01, first23),
                              first_two_of(last01, last23), last_two_of(last01, last23)};
      // The eight pixels of a channel are four lanes; each vector has those of four channels.
#pragma GCC unroll 16
      for (int channel = 0; channel < LANES; channel++)
        memcpy(rows + (c + channel) * stride + x, (const uint32_t*)&eights[channel % 4] + channel / 4 * 4,
               PIXELS * sizeof(factor));
    }
  }
}

// The gradient of the weight, image by image. A has the pixels of 16 channels of the input, and B those
// of 16 channels of its result. The sum runs over the whole frame, whose zeros add nothing.
template <int In, int Out>
class WeightGradientByTiles {
 public:
  explicit WeightGradientByTiles(int side)
      : side_(side),
        summed_((side * (side + 2) + PIXELS_PER_STEP - 1) / PIXELS_PER_STEP * PIXELS_PER_STEP),
        stride_(summed_ + PIXELS_PER_STEP * (2 * side / PIXELS_PER_STEP + 1)),
        transposed_(In * stride_) {}

  // As that of WeightGradientByVectors.
  template <class Source>
  void add(const Source& input, size_t first, const factor* pairs, float* result) {
    const int width = side_ + 2;
    for (int y = 0; y < side_; y++)
      transpose_row<In>(input, first + y * side_, &transposed_[(y + 1) * width + 1], stride_, side_);
    const Tiles tiles(16);
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
