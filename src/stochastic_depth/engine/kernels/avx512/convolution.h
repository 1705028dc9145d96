// Convolutions of 3x3 with padding 1, stride 1 and C channels, C a multiple of 16, and their
// gradients. Images are [n, side, side, C]; sums are in float32.
//
// The instruction multiplies pairs of bfloat16 and adds to sixteen sums. A pair of one operand is
// broadcast, and multiplied with what three taps need of the other, which is in registers: so there
// is less than half a load for a multiplication, and the processor multiplies all the time.

#pragma once

#include "sums.h"

// ---------------------------------------------------------------------------- what is read
//
// Sixteen channels of one pixel at a time: an image as it is, or computed from others on the way,
// so that it need not be stored.

struct Image {
  const bf16* x;

  __m256i at(size_t element, int) const { return load_bits(x + element); }
  void fetch(size_t element, size_t count) const { prefetch(x + element, count); }
};

// ReLU(x * scale + shift)
struct Activated {
  const bf16* x;
  const float *scale, *shift;

  __m256i at(size_t element, int c) const {
    return rounded(relu(affine(load(x + element), scale + c, shift + c)));
  }
  void fetch(size_t element, size_t count) const { prefetch(x + element, count); }
};

// The gradient of x, from that of BN(x), or of ReLU(BN(x)) where BN(x) is x * scale + shift.
template <bool activated>
struct Gradient {
  const bf16 *gradient, *x;
  const float *by_gradient, *by_x, *constant, *scale, *shift;

  __m256i at(size_t element, int c) const {
    const __m512 v = load(x + element);
    __m512 d = load(gradient + element);
    if (activated) d = where_positive(affine(v, scale + c, shift + c), d);
    return rounded(
        _mm512_fmadd_ps(d, _mm512_loadu_ps(by_gradient + c), affine(v, by_x + c, constant + c)));
  }
  void fetch(size_t element, size_t count) const {
    prefetch(x + element, count);
    prefetch(gradient + element, count);
  }
};

// A row of the image between two zeros, which are there already: [side + 2][C].
template <int C, class Source>
void pad_row(const Source& source, size_t first, bf16* padded, int side) {
  for (int x = 0; x < side; x++)
    for (int c = 0; c < C; c += 16)
      store_bits(padded + (x + 1) * C + c, source.at((first + x) * C + c, c));
}

// ---------------------------------------------------------------------------- one image

template <int C>
constexpr int TILE = C == 16 ? 16 : 8;  // pixels
template <int C>
constexpr int OUTPUTS = C == 16 ? 1 : 2;  // sixteens of output channels

// padded: [side + 2][side + 2][C]; weight: as `packed` gives it; added: null, or as out.
// `ahead(element, count)` is called on the way with every part of the image.
template <int C, class Sums, class Ahead>
void convolve_image(const bf16* padded, const bf16* weight, const bf16* added, bf16* out, int side,
                    Sums& sums, const Ahead& ahead) {
  constexpr int T = TILE<C>, B = OUTPUTS<C>;
  const int width = side + 2;
  for (int block = 0; block < C / 16; block += B)
    for (int y = 0; y < side; y++)
      for (int x = 0; x < side; x += T) {
        const size_t pixel = (size_t)y * side + x;
        if (block == 0) ahead(pixel * C, T * C);
        __m512 sum[B][T];
        for (auto& column : sum)
          for (auto& s : column) s = _mm512_setzero_ps();
        for (int down = 0; down < 3; down++) {
          const bf16* in = padded + ((y + down) * width + x) * C;
          const bf16* w = weight + (block * 9 + 3 * down) * C * 16;
          for (int c = 0; c < C / 2; c++) {
            __m512bh k[3][B];
            for (int right = 0; right < 3; right++)
              for (int b = 0; b < B; b++)
                k[right][b] = (__m512bh)_mm512_loadu_si512(w + ((b * 9 + right) * C + 2 * c) * 16);
#pragma GCC unroll 18
            for (int t = 0; t < T + 2; t++) {
              const __m512bh v = pair(in + t * C + 2 * c);
#pragma GCC unroll 3
              for (int right = 0; right < 3; right++) {
                if (t < right || t >= T + right) continue;
#pragma GCC unroll 2
                for (int b = 0; b < B; b++)
                  sum[b][t - right] = _mm512_dpbf16_ps(sum[b][t - right], k[right][b], v);
              }
            }
          }
        }
        for (int b = 0; b < B; b++) {
          const int c = (block + b) * 16;
          for (int t = 0; t < T; t++) {
            const size_t at = (pixel + t) * C + c;
            if (added) sum[b][t] = _mm512_add_ps(sum[b][t], load(added + at));
            const __m256i bits = rounded(sum[b][t]);
            store_bits(out + at, bits);
            sum[b][t] = widened(bits);
          }
          sums.add(pixel, c, sum[b]);
        }
      }
}

