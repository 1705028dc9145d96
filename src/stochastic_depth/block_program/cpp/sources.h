// The sources of a convolution: a stored image, or an image that is computed from others while it is
// read. And how a row of a source is copied into a frame of zeros.

#pragma once

#include "statistics.h"

// `source.reader(c)` returns a function of a pixel, which reads its channels c to c + CHANNELS;
// `source.fetch(pixel, count)` prefetches what these functions will read.

template <int C>
struct Image {
  static constexpr int CHANNELS = LANES;
  const stored* x;

  auto reader(int c) const {
    return [x = x + c](size_t pixel) { return load_factors(x + pixel * C); };
  }
  void fetch(size_t pixel, size_t count) const { prefetch(x + pixel * C, count * C); }
};

// ReLU(y * scale + shift)
template <int C>
struct Activated {
  static constexpr int CHANNELS = LANES;
  const stored* y;
  const float *scale, *shift;

  auto reader(int c) const {
    return [y = y + c, scale = load(scale + c), shift = load(shift + c)](size_t pixel) {
      return factors(relu(load(y + pixel * C) * scale + shift));
    };
  }
  void fetch(size_t pixel, size_t count) const { prefetch(y + pixel * C, count * C); }
};

// x = ReLU(y * scale + shift + shortcut), which is stored when it is read. The shortcut may be null.
template <int C>
struct Added {
  static constexpr int CHANNELS = LANES;
  const stored *y, *shortcut;
  const float *scale, *shift;
  stored* x;

  auto reader(int c) const {
    return [*this, c, scale = load(scale + c), shift = load(shift + c)](size_t pixel) {
      const size_t at = pixel * C + c;
      Floats sum = load(y + at) * scale + shift;
      if (shortcut) sum += load(shortcut + at);
      sum = relu(sum);
      store(x + at, sum);
      return factors(as_stored(sum));
    };
  }
  void fetch(size_t pixel, size_t count) const {
    prefetch(y + pixel * C, count * C);
    if (shortcut) prefetch(shortcut + pixel * C, count * C);
    prefetch_to_write(x + pixel * C, count * C);
  }
};

// The gradient of y, computed from the gradient of BN(y).
template <int C>
struct Normalised {
  static constexpr int CHANNELS = LANES;
  const stored *gradient, *y;
  const Coefficients& by;

  auto reader(int c) const {
    const Floats by_gradient = load(by.by_gradient + c);
    const Floats by_y = load(by.by_y + c), constant = load(by.constant + c);
    return [gradient = gradient + c, y = y + c, by_gradient, by_y, constant](size_t pixel) {
      const Floats grad_y = load(y + pixel * C) * by_y + constant;
      return factors(load(gradient + pixel * C) * by_gradient + grad_y);
    };
  }
  void fetch(size_t pixel, size_t count) const {
    prefetch(y + pixel * C, count * C);
    prefetch(gradient + pixel * C, count * C);
  }
};

// Pictures of up to FEW channels; the missing channels are zeros.
constexpr int FEW = 4;
struct Pictures {
  static constexpr int CHANNELS = FEW;
  const stored* x;
  const int channels;

  auto reader(int) const {
    return [*this](size_t pixel) {
      Vector<factor, FEW> result{};
      for (int c = 0; c < channels; c++) result[c] = one_factor(x[pixel * channels + c]);
      return result;
    };
  }
  void fetch(size_t pixel, size_t count) const { prefetch(x + pixel * channels, count * channels); }
};

// Copies a row of the image to padded, [side + 2][C], whose first and last pixel stay zero.
template <int C, class Source>
void pad_row(const Source& source, size_t first, factor* padded, int side) {
  for (int c = 0; c < C; c += Source::CHANNELS) {
    const auto read = source.reader(c);
    for (int x = 0; x < side; x++) put(padded + (x + 1) * C + c, read(first + x));
  }
}

// The gradient of a weight is a sum over pixels. For this sum the PER_LANE factors of a lane belong to
// neighbouring pixels: [pixels / PER_LANE][C][PER_LANE]. With one factor in a lane these are padded rows.

// Copies a row of the gradient for both of its uses: to padded, as `pad_row` does, and to pairs, which
// begin with its first pixel.
template <int C, class Source>
void pad_and_pair_row(const Source& source, size_t first, factor* padded, factor* pairs, int side) {
  if constexpr (PER_LANE == 1) {
    pad_row<C>(source, first, padded, side);
  } else {
    for (int c = 0; c < C; c += LANES) {
      const auto read = source.reader(c);
      for (int x = 0; x < side; x += 2) {
        const Factors one = read(first + x), two = read(first + x + 1);
        put(padded + (x + 1) * C + c, one);
        put(padded + (x + 2) * C + c, two);
        put(pairs + x * C + 2 * c, paired<LANES>(one, two));
      }
    }
  }
}
