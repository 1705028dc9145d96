// Convolutions and batch normalisation of a residual block in bfloat16, for AVX512-BF16.
//
// Images are [n, side, side, C] (channels_last) with C a multiple of 16; sums are in float32.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
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

inline __m512 affine(__m512 x, const float* scale, const float* shift) {
  return _mm512_fmadd_ps(x, _mm512_loadu_ps(scale), _mm512_loadu_ps(shift));
}

inline __m512 where_positive(__m512 condition, __m512 v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(condition, _mm512_setzero_ps(), _CMP_GT_OQ), v);
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
// of inputs: weights are packed as [C/16][9][C/2][16 outputs][2 inputs], and a pair of inputs of
// one pixel is broadcast from memory. Each image is copied between borders of zeros first.

template <int C>
constexpr int TILE = C == 16 ? 16 : 8;
template <int C>
constexpr int OUTPUTS = C == 16 ? 1 : 2;

inline __m512bh pair(const bf16* p) {
  int32_t both;
  memcpy(&both, p, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}

// What a convolution reads, sixteen channels of one pixel at a time: an image as it is, or computed
// from others on the way, so that it need not be stored.

struct Image {
  const bf16* x;
  template <int C>
  __m256i at(size_t pixel, int c) const {
    return _mm256_loadu_si256((const __m256i*)(x + pixel * C + c));
  }
};

// ReLU(x * scale + shift)
struct Activated {
  const bf16* x;
  const float *scale, *shift;
  template <int C>
  __m256i at(size_t pixel, int c) const {
    const __m512 y = affine(load(x + pixel * C + c), scale + c, shift + c);
    return (__m256i)_mm512_cvtneps_pbh(_mm512_max_ps(y, _mm512_setzero_ps()));
  }
};

// The gradient of x, from that of BN(x), or of ReLU(BN(x)) if there are scale and shift.
struct Gradient {
  const bf16 *gradient, *x;
  const float *by_gradient, *by_x, *constant, *scale, *shift;
  template <int C>
  __m256i at(size_t pixel, int c) const {
    return element(pixel * C + c, c);
  }
  __m256i element(size_t at, int c) const {
    const __m512 v = load(x + at);
    __m512 d = load(gradient + at);
    if (scale) d = where_positive(affine(v, scale + c, shift + c), d);
    const __m512 rest = affine(v, by_x + c, constant + c);
    return (__m256i)_mm512_cvtneps_pbh(_mm512_fmadd_ps(d, _mm512_loadu_ps(by_gradient + c), rest));
  }
};

// With a border of zeros: [side + 2][side + 2][C].
template <int C, class Source>
void pad(const Source& source, size_t first, bf16* padded, int side) {
  const size_t width = (size_t)(side + 2) * C;
  memset(padded, 0, 2 * width);
  for (int y = 0; y < side; y++) {
    bf16* row = padded + (y + 1) * width;
    memset(row, 0, 2 * C);
    for (int x = 0; x < side; x++)
      for (int c = 0; c < C; c += 16)
        _mm256_storeu_si256((__m256i*)(row + (x + 1) * C + c),
                            source.template at<C>(first + (size_t)y * side + x, c));
    memset(row + (side + 1) * C, 0, 2 * C);
  }
  memset(padded + (side + 1) * width, 0, 2 * width);
}

template <int C>
void convolve_image(const bf16* padded, const bf16* weight, const bf16* added, bf16* out,
                    int side) {
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

template <int C, class Source>
void convolve(const Source& source, const bf16* weight, bf16* out, int n, int side, int threads) {
  const std::vector<bf16> packed = pack<C>(weight, false);
  const size_t pixels = (size_t)side * side;
#pragma omp parallel num_threads(threads)
  {
    std::vector<bf16> padded((size_t)(side + 2) * (side + 2) * C);
#pragma omp for schedule(static)
    for (int i = 0; i < n; i++) {
      pad<C>(source, i * pixels, padded.data(), side);
      convolve_image<C>(padded.data(), packed.data(), nullptr, out + i * pixels * C, side);
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

constexpr int ROWS = 8;  // of an image at a time, so that they stay in the first cache

template <int C>
void weight_gradient_of_image(const bf16* even, const bf16* odd, const bf16* pairs, float* result,
                              int side) {
  constexpr int T = TILE<C>, B = OUTPUTS<C>;
  const int width = side + 2;
  for (int step = 0; step < 9 * ((side + ROWS - 1) / ROWS); step++)
    for (int out = 0; out < C; out += 16 * B)
      for (int in = 0; in < C; in += T) {
        const int top = step / 9 * ROWS, tap = step % 9;
        __m512 sum[T][B];
        float* r = result + (tap * C + in) * C + out;
        for (int t = 0; t < T; t++)
          for (int b = 0; b < B; b++) sum[t][b] = _mm512_loadu_ps(r + t * C + b * 16);
        const int right = tap % 3;
        for (int y = top; y < std::min(top + ROWS, side); y++) {
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

// Both gradients of a convolution of `input`: of_weight [C outputs][9][C inputs] in float32, and
// of_input, if it is not null, with `added` if that is not null.
template <int C, class Input, class Output>
void convolve_backward(const Input& input, const Output& gradient, const bf16* weight,
                       float* of_weight, const bf16* added, bf16* of_input, int n, int side,
                       int threads) {
  const std::vector<bf16> packed = pack<C>(weight, true);
  const size_t pixels = (size_t)side * side, size = 9 * C * C;
  const long padded_pixels = (long)(side + 2) * (side + 2);
  std::vector<std::vector<float>> sums(threads, std::vector<float>(size, 0.f));
#pragma omp parallel num_threads(threads)
  {
    std::vector<bf16> padded(padded_pixels * C), even(padded_pixels * C), odd(padded_pixels * C);
    std::vector<bf16> pairs(pixels * C);
    std::vector<float>& sum = sums[omp_get_thread_num()];
#pragma omp for schedule(static)
    for (int i = 0; i < n; i++) {
      pad<C>(input, i * pixels, padded.data(), side);
      interleave_rows<C>(padded.data(), even.data(), padded_pixels);
      interleave_rows<C>(padded.data() + C, odd.data(), padded_pixels - 1);
      pad<C>(gradient, i * pixels, padded.data(), side);
      for (int y = 0; y < side; y++)
        interleave_rows<C>(padded.data() + ((size_t)(y + 1) * (side + 2) + 1) * C,
                           pairs.data() + (size_t)y * side * C, side);
      weight_gradient_of_image<C>(even.data(), odd.data(), pairs.data(), sum.data(), side);
      if (of_input)
        convolve_image<C>(padded.data(), packed.data(), added ? added + i * pixels * C : nullptr,
                          of_input + i * pixels * C, side);
    }
  }
  for (int tap = 0; tap < 9; tap++)
    for (int in = 0; in < C; in++)
      for (int out = 0; out < C; out++) {
        float total = 0;
        for (int t = 0; t < threads; t++) total += sums[t][(tap * C + in) * C + out];
        of_weight[(out * 9 + tap) * C + in] = total;
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

constexpr long CHUNK = 1024;  // rows that are summed in float32 before float64

void add_to(double* sums, __m512 v) {
  alignas(64) float each[16];
  _mm512_store_ps(each, v);
  for (int k = 0; k < 16; k++) sums[k] += each[k];
}

// Of one channel, over threads.
double total(const std::vector<double>& sums, int channel, int channels) {
  double sum = 0;
  for (size_t at = channel; at < sums.size(); at += channels) sum += sums[at];
  return sum;
}

template <class Work>
void with_channels(int channels, const Work& work) {
  if (channels == 16) work(std::integral_constant<int, 16>());
  if (channels == 32) work(std::integral_constant<int, 32>());
  if (channels == 64) work(std::integral_constant<int, 64>());
}

}  // namespace

extern "C" {

// Statistics of the mini-batch: BN(x) * factor is x * scale + shift. Variances are of differences
// to the first row, so that a large mean costs no digits.
void observe(const bf16* x, const float* weight, const float* bias, float* running_mean,
             float* running_var, float* mean, float* rstd, float* scale, float* shift,
             float momentum, float eps, float factor, long rows, int channels, int threads) {
  const int C = channels;
  std::vector<double> sums((size_t)threads * C), squares((size_t)threads * C);
  std::vector<float> pivot(C);
  for (int c = 0; c < C; c++) pivot[c] = value(x[c]);
#pragma omp parallel num_threads(threads)
  {
    const Rows part = mine(rows);
    const size_t me = omp_get_thread_num();
    for (long start = part.begin; start < part.end; start += CHUNK)
      for (int c = 0; c < C; c += 16) {
        const long end = std::min(start + CHUNK, part.end);
        const __m512 p = _mm512_loadu_ps(&pivot[c]);
        __m512 sum[4] = {}, square[4] = {};
        for (long row = start; row < end; row++) {
          const __m512 d = _mm512_sub_ps(load(x + row * C + c), p);
          sum[row % 4] = _mm512_add_ps(sum[row % 4], d);
          square[row % 4] = _mm512_fmadd_ps(d, d, square[row % 4]);
        }
        add_to(&sums[me * C + c], (sum[0] + sum[1]) + (sum[2] + sum[3]));
        add_to(&squares[me * C + c], (square[0] + square[1]) + (square[2] + square[3]));
      }
  }
  for (int c = 0; c < C; c++) {
    const double m = total(sums, c, C) / rows;
    const double variance = std::fmax(0., total(squares, c, C) / rows - m * m);
    mean[c] = (float)(m + pivot[c]);
    rstd[c] = (float)(1 / std::sqrt(variance + eps));
    running_mean[c] += momentum * (mean[c] - running_mean[c]);
    running_var[c] += momentum * ((float)(variance * rows / (rows - 1)) - running_var[c]);
    scale[c] = weight[c] * rstd[c] * factor;
    shift[c] = (bias[c] - weight[c] * rstd[c] * mean[c]) * factor;
  }
}

// out = ReLU(x * scale + shift + shortcut); shortcut may be null.
void activate(const bf16* x, const float* scale, const float* shift, const bf16* shortcut,
              bf16* out, long rows, int channels, int threads) {
  const int C = channels;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long row = 0; row < rows; row++)
    for (int c = 0; c < C; c += 16) {
      const size_t at = row * C + c;
      __m512 y = affine(load(x + at), scale + c, shift + c);
      if (shortcut) y = _mm512_add_ps(y, load(shortcut + at));
      store(out + at, _mm512_max_ps(y, _mm512_setzero_ps()));
    }
}

// Gradients of weight and bias, and what `Gradient` needs: coefficients [3][channels].
// With `out`, the result of the ReLU, `gradient` becomes that of what is under the ReLU. Without,
// the ReLU is that of x * scale + shift, and `gradient` stays.
void reduce(bf16* gradient, const bf16* out, const bf16* x, const float* weight, const float* mean,
            const float* rstd, const float* scale, const float* shift, float* of_weight,
            float* of_bias, float* coefficients, float factor, long rows, int channels,
            int threads) {
  const int C = channels;
  std::vector<double> sums((size_t)threads * C), products((size_t)threads * C);
#pragma omp parallel num_threads(threads)
  {
    const Rows part = mine(rows);
    const size_t me = omp_get_thread_num();
    for (long start = part.begin; start < part.end; start += CHUNK)
      for (int c = 0; c < C; c += 16) {
        const long end = std::min(start + CHUNK, part.end);
        const __m512 m = _mm512_loadu_ps(mean + c);
        __m512 sum[4] = {}, product[4] = {};
        for (long row = start; row < end; row++) {
          const size_t at = row * C + c;
          const __m512 v = load(x + at);
          const __m512 under = out ? load(out + at) : affine(v, scale + c, shift + c);
          const __m512 d = where_positive(under, load(gradient + at));
          if (out) store(gradient + at, d);
          sum[row % 4] = _mm512_add_ps(sum[row % 4], d);
          product[row % 4] = _mm512_fmadd_ps(d, _mm512_sub_ps(v, m), product[row % 4]);
        }
        add_to(&sums[me * C + c], (sum[0] + sum[1]) + (sum[2] + sum[3]));
        add_to(&products[me * C + c], (product[0] + product[1]) + (product[2] + product[3]));
      }
  }
  for (int c = 0; c < C; c++) {
    const double s = total(sums, c, C) * factor, q = total(products, c, C) * factor;
    const double by_weight = (double)weight[c] * rstd[c], slope = q / rows * rstd[c] * rstd[c];
    of_bias[c] = (float)s;
    of_weight[c] = (float)(q * rstd[c]);
    coefficients[c] = (float)(by_weight * factor);
    coefficients[C + c] = (float)(-by_weight * slope);
    coefficients[2 * C + c] = (float)(by_weight * (slope * mean[c] - s / rows));
  }
}

// The gradient of x, after `reduce`. With scale and shift, the ReLU is that of x * scale + shift.
void spread(const bf16* gradient, const bf16* x, const float* coefficients, const float* scale,
            const float* shift, bf16* of_x, long rows, int channels, int threads) {
  const int C = channels;
  const float *by_x = coefficients + C, *constant = coefficients + 2 * C;
  const Gradient source{gradient, x, coefficients, by_x, constant, scale, shift};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long row = 0; row < rows; row++)
    for (int c = 0; c < C; c += 16)
      _mm256_storeu_si256((__m256i*)(of_x + row * C + c), source.element(row * C + c, c));
}

// x, out: [n, side, side, channels]; with scale and shift the convolution is of ReLU(x * scale +
// shift).
void convolve3x3(const bf16* x, const float* scale, const float* shift, const bf16* weight,
                 bf16* out, int n, int side, int channels, int threads) {
  with_channels(channels, [&](auto count) {
    constexpr int C = decltype(count)::value;
    if (scale)
      convolve<C>(Activated{x, scale, shift}, weight, out, n, side, threads);
    else
      convolve<C>(Image{x}, weight, out, n, side, threads);
  });
}

// Gradients of `convolve3x3`. The gradient of its result is given, or with coefficients (of
// `reduce`) that of a batch normalisation of its result `y`, followed by a ReLU if there are
// y_scale, y_shift.
void convolve3x3_backward(const bf16* x, const float* scale, const float* shift,
                          const bf16* gradient, const bf16* y, const float* coefficients,
                          const float* y_scale, const float* y_shift, const bf16* weight,
                          float* of_weight, const bf16* added, bf16* of_x, int n, int side,
                          int channels, int threads) {
  with_channels(channels, [&](auto count) {
    constexpr int C = decltype(count)::value;
    const auto run = [&](const auto& input, const auto& output) {
      convolve_backward<C>(input, output, weight, of_weight, added, of_x, n, side, threads);
    };
    const auto with_gradient = [&](const auto& input) {
      if (coefficients)
        run(input, Gradient{gradient, y, coefficients, coefficients + C, coefficients + 2 * C,
                            y_scale, y_shift});
      else
        run(input, Image{gradient});
    };
    if (scale)
      with_gradient(Activated{x, scale, shift});
    else
      with_gradient(Image{x});
  });
}
}
