// What is convolved: images [n, side, side, channels] as they are, or computed from others on the
// way, so that they need not be read again, or not even stored.
//
// `reader(c)` gives what reads channels c to c + 16 of a pixel; `fetch` is for pixels to come.

#pragma once

#include "bfloat16.h"
#include "normalisation.h"

template <int C>
struct Image {
  const bf16* x;

  auto reader(int c) const {
    return [x = x + c](size_t pixel) { return load_bits(x + pixel * C); };
  }
  void fetch(size_t pixel, size_t count) const { prefetch(x + pixel * C, count * C); }
};

// ReLU(y * scale + shift)
template <int C>
struct Activated {
  const bf16* y;
  const float *scale, *shift;

  auto reader(int c) const {
    const __m512 scale = _mm512_loadu_ps(this->scale + c), shift = _mm512_loadu_ps(this->shift + c);
    return [y = y + c, scale, shift](size_t pixel) {
      return rounded(relu(_mm512_fmadd_ps(load(y + pixel * C), scale, shift)));
    };
  }
  void fetch(size_t pixel, size_t count) const { prefetch(y + pixel * C, count * C); }
};

// x = ReLU(y * scale + shift + shortcut), which is stored as it is read; the shortcut may be null.
template <int C>
struct Added {
  const bf16 *y, *shortcut;
  const float *scale, *shift;
  bf16* x;

  auto reader(int c) const {
    const __m512 scale = _mm512_loadu_ps(this->scale + c), shift = _mm512_loadu_ps(this->shift + c);
    return [y = y + c, shortcut = shortcut, x = x + c, c, scale, shift](size_t pixel) {
      __m512 sum = _mm512_fmadd_ps(load(y + pixel * C), scale, shift);
      if (shortcut) sum = _mm512_add_ps(sum, load(shortcut + pixel * C + c));
      const __m256i bits = rounded(relu(sum));
      store_bits(x + pixel * C, bits);
      return bits;
    };
  }
  void fetch(size_t pixel, size_t count) const {
    prefetch(y + pixel * C, count * C);
    if (shortcut) prefetch(shortcut + pixel * C, count * C);
    prefetch_to_write(x + pixel * C, count * C);
  }
};

// The gradient of y from that of BN(y).
template <int C>
struct Normalised {
  const bf16 *gradient, *y;
  const Coefficients& by;

  auto reader(int c) const {
    const __m512 by_gradient = _mm512_load_ps(by.by_gradient + c);
    const __m512 by_y = _mm512_load_ps(by.by_y + c), constant = _mm512_load_ps(by.constant + c);
    return [gradient = gradient + c, y = y + c, by_gradient, by_y, constant](size_t pixel) {
      const __m512 of_y = _mm512_fmadd_ps(load(y + pixel * C), by_y, constant);
      return rounded(_mm512_fmadd_ps(load(gradient + pixel * C), by_gradient, of_y));
    };
  }
  void fetch(size_t pixel, size_t count) const {
    prefetch(y + pixel * C, count * C);
    prefetch(gradient + pixel * C, count * C);
  }
};

// Images of up to FEW channels, which are filled up with zeros.
constexpr int FEW = 4;
struct Pictures {
  const bf16* x;
  const int channels;
  const size_t pixels;  // of all

  __m128i at(size_t pixel) const {
    uint64_t bits = 0;
    if (pixel + FEW <= pixels) {
      memcpy(&bits, x + pixel * channels, 8);  // with some of the next pixel
      bits &= ~(uint64_t)0 >> (64 - 16 * channels);
    } else {
      memcpy(&bits, x + pixel * channels, 2 * channels);
    }
    return _mm_cvtsi64_si128((long long)bits);
  }
  void fetch(size_t pixel, size_t count) const { prefetch(x + pixel * channels, count * channels); }
};