// weight: [C outputs][9][C inputs], as [C/16][9][C/2][16 outputs][2 inputs].
template <int C>
std::vector<bf16> packed(const bf16* weight) {
  std::vector<bf16> result(9 * C * C);
  for (int out = 0; out < C; out++)
    for (int tap = 0; tap < 9; tap++)
      for (int in = 0; in < C; in += 2)
        memcpy(&result[((out / 16 * 9 + tap) * C + in) * 16 + out % 16 * 2],
               weight + (out * 9 + tap) * C + in, 4);
  return result;
}

// For the gradient of the input, which is a convolution too: with the taps the other way round, and
// inputs and outputs exchanged.
template <int C>
std::vector<bf16> packed_transposed(const bf16* weight) {
  std::vector<bf16> result(9 * C * C);
  for (int out = 0; out < C; out += 16)
    for (int tap = 0; tap < 9; tap++)
      for (int in = 0; in < C; in += 2) {
        const bf16* first = weight + (in * 9 + 8 - tap) * C + out;
        _mm512_storeu_si512(&result[((out / 16 * 9 + tap) * C + in) * 16],
                            paired(apart(load_bits(first)), apart(load_bits(first + 9 * C))));
      }
  return result;
}

// The gradient of the weight sums over pixels, so pairs are of neighbouring pixels: [pairs][C][2].
//
// A row of the input between two zeros: pairs that begin at even pixels and, since taps shift them,
// those that begin at odd ones.
template <int C, class Source>
void pair_row(const Source& source, size_t first, bf16* even, bf16* odd, int side) {
  for (int c = 0; c < C; c += 16) {
    __m512i last = _mm512_setzero_si512();
    for (int x = 0; x < side; x += 2) {
      const __m512i one = apart(source.at((first + x) * C + c, c));
      const __m512i two = apart(source.at((first + x + 1) * C + c, c));
      _mm512_storeu_si512(even + x * C + 2 * c, paired(last, one));
      _mm512_storeu_si512(odd + x * C + 2 * c, paired(one, two));
      last = two;
    }
    _mm512_storeu_si512(even + side * C + 2 * c, last);
  }
}

// A row of the gradient, for both uses.
template <int C, class Source>
void pad_and_pair_row(const Source& source, size_t first, bf16* padded, bf16* pairs, int side) {
  for (int x = 0; x < side; x += 2)
    for (int c = 0; c < C; c += 16) {
      const __m256i one = source.at((first + x) * C + c, c);
      const __m256i two = source.at((first + x + 1) * C + c, c);
      store_bits(padded + (x + 1) * C + c, one);
      store_bits(padded + (x + 2) * C + c, two);
      _mm512_storeu_si512(pairs + x * C + 2 * c, paired(apart(one), apart(two)));
    }
}

constexpr int ROWS = 8;    // of an image at a time, so that they stay in the first cache
constexpr int INPUTS = 8;  // channels

// Adds to result, [9][C inputs][C outputs].
// even, odd: of ROWS rows of the input, pairs that begin at even and at odd pixels, since taps
// shift them; pairs: of the gradient, from the row above them to the row below.
template <int C>
void add_weight_gradient(const bf16* even, const bf16* odd, const bf16* pairs, float* result,
                         int side) {
  const int width = side + 2;
  for (int right = 0; right < 3; right++)
    for (int out = 0; out < C; out += 16)
      for (int in = 0; in < C; in += INPUTS) {
        __m512 sum[INPUTS][3];
        float* r = result + (right * C + in) * C + out;
        for (int t = 0; t < INPUTS; t++)
          for (int down = 0; down < 3; down++)
            sum[t][down] = _mm512_loadu_ps(r + (3 * down * C + t) * C);
        for (int y = 0; y < ROWS; y++) {
          const bf16* row = (right == 1 ? odd : even + right * C) + y * width * C + in * 2;
          const bf16* g = pairs + y * side * C + out * 2;
          for (int x = 0; x < side; x += 2) {
            __m512bh k[3];
            for (int down = 0; down < 3; down++)
              k[down] = (__m512bh)_mm512_loadu_si512(g + ((2 - down) * side + x) * C);
#pragma GCC unroll 8
            for (int t = 0; t < INPUTS; t++) {
              const __m512bh v = pair(row + x * C + 2 * t);
#pragma GCC unroll 3
              for (int down = 0; down < 3; down++)
                sum[t][down] = _mm512_dpbf16_ps(sum[t][down], k[down], v);
            }
          }
        }
        for (int t = 0; t < INPUTS; t++)
          for (int down = 0; down < 3; down++)
            _mm512_storeu_ps(r + (3 * down * C + t) * C, sum[t][down]);
      }
}

