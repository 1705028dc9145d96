// Convolution and batch normalisation of residual blocks in bfloat16, for AVX512-BF16.
//
// Images are [n, side, side, channels] (channels_last), channels a multiple of 16. `sums` are
// float64, [2][channels], over the pixels of a mini-batch: of x and x * x, or of a gradient and of
// its product with x - mean. A null pointer means that there is none.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "convolution.h"

namespace {

template <class Work>
void with_channels(int channels, const Work& work) {
  if (channels == 16) work(std::integral_constant<int, 16>());
  if (channels == 32) work(std::integral_constant<int, 32>());
  if (channels == 64) work(std::integral_constant<int, 64>());
}

// The part of the rows that is this thread's, in stretches.
template <class Work>
void in_stretches(long rows, const Work& work) {
  constexpr long STRETCH = 1024;
  const long threads = omp_get_num_threads(), me = omp_get_thread_num();
  const long end = rows * (me + 1) / threads;
  for (long start = rows * me / threads; start < end; start += STRETCH)
    work(start, std::min(start + STRETCH, end));
}

constexpr int AHEAD = 2048;  // elements: what passes over images fetches before it is needed

template <class Work>
void with_gradient(const bf16* gradient, const bf16* x, const float* coefficients,
                   const float* scale, const float* shift, int channels, const Work& work) {
  const float *by_x = coefficients + channels, *constant = coefficients + 2 * channels;
  if (scale)
    work(Gradient<true>{gradient, x, coefficients, by_x, constant, scale, shift});
  else
    work(Gradient<false>{gradient, x, coefficients, by_x, constant, nullptr, nullptr});
}

}  // namespace

extern "C" {

// The convolution of x, or of ReLU(x * scale + shift), and the sums of it.
void convolve3x3(const bf16* x, const float* scale, const float* shift, const bf16* weight,
                 bf16* out, double* sums, int n, int side, int channels, int threads) {
  with_channels(channels, [&](auto count) {
    constexpr int C = decltype(count)::value;
    const auto sums_of = [](size_t) { return Moments<C>(); };
    if (scale)
      convolve<C>(Activated{x, scale, shift}, weight, out, sums_of, sums, n, side, threads);
    else
      convolve<C>(Image{x}, weight, out, sums_of, sums, n, side, threads);
  });
}

// Gradients of the weight, and of what was convolved, with `added`.
//
// What is given is the gradient of a batch normalisation of the convolution's result y, by the
// `coefficients` of that, or of a ReLU after it, if there are y_scale and y_shift. With scale,
// shift and mean, x has been through batch normalisation and ReLU as well, and `sums` of that are
// given.
void convolve3x3_backward(const bf16* x, const float* scale, const float* shift, const float* mean,
                          const bf16* gradient, const bf16* y, const float* coefficients,
                          const float* y_scale, const float* y_shift, const bf16* weight,
                          float* of_weight, const bf16* added, bf16* of_x, double* sums, int n,
                          int side, int channels, int threads) {
  with_channels(channels, [&](auto count) {
    constexpr int C = decltype(count)::value;
    with_gradient(gradient, y, coefficients, y_scale, y_shift, C, [&](const auto& of_y) {
      if (scale)
        convolve_backward<C>(
            Activated{x, scale, shift}, of_y, weight, of_weight, added, of_x,
            [&](size_t first) { return GradientMoments<C>{x + first * C, scale, shift, mean}; },
            sums, n, side, threads);
      else
        convolve_backward<C>(
            Image{x}, of_y, weight, of_weight, added, of_x, [](size_t) { return Unsummed(); }, sums,
            n, side, threads);
    });
  });
}

// Sums of x, [rows, channels].
void sum_moments(const bf16* x, double* sums, long rows, int channels, int threads) {
  Totals totals(channels, threads);
#pragma omp parallel num_threads(threads)
  in_stretches(rows, [&](long start, long end) {
    for (int c = 0; c < channels; c += 16) {
      Moments<16> moments;
      long row = start;
      for (; row + 8 <= end; row += 8) {
        __m512 v[8];
        for (int k = 0; k < 8; k++) v[k] = load(x + (row + k) * channels + c);
        moments.add(row - start, 0, v);
      }
      for (; row < end; row++) {
        const __m512 v[1] = {load(x + row * channels + c)};
        moments.add(row - start, 0, v);
      }
      moments.end(end - start, totals.first() + c, totals.second() + c);
    }
  });
  totals.over_threads(sums);
}

// What batch normalisation makes of the sums of x: BN(x) * factor is x * scale + shift.
void normalise(const double* sums, const float* weight, const float* bias, float* running_mean,
               float* running_var, float* mean, float* rstd, float* scale, float* shift,
               float momentum, float eps, float factor, long rows, int channels) {
  for (int c = 0; c < channels; c++) {
    const double m = sums[c] / rows, square = sums[channels + c] / rows;
    const double variance = std::fmax(0., square - m * m);
    mean[c] = (float)m;
    rstd[c] = (float)(1 / std::sqrt(variance + eps));
    running_mean[c] += momentum * (mean[c] - running_mean[c]);
    running_var[c] += momentum * ((float)(variance * rows / (rows - 1)) - running_var[c]);
    scale[c] = weight[c] * rstd[c] * factor;
    shift[c] = (bias[c] - weight[c] * rstd[c] * mean[c]) * factor;
  }
}

// out = ReLU(x * scale + shift + shortcut)
void activate(const bf16* x, const float* scale, const float* shift, const bf16* shortcut,
              bf16* out, long rows, int channels, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long row = 0; row < rows; row++)
    for (int c = 0; c < channels; c += 16) {
      const size_t at = row * channels + c;
      prefetch(x + at + AHEAD, 1);
      __m512 y = affine(load(x + at), scale + c, shift + c);
      if (shortcut) {
        prefetch(shortcut + at + AHEAD, 1);
        y = _mm512_add_ps(y, load(shortcut + at));
      }
      store(out + at, relu(y));
    }
}

