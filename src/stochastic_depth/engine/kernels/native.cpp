// Convolutions and batch normalisation of a residual block in bfloat16, for AVX512-BF16.
//
// Images are [n, side, side, C] (channels_last) with C a multiple of 16; sums are in float32.

#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using bf16 = uint16_t;

namespace {

// Sixteen channels at a time.
inline __m512 load(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

inline void store(bf16* p, __m512 v) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
}

inline float value(bf16 b) {
  uint32_t bits = (uint32_t)b << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// ------------------------------------------------------------------------------ convolution
//
// A tile of T pixels by B x 16 output channels stays in registers. The instruction multiplies pairs
// of inputs: weights are packed as [C/16][9][C/2][16 outputs][2 inputs], and a pair of inputs of one
// pixel is broadcast from memory. Each image is copied between borders of zeros first.

template <int C>
constexpr int TILE = C == 16 ? 16 : 8;
template <int C>
constexpr int OUTPUTS = C == 16 ? 1 : 2;

inline __m512bh pair(const bf16* p) {
  int32_t both;
  memcpy(&both, p, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}

template <int C>
void pad(const bf16* x, bf16* padded, int side) {
  const size_t width = (size_t)(side + 2) * C, inner = (size_t)side * C;
  memset(padded, 0, 2 * width);
  for (int y = 0; y < side; y++) {
    bf16* row = padded + (y + 1) * width;
    memset(row, 0, 2 * C);
    memcpy(row + C, x + y * inner, 2 * inner);
    memset(row + C + inner, 0, 2 * C);
  }
  memset(padded + (side + 1) * width, 0, 2 * width);
}

template <int C>
void convolve_image(const bf16* padded, const bf16* weight, const bf16* added, bf16* out, int side) {
  constexpr int T = TILE<C>, B = OUTPUTS<C>;
  const int width = side + 2;
  for (int block = 0; block < C / 16; block += B)
    for (int y = 0; y < side; y++)
      for (int x = 0; x < side; x += T) {
        __m512 sum[T][B];
        for (auto& row : sum)
          for (auto& s : row) s = _mm512_setzero_ps();
        for (int tap = 0; tap < 9; tap++) {
          const bf16* in = padded + ((y + tap / 3) * width + x + tap % 3) * C;
          const bf16* w = weight + (block * 9 + tap) * C * 16;
          for (int c = 0; c < C / 2; c++) {
            __m512bh k[B];
            for (int b = 0; b < B; b++)
              k[b] = (__m512bh)_mm512_loadu_si512(w + b * 9 * C * 16 + c * 32);
#pragma GCC unroll 16
            for (int t = 0; t < T; t++) {
              const __m512bh v = pair(in + t * C + 2 * c);
#pragma GCC unroll 2
              for (int b = 0; b < B; b++) sum[t][b] = _mm512_dpbf16_ps(sum[t][b], k[b], v);
            }
          }
        }
        for (int t = 0; t < T; t++)
          for (int b = 0; b < B; b++) {
            const size_t at = ((size_t)y * side + x + t) * C + (block + b) * 16;
            store(out + at, added ? _mm512_add_ps(load(added + at), sum[t][b]) : sum[t][b]);
          }
      }
}

// weight: [C outputs][9][C inputs]. The gradient of the input is a convolution too, with the taps
// the other way round and inputs and outputs exchanged.
template <int C>
std::vector<bf16> pack(const bf16* weight, bool transposed) {
  std::vector<bf16> packed(9 * C * C);
  for (int out = 0; out < C; out++)
    for (int tap = 0; tap < 9; tap++)
      for (int in = 0; in < C; in++) {
        const bf16 w =
            transposed ? weight[(in * 9 + 8 - tap) * C + out] : weight[(out * 9 + tap) * C + in];
        packed[((((out / 16) * 9 + tap) * (C / 2) + in / 2) * 16 + out % 16) * 2 + in % 2] = w;
      }
  return packed;
}

template <int C>
void convolve(const bf16* x, const bf16* weight, bool transposed, const bf16* added, bf16* out,
              int n, int side, int threads) {
  const std::vector<bf16> packed = pack<C>(weight, transposed);
  const size_t image = (size_t)side * side * C;
#pragma omp parallel num_threads(threads)
  {
    std::vector<bf16> padded((size_t)(side + 2) * (side + 2) * C);
#pragma omp for schedule(static)
    for (int i = 0; i < n; i++) {
      pad<C>(x + i * image, padded.data(), side);
      convolve_image<C>(padded.data(), packed.data(), added ? added + i * image : nullptr,
                        out + i * image, side);
    }
  }
}

// The gradient of the weight sums over pixels, so pairs are of neighbouring pixels: rows are
// interleaved as [pairs][C][2], those of the padded input twice, in pairs that begin at even and at
// odd pixels, because taps shift them. A tile of T inputs by B x 16 outputs stays in registers over
// a whole image.

// Sixteen channels each of two pixels.
inline void interleave(const bf16* first, const bf16* second, bf16* pairs) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)first));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)second));
  _mm512_storeu_si512(pairs, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

template <int C>
void interleave_rows(const bf16* pixels, bf16* pairs, long count) {
  for (long pixel = 0; pixel + 1 < count; pixel += 2)
    for (int c = 0; c < C; c += 16) {
      const bf16* first = pixels + pixel * C + c;
      interleave(first, first + C, pairs + pixel * C + 2 * c);
    }
}

template <int C>
void weight_gradient_of_image(const bf16* even, const bf16* odd, const bf16* pairs, float* result,
                              int side) {
  constexpr int T = TILE<C>, B = OUTPUTS<C>;
  const int width = side + 2;
  for (int tap = 0; tap < 9; tap++)
    for (int out = 0; out < C; out += 16 * B)
      for (int in = 0; in < C; in += T) {
        __m512 sum[T][B];
        float* r = result + (tap * C + in) * C + out;
        for (int t = 0; t < T; t++)
          for (int b = 0; b < B; b++) sum[t][b] = _mm512_loadu_ps(r + t * C + b * 16);
        const int right = tap % 3;
        for (int y = 0; y < side; y++) {
          const bf16* row = (right == 1 ? odd : even + right * C) +
                            (size_t)(y + tap / 3) * width * C + in * 2;
          const bf16* g = pairs + (size_t)y * side * C + out * 2;
          for (int x = 0; x < side; x += 2) {
            __m512bh k[B];
            for (int b = 0; b < B; b++)
              k[b] = (__m512bh)_mm512_loadu_si512(g + (size_t)x * C + b * 32);
#pragma GCC unroll 16
            for (int t = 0; t < T; t++) {
              const __m512bh v = pair(row + (size_t)x * C + 2 * t);
#pragma GCC unroll 2
              for (int b = 0; b < B; b++) sum[t][b] = _mm512_dpbf16_ps(sum[t][b], k[b], v);
            }
          }
        }
        for (int t = 0; t < T; t++)
          for (int b = 0; b < B; b++) _mm512_storeu_ps(r + t * C + b * 16, sum[t][b]);
      }
}

// result: [C outputs][9][C inputs], float32.
template <int C>
void weight_gradient(const bf16* x, const bf16* gradient, float* result, int n, int side,
                     int threads) {
  const size_t image = (size_t)side * side * C, size = 9 * C * C;
  std::vector<std::vector<float>> sums(threads, std::vector<float>(size, 0.f));
#pragma omp parallel num_threads(threads)
  {
    const long size_padded = (long)(side + 2) * (side + 2) * C;
    std::vector<bf16> padded(size_padded), even(size_padded), odd(size_padded), pairs(image);
    std::vector<float>& sum = sums[omp_get_thread_num()];
#pragma omp for schedule(static)
    for (int i = 0; i < n; i++) {
      pad<C>(x + i * image, padded.data(), side);
      interleave_rows<C>(padded.data(), even.data(), size_padded / C);
      interleave_rows<C>(padded.data() + C, odd.data(), size_padded / C - 1);
      interleave_rows<C>(gradient + i * image, pairs.data(), (long)side * side);
      weight_gradient_of_image<C>(even.data(), odd.data(), pairs.data(), sum.data(), side);
    }
  }
  for (int tap = 0; tap < 9; tap++)
    for (int in = 0; in < C; in++)
      for (int out = 0; out < C; out++) {
        float total = 0;
        for (int t = 0; t < threads; t++) total += sums[t][(tap * C + in) * C + out];
        result[(out * 9 + tap) * C + in] = total;
      }
}

// ----------------------------------------------------------------------- batch normalisation

struct Rows {
  long begin, end;
};

Rows mine(long rows) {
  const long threads = omp_get_num_threads(), me = omp_get_thread_num();
  return {rows * me / threads, rows * (me + 1) / threads};
}

}  // namespace