// ---------------------------------------------------------------------------- a mini-batch

// `sums_of(pixel)` gives what to sum of the image that begins there. While one image is computed,
// the next is fetched.
template <int C, class Source, class SumsOf>
void convolve(const Source& source, const bf16* weight, bf16* out, const SumsOf& sums_of,
              double* sums, int n, int side, int threads) {
  const std::vector<bf16> taps = packed<C>(weight);
  const int width = side + 2;
  const size_t pixels = (size_t)side * side;
  Totals totals(C, threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<bf16> padded(width * width * C);
#pragma omp for schedule(static)
    for (int i = 0; i < n; i++) {
      const size_t first = i * pixels, next = (i + 1 < n ? i + 1 : i) * pixels * C;
      for (int y = 0; y < side; y++)
        pad_row<C>(source, first + y * side, &padded[(y + 1) * width * C], side);
      auto of_image = sums_of(first);
      convolve_image<C>(padded.data(), taps.data(), nullptr, out + first * C, side, of_image,
                        [&](size_t at, size_t count) { source.fetch(next + at, count); });
      of_image.end(pixels, totals.first(), totals.second());
    }
  }
  totals.over_threads(sums);
}

// Both gradients of a convolution of `input` from that of its result: of_weight [C outputs][9][C
// inputs] in float32, and of_input with `added`, if that is not null.
template <int C, class Input, class Output, class SumsOf>
void convolve_backward(const Input& input, const Output& gradient, const bf16* weight,
                       float* of_weight, const bf16* added, bf16* of_input, const SumsOf& sums_of,
                       double* sums, int n, int side, int threads) {
  const std::vector<bf16> taps = packed_transposed<C>(weight);
  const int width = side + 2;
  const size_t pixels = (size_t)side * side;
  Totals totals(C, threads);
  std::vector<std::vector<float>> of_weights(threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<bf16> padded(width * width * C), pairs(width * side * C);
    std::vector<bf16> even(ROWS * width * C), odd(ROWS * width * C);
    std::vector<float>& mine = of_weights[omp_get_thread_num()];
    mine.resize(9 * C * C);
#pragma omp for schedule(static)
    for (int i = 0; i < n; i++) {
      const size_t first = i * pixels, next = (i + 1 < n ? i + 1 : i) * pixels * C;
      for (int y = 0; y < side; y++) {
        bf16 *in = &padded[(y + 1) * width * C], *in_pairs = &pairs[(y + 1) * side * C];
        pad_and_pair_row<C>(gradient, first + y * side, in, in_pairs, side);
      }
      for (int top = 0; top < side; top += ROWS) {
        for (int y = 0; y < ROWS; y++)
          pair_row<C>(input, first + (top + y) * side, &even[y * width * C], &odd[y * width * C],
                      side);
        add_weight_gradient<C>(even.data(), odd.data(), &pairs[top * side * C], mine.data(), side);
      }
      const auto ahead = [&](size_t at, size_t count) {
        input.fetch(next + at, count);
        gradient.fetch(next + at, count);
        if (added) prefetch(added + next + at, count);
      };
      auto of_image = sums_of(first);
      convolve_image<C>(padded.data(), taps.data(), added ? added + first * C : nullptr,
                        of_input + first * C, side, of_image, ahead);
      of_image.end(pixels, totals.first(), totals.second());
    }
#pragma omp for schedule(static)
    for (int out = 0; out < C; out++)
      for (int at = 0; at < 9 * C; at++) {
        float& total = of_weight[out * 9 * C + at] = 0;
        for (const auto& each : of_weights)
          if (!each.empty()) total += each[at * C + out];
      }
  }
  totals.over_threads(sums);
}