// The gradient of `out` becomes that of what is under its ReLU, in place; and the sums of it.
void activate_backward(bf16* gradient, const bf16* out, const bf16* x, const float* mean,
                       double* sums, long rows, int channels, int threads) {
  Totals totals(channels, threads);
#pragma omp parallel num_threads(threads)
  in_stretches(rows, [&](long start, long end) {
    for (int c = 0; c < channels; c += 16) {
      const __m512 m = _mm512_loadu_ps(mean + c);
      __m512 sum = _mm512_setzero_ps(), product = _mm512_setzero_ps();
      for (long row = start; row < end; row++) {
        const size_t at = row * channels + c;
        for (const bf16* each : {(const bf16*)gradient, out, x}) prefetch(each + at + AHEAD, 1);
        const __m512 d = where_positive(load(out + at), load(gradient + at));
        store(gradient + at, d);
        sum = _mm512_add_ps(sum, d);
        product = _mm512_fmadd_ps(d, _mm512_sub_ps(load(x + at), m), product);
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

// Gradients of weight and bias from the sums of a gradient of BN(x) * factor; and that of x is
// gradient * coefficients[0] + x * coefficients[1] + coefficients[2], each [channels].
void normalise_backward(const double* sums, const float* weight, const float* mean,
                        const float* rstd, float* of_weight, float* of_bias, float* coefficients,
                        float factor, long rows, int channels) {
  for (int c = 0; c < channels; c++) {
    const double s = sums[c] * factor, q = sums[channels + c] * factor;
    const double by_weight = (double)weight[c] * rstd[c], slope = q / rows * rstd[c] * rstd[c];
    of_bias[c] = (float)s;
    of_weight[c] = (float)(q * rstd[c]);
    coefficients[c] = (float)(by_weight * factor);
    coefficients[channels + c] = (float)(-by_weight * slope);
    coefficients[2 * channels + c] = (float)(by_weight * (slope * mean[c] - s / rows));
  }
}

// The gradient of x by these coefficients. With scale and shift, what is given is that of
// ReLU(x * scale + shift).
void spread(const bf16* gradient, const bf16* x, const float* coefficients, const float* scale,
            const float* shift, bf16* of_x, long rows, int channels, int threads) {
  with_gradient(gradient, x, coefficients, scale, shift, channels, [&](const auto& source) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < rows; row++)
      for (int c = 0; c < channels; c += 16) {
        const size_t at = row * channels + c;
        store_bits(of_x + at, source.at(at, c));
      }
  });
}
}
