// What is between convolutions, pixel by pixel. Channels are a multiple of 16.

#pragma once

#include <algorithm>

#include "normalisation.h"
#include "sums.h"

constexpr int AHEAD = 2048;  // elements: what passes over images fetches before it is needed

// The part of the rows that is this thread's, in stretches.
template <class Work>
void in_stretches(long rows, const Work& work) {
  constexpr long STRETCH = 1024;
  const long threads = omp_get_num_threads(), me = omp_get_thread_num();
  const long end = rows * (me + 1) / threads;
  for (long start = rows * me / threads; start < end; start += STRETCH)
    work(start, std::min(start + STRETCH, end));
}

// Sums of y, [rows, channels].
inline void sum_moments(const bf16* y, double* sums, long rows, int channels, int threads) {
  Totals totals(channels, threads);
#pragma omp parallel num_threads(threads)
  in_stretches(rows, [&](long start, long end) {
    for (int c = 0; c < channels; c += 16) {
      Moments<16> moments;
      long row = start;
      for (; row + 8 <= end; row += 8) {
        __m512 v[8];
        for (int k = 0; k < 8; k++) v[k] = load(y + (row + k) * channels + c);
        moments.add(row - start, 0, v);
      }
      for (; row < end; row++) {
        const __m512 v[1] = {load(y + row * channels + c)};
        moments.add(row - start, 0, v);
      }
      moments.end(end - start, totals.first() + c, totals.second() + c);
    }
  });
  totals.over_threads(sums);
}

// x = ReLU(y * scale + shift + shortcut); the shortcut may be null.
inline void activate(const bf16* y, const Norm& norm, const bf16* shortcut, bf16* x, long rows,
                     int channels, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long row = 0; row < rows; row++)
    for (int c = 0; c < channels; c += 16) {
      const size_t at = row * channels + c;
      prefetch(y + at + AHEAD, 1);
      __m512 sum = affine(load(y + at), norm.scale + c, norm.shift + c);
      if (shortcut) {
        prefetch(shortcut + at + AHEAD, 1);
        sum = _mm512_add_ps(sum, load(shortcut + at));
      }
      store(x + at, relu(sum));
    }
}

// The gradient of x becomes that of what is under its ReLU, in place; and the sums of it.
inline void activate_backward(bf16* gradient, const bf16* x, const bf16* y, const Norm& norm,
                              double* sums, long rows, int channels, int threads) {
  Totals totals(channels, threads);
#pragma omp parallel num_threads(threads)
  in_stretches(rows, [&](long start, long end) {
    for (int c = 0; c < channels; c += 16) {
      const __m512 m = _mm512_loadu_ps(norm.mean + c);
      __m512 sum = _mm512_setzero_ps(), product = _mm512_setzero_ps();
      for (long row = start; row < end; row++) {
        const size_t at = row * channels + c;
        for (const bf16* each : {(const bf16*)gradient, x, y}) prefetch(each + at + AHEAD, 1);
        const __m512 d = where_positive(load(x + at), load(gradient + at));
        store(gradient + at, d);
        sum = _mm512_add_ps(sum, d);
        product = _mm512_fmadd_ps(d, _mm512_sub_ps(load(y + at), m), product);
      }
      alignas(64) float each[2][16];
      _mm512_store_ps(each[0], sum);
      _mm512_store_ps(each[1], product);
      for (int k = 0; k < 16; k++) {
        totals.first()[c + k] += each[0][k];
        totals.second()[c + k] += each[1][k];
      }
    }
  });
  totals.over_threads(sums);
}

// The gradient of y from that of BN(y).
inline void spread(const bf16* gradient, const bf16* y, const Coefficients& by, bf16* of_y,
                   long rows, int channels, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long row = 0; row < rows; row++)
    for (int c = 0; c < channels; c += 16) {
      const size_t at = row * channels + c;
      const __m512 d = affine(load(y + at), by.by_y + c, by.constant + c);
      store(of_y + at, _mm512_fmadd_ps(load(gradient + at), _mm512_load_ps(by.by_gradient + c), d));
    }
}

// Means over 2x2 of x, [2 rows, 2 columns, channels] with the rows of all images, and zeros in the
// channels after them: [rows, columns, out_channels].
inline void pool_and_pad(const bf16* x, bf16* out, int rows, int columns, int channels,
                         int out_channels, int threads) {
  const __m512 quarter = _mm512_set1_ps(0.25f);
  const size_t width = 2 * (size_t)columns * channels;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int row = 0; row < rows; row++)
    for (int column = 0; column < columns; column++) {
      const bf16* from = x + 2 * row * width + 2 * column * channels;
      bf16* to = out + ((size_t)row * columns + column) * out_channels;
      for (int c = 0; c < channels; c += 16) {
        const __m512 above = _mm512_add_ps(load(from + c), load(from + c + channels));
        const __m512 below =
            _mm512_add_ps(load(from + c + width), load(from + c + channels + width));
        store(to + c, _mm512_mul_ps(_mm512_add_ps(above, below), quarter));
      }
      for (int c = channels; c < out_channels; c += 16) store(to + c, _mm512_setzero_ps());
    }
}

// The gradient of x from that of out.
inline void pool_and_pad_backward(const bf16* gradient, bf16* of_x, int rows, int columns,
                                  int channels, int out_channels, int threads) {
  const __m512 quarter = _mm512_set1_ps(0.25f);
  const size_t width = 2 * (size_t)columns * channels;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int row = 0; row < rows; row++)
    for (int column = 0; column < columns; column++) {
      const bf16* from = gradient + ((size_t)row * columns + column) * out_channels;
      bf16* to = of_x + 2 * row * width + 2 * column * channels;
      for (int c = 0; c < channels; c += 16) {
        const __m256i each = rounded(_mm512_mul_ps(load(from + c), quarter));
        for (size_t at : {(size_t)0, (size_t)channels, width, width + channels})
          store_bits(to + at + c, each);
      }
    }
}
