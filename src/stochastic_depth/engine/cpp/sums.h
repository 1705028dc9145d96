// Sums over the pixels of a mini-batch, two for each channel: in float32 over a stretch of pixels,
// then in float64.

#pragma once

#include <omp.h>

#include <vector>

#include "bfloat16.h"

// [threads][2][channels], and in the end [2][channels].
class Totals {
 public:
  Totals(int channels, int threads)
      : channels_(channels), threads_(threads), totals_((size_t)threads * 2 * channels) {}

  double* first() { return &totals_[(size_t)omp_get_thread_num() * 2 * channels_]; }
  double* second() { return first() + channels_; }

  void over_threads(double* result) const {
    for (int at = 0; at < 2 * channels_; at++) {
      result[at] = 0;
      for (int t = 0; t < threads_; t++) result[at] += totals_[(size_t)t * 2 * channels_ + at];
    }
  }

 private:
  const int channels_, threads_;
  std::vector<double> totals_;
};

// Over a stretch: of x and of x * x, where x is rounded as it will be stored. In float32 they are
// of differences to its first pixel, so that a large mean costs no digits.
template <int C>
struct Moments {
  alignas(64) float pivot[C], sum[C] = {}, square[C] = {};

  // result: channels c to c + 16 of T pixels, from this one of the stretch.
  template <size_t T>
  void add(size_t pixel, int c, const __m512 (&result)[T]) {
    if (pixel == 0) _mm512_store_ps(pivot + c, widened(rounded(result[0])));
    const __m512 p = _mm512_load_ps(pivot + c);
    __m512 s = _mm512_load_ps(sum + c), q = _mm512_load_ps(square + c);
#pragma GCC unroll 16
    for (size_t t = 0; t < T; t++) {
      const __m512 d = _mm512_sub_ps(widened(rounded(result[t])), p);
      s = _mm512_add_ps(s, d);
      q = _mm512_fmadd_ps(d, d, q);
    }
    _mm512_store_ps(sum + c, s);
    _mm512_store_ps(square + c, q);
  }

  void end(size_t pixels, double* sums, double* squares) const {
    for (int c = 0; c < C; c++) {
      const double p = pivot[c], s = sum[c];
      sums[c] += s + pixels * p;
      squares[c] += square[c] + p * (2 * s + pixels * p);
    }
  }
};

// Over a stretch of the gradient of x = ReLU(y * scale + shift + shortcut): what is under the ReLU
// becomes of it, d, and the sums are of d and of d * (y - mean). Where x is not stored, there is no
// shortcut, and it is computed again.
template <int C, bool stored>
struct UnderReLU {
  const bf16 *x, *y;
  const float *scale, *shift, *mean;
  alignas(64) float sum[C] = {}, product[C] = {};

  template <size_t T>
  void add(size_t pixel, int c, __m512 (&d)[T]) {
    const __m512 m = _mm512_loadu_ps(mean + c);
    __m512 s = _mm512_load_ps(sum + c), q = _mm512_load_ps(product + c);
#pragma GCC unroll 16
    for (size_t t = 0; t < T; t++) {
      const size_t at = (pixel + t) * C + c;
      const __m512 v = load(y + at);
      if (stored)
        d[t] = _mm512_maskz_mov_ps(not_zero(load_bits(x + at)), d[t]);
      else
        d[t] = where_positive(affine(v, scale + c, shift + c), d[t]);
      s = _mm512_add_ps(s, d[t]);
      q = _mm512_fmadd_ps(d[t], _mm512_sub_ps(v, m), q);
    }
    _mm512_store_ps(sum + c, s);
    _mm512_store_ps(product + c, q);
  }

  void end(size_t, double* sums, double* products) const {
    for (int c = 0; c < C; c++) {
      sums[c] += sum[c];
      products[c] += product[c];
    }
  }
  void fetch(size_t pixel, size_t count) const { prefetch(y + pixel * C, count * C); }
};

// Nothing is wanted.
struct Unsummed {
  template <size_t T>
  void add(size_t, int, const __m512 (&)[T]) {}
  void end(size_t, double*, double*) const {}
  void fetch(size_t, size_t) const {}
};