extern "C" {

// ReLU(BN(x) * factor + shortcut). Returns nothing; writes out, mean, rstd and running statistics.
// Variances are of differences to the first row, so that a large mean costs no digits.
void normalise(const bf16* x, const bf16* shortcut, bf16* out, const float* weight,
               const float* bias, float* running_mean, float* running_var, float* mean, float* rstd,
               float momentum, float eps, float factor, long rows, int channels, int threads) {
  const int C = channels;
  std::vector<double> sums((size_t)threads * C), squares((size_t)threads * C);
  std::vector<float> scale(C), shift(C), pivot(C);
  for (int c = 0; c < C; c++) pivot[c] = value(x[c]);
#pragma omp parallel num_threads(threads)
  {
    const Rows part = mine(rows);
    const int me = omp_get_thread_num();
    for (int c = 0; c < C; c += 16) {
      const __m512 p = _mm512_loadu_ps(&pivot[c]);
      double* s = &sums[(size_t)me * C + c];
      double* q = &squares[(size_t)me * C + c];
      for (long start = part.begin; start < part.end; start += 1024) {
        const long end = start + 1024 < part.end ? start + 1024 : part.end;
        __m512 sum[4] = {}, square[4] = {};
        long row = start;
        for (; row + 4 <= end; row += 4)
#pragma GCC unroll 4
          for (int k = 0; k < 4; k++) {
            const __m512 d = _mm512_sub_ps(load(x + (row + k) * C + c), p);
            sum[k] = _mm512_add_ps(sum[k], d);
            square[k] = _mm512_fmadd_ps(d, d, square[k]);
          }
        for (; row < end; row++) {
          const __m512 d = _mm512_sub_ps(load(x + row * C + c), p);
          sum[0] = _mm512_add_ps(sum[0], d);
          square[0] = _mm512_fmadd_ps(d, d, square[0]);
        }
        alignas(64) float a[16], b[16];
        _mm512_store_ps(a, (sum[0] + sum[1]) + (sum[2] + sum[3]));
        _mm512_store_ps(b, (square[0] + square[1]) + (square[2] + square[3]));
        for (int k = 0; k < 16; k++) s[k] += a[k], q[k] += b[k];
      }
    }
#pragma omp barrier
#pragma omp single
    for (int c = 0; c < C; c++) {
      double s = 0, q = 0;
      for (int t = 0; t < threads; t++) s += sums[(size_t)t * C + c], q += squares[(size_t)t * C + c];
      const double m = s / rows, variance = std::fmax(0., q / rows - m * m);
      mean[c] = (float)(m + pivot[c]);
      rstd[c] = (float)(1 / std::sqrt(variance + eps));
      running_mean[c] += momentum * (mean[c] - running_mean[c]);
      running_var[c] += momentum * ((float)(variance * rows / (rows - 1)) - running_var[c]);
      scale[c] = weight[c] * rstd[c] * factor;
      shift[c] = (bias[c] - weight[c] * rstd[c] * mean[c]) * factor;
    }
    const __m512 zero = _mm512_setzero_ps();
    for (long row = part.begin; row < part.end; row++)
      for (int c = 0; c < C; c += 16) {
        const size_t at = row * C + c;
        __m512 y = _mm512_fmadd_ps(load(x + at), _mm512_loadu_ps(&scale[c]), _mm512_loadu_ps(&shift[c]));
        if (shortcut) y = _mm512_add_ps(y, load(shortcut + at));
        store(out + at, _mm512_max_ps(y, zero));
      }
  }
}

// of_sum: where the gradient of the sum under the ReLU goes, or null. It may be `gradient` itself.
void normalise_backward(const bf16* gradient, const bf16* out, const bf16* x, bf16* of_sum, bf16* of_x,
                        const float* weight, const float* mean, const float* rstd, float* of_weight,
                        float* of_bias, float factor, long rows, int channels, int threads) {
  const int C = channels;
  std::vector<double> sums((size_t)threads * C), products((size_t)threads * C);
  std::vector<float> by_gradient(C), by_x(C), constant(C);
#pragma omp parallel num_threads(threads)
  {
    const Rows part = mine(rows);
    const int me = omp_get_thread_num();
    const __m512 zero = _mm512_setzero_ps();
    const auto masked = [&](size_t at) {
      const __mmask16 positive = _mm512_cmp_ps_mask(load(out + at), zero, _CMP_GT_OQ);
      return _mm512_maskz_mov_ps(positive, load(gradient + at));
    };
    for (int c = 0; c < C; c += 16) {
      const __m512 m = _mm512_loadu_ps(mean + c);
      double* s = &sums[(size_t)me * C + c];
      double* q = &products[(size_t)me * C + c];
      for (long start = part.begin; start < part.end; start += 1024) {
        const long end = start + 1024 < part.end ? start + 1024 : part.end;
        __m512 sum[2] = {}, product[2] = {};
        for (long row = start; row < end; row++) {
          const size_t at = row * C + c;
          const __m512 d = masked(at);
          sum[row % 2] = _mm512_add_ps(sum[row % 2], d);
          product[row % 2] =
              _mm512_fmadd_ps(d, _mm512_sub_ps(load(x + at), m), product[row % 2]);
        }
        alignas(64) float a[16], b[16];
        _mm512_store_ps(a, sum[0] + sum[1]);
        _mm512_store_ps(b, product[0] + product[1]);
        for (int k = 0; k < 16; k++) s[k] += a[k], q[k] += b[k];
      }
    }
#pragma omp barrier
#pragma omp single
    for (int c = 0; c < C; c++) {
      double s = 0, q = 0;
      for (int t = 0; t < threads; t++) s += sums[(size_t)t * C + c], q += products[(size_t)t * C + c];
      s *= factor, q *= factor;
      of_bias[c] = (float)s;
      of_weight[c] = (float)(q * rstd[c]);
      const double scale = (double)weight[c] * rstd[c], slope = q / rows * rstd[c] * rstd[c];
      by_gradient[c] = (float)(scale * factor);
      by_x[c] = (float)(-scale * slope);
      constant[c] = (float)(scale * (slope * mean[c] - s / rows));
    }
    for (long row = part.begin; row < part.end; row++)
      for (int c = 0; c < C; c += 16) {
        const size_t at = row * C + c;
        const __m512 d = masked(at);
        const __m512 rest = _mm512_fmadd_ps(load(x + at), _mm512_loadu_ps(&by_x[c]), _mm512_loadu_ps(&constant[c]));
        store(of_x + at, _mm512_fmadd_ps(d, _mm512_loadu_ps(&by_gradient[c]), rest));
        if (of_sum) store(of_sum + at, d);
      }
  }
}

// x, out, added: [n, side, side, channels]; added may be null, or `out` itself.
void convolve3x3(const bf16* x, const bf16* weight, int transposed, const bf16* added, bf16* out,
                 int n, int side, int channels, int threads) {
  const auto run = channels == 16 ? convolve<16> : channels == 32 ? convolve<32> : convolve<64>;
  run(x, weight, transposed, added, out, n, side, threads);
}

void weight_gradient3x3(const bf16* x, const bf16* gradient, float* result, int n, int side,
                        int channels, int threads) {
  const auto run = channels == 16   ? weight_gradient<16>
                   : channels == 32 ? weight_gradient<32>
                                    : weight_gradient<64>;
  run(x, gradient, result, n, side, threads);
}
}
