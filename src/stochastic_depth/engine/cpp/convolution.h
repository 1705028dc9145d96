// Convolutions of 3x3 with padding 1 and stride 1 from In to Out channels, and their gradients.
// Images are [n, side, side, channels]; channels are multiples of 16, or FEW; sums are in float32.
//
// The instruction multiplies pairs of bfloat16 and adds to sixteen sums. A pair of one operand is
// broadcast, and multiplied with what three taps need of the other, which is in registers: so there
// is less than half a load for a multiplication, and the processor multiplies all the time.

#pragma once

#include "sources.h"
#include "sums.h"

// ---------------------------------------------------------------------------- one image

// A row of the image between two zeros, which are there already: [side + 2][C].
template <int C, class Source>
void pad_row(const Source& source, size_t first, bf16* padded, int side) {
  for (int c = 0; c < C; c += 16) {
    const auto read = source.reader(c);
    for (int x = 0; x < side; x++) store_bits(padded + (x + 1) * C + c, read(first + x));
  }
}

template <int C>
void pad_row(const Pictures& source, size_t first, bf16* padded, int side) {
  for (int x = 0; x < side; x++)
    _mm_storel_epi64((__m128i*)(padded + (x + 1) * C), source.at(first + x));
}

constexpr int ROWS = 8;  // of an image at a time, so that they stay in the first cache

template <int Out>
constexpr int TILE = Out == 16 ? 16 : 8;  // pixels
template <int Out>
constexpr int OUTPUTS = Out == 16 ? 1 : 2;  // sixteens of output channels

// padded: [side + 2][side + 2][In]; weight: as `packed` gives it; added: null, or as out.
// `ahead(pixel, count)` is called on the way with every part of the image.
template <int In, int Out, class Sums, class Ahead>
void convolve_image(const bf16* padded, const bf16* weight, const bf16* added, bf16* out, int side,
                    Sums& sums, const Ahead& ahead) {
  constexpr int T = TILE<Out>, B = OUTPUTS<Out>;
  const int width = side + 2;
  for (int block = 0; block < Out / 16; block += B)
    for (int y = 0; y < side; y++)
      for (int x = 0; x < side; x += T) {
        const size_t pixel = (size_t)y * side + x;
        if (block == 0) ahead(pixel, T);
        __m512 sum[B][T];
        for (auto& column : sum)
          for (auto& s : column) s = _mm512_setzero_ps();
        for (int down = 0; down < 3; down++) {
          const bf16* in = padded + ((y + down) * width + x) * In;
          const bf16* w = weight + (block * 9 + 3 * down) * In * 16;
          for (int c = 0; c < In / 2; c++) {
            __m512bh k[3][B];
            for (int right = 0; right < 3; right++)
              for (int b = 0; b < B; b++)
                k[right][b] = (__m512bh)_mm512_loadu_si512(w + ((b * 9 + right) * In + 2 * c) * 16);
#pragma GCC unroll 18
            for (int t = 0; t < T + 2; t++) {
              const __m512bh v = pair(in + t * In + 2 * c);
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
          if (added)
            for (int t = 0; t < T; t++)
              sum[b][t] = _mm512_add_ps(sum[b][t], load(added + (pixel + t) * Out + c));
          sums.add(pixel, c, sum[b]);
          for (int t = 0; t < T; t++) store(out + (pixel + t) * Out + c, sum[b][t]);
        }
      }
}

// weight: [Out][9][inputs], as [Out/16][9][In/2][16 outputs][2 inputs].
template <int In, int Out>
std::vector<bf16> packed(const bf16* weight, int inputs) {
  std::vector<bf16> result(9 * In * Out);
  for (int out = 0; out < Out; out++)
    for (int tap = 0; tap < 9; tap++)
      for (int in = 0; in < inputs; in++)
        result[((out / 16 * 9 + tap) * In + in / 2 * 2) * 16 + out % 16 * 2 + in % 2] =
            weight[(out * 9 + tap) * inputs + in];
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
    const auto read = source.reader(c);
    __m512i last = _mm512_setzero_si512();
    for (int x = 0; x < side; x += 2) {
      const __m512i one = apart(read(first + x)), two = apart(read(first + x + 1));
      _mm512_storeu_si512(even + x * C + 2 * c, paired(last, one));
      _mm512_storeu_si512(odd + x * C + 2 * c, paired(one, two));
      last = two;
    }
    _mm512_storeu_si512(even + side * C + 2 * c, last);
  }
}

template <int C>
void pair_row(const Pictures& source, size_t first, bf16* even, bf16* odd, int side) {
  __m128i last = _mm_setzero_si128();
  for (int x = 0; x < side; x += 2) {
    const __m128i one = source.at(first + x), two = source.at(first + x + 1);
    _mm_storeu_si128((__m128i*)(even + x * C), _mm_unpacklo_epi16(last, one));
    _mm_storeu_si128((__m128i*)(odd + x * C), _mm_unpacklo_epi16(one, two));
    last = two;
  }
  _mm_storeu_si128((__m128i*)(even + side * C), _mm_unpacklo_epi16(last, _mm_setzero_si128()));
}

// A row of the gradient, for both uses.
template <int C, class Source>
void pad_and_pair_row(const Source& source, size_t first, bf16* padded, bf16* pairs, int side) {
  for (int c = 0; c < C; c += 16) {
    const auto read = source.reader(c);
    for (int x = 0; x < side; x += 2) {
      const __m256i one = read(first + x), two = read(first + x + 1);
      store_bits(padded + (x + 1) * C + c, one);
      store_bits(padded + (x + 2) * C + c, two);
      _mm512_storeu_si512(pairs + x * C + 2 * c, paired(apart(one), apart(two)));
    }
  }
}

// Adds to result, [9][In][Out].
// even, odd: of ROWS rows of the input, pairs that begin at even and at odd pixels, since taps
// shift them; pairs: of the gradient, from the row above them to the row below.
template <int In, int Out>
void add_weight_gradient(const bf16* even, const bf16* odd, const bf16* pairs, float* result,
                         int side) {
  constexpr int INPUTS = In < 8 ? In : 8;  // at a time
  const int width = side + 2;
  for (int right = 0; right < 3; right++)
    for (int out = 0; out < Out; out += 16)
      for (int in = 0; in < In; in += INPUTS) {
        __m512 sum[INPUTS][3];
        float* r = result + (right * In + in) * Out + out;
        for (int t = 0; t < INPUTS; t++)
          for (int down = 0; down < 3; down++)
            sum[t][down] = _mm512_loadu_ps(r + (3 * down * In + t) * Out);
        for (int y = 0; y < ROWS; y++) {
          const bf16* row = (right == 1 ? odd : even + right * In) + y * width * In + in * 2;
          const bf16* g = pairs + y * side * Out + out * 2;
          for (int x = 0; x < side; x += 2) {
            __m512bh k[3];
            for (int down = 0; down < 3; down++)
              k[down] = (__m512bh)_mm512_loadu_si512(g + ((2 - down) * side + x) * Out);
#pragma GCC unroll 8
            for (int t = 0; t < INPUTS; t++) {
              const __m512bh v = pair(row + x * In + 2 * t);
#pragma GCC unroll 3
              for (int down = 0; down < 3; down++)
                sum[t][down] = _mm512_dpbf16_ps(sum[t][down], k[down], v);
            }
          }
        }
        for (int t = 0; t < INPUTS; t++)
          for (int down = 0; down < 3; down++)
            _mm512_storeu_ps(r + (3 * down * In + t) * Out, sum[t][down]);
      }
}

// ---------------------------------------------------------------------------- a mini-batch

struct Shape {
  int n, side, threads;

  size_t pixels() const { return (size_t)side * side; }
  long rows() const { return n * (long)pixels(); }
  // Where the image after image i begins, which is fetched while that is computed.
  size_t after(int i) const { return (i + 1 < n ? i + 1 : i) * pixels(); }
};

// The convolution of `source`, and the sums of it.
template <int In, int Out, class Source>
void convolve(const Source& source, const std::vector<bf16>& taps, bf16* out, double* sums,
              const Shape& shape) {
  const int side = shape.side, width = side + 2;
  Totals totals(Out, shape.threads);
#pragma omp parallel num_threads(shape.threads)
  {
    std::vector<bf16> padded(width * width * In);
#pragma omp for schedule(static)
    for (int i = 0; i < shape.n; i++) {
      const size_t first = i * shape.pixels(), next = shape.after(i);
      for (int y = 0; y < side; y++)
        pad_row<In>(source, first + y * side, &padded[(y + 1) * width * In], side);
      Moments<Out> of_image;
      convolve_image<In, Out>(padded.data(), taps.data(), nullptr, out + first * Out, side,
                              of_image,
                              [&](size_t at, size_t count) { source.fetch(next + at, count); });
      of_image.end(shape.pixels(), totals.first(), totals.second());
    }
  }
  totals.over_threads(sums);
}

// The gradient of the weight, [Out][9][inputs], from that of the result.
// `also(i, padded)` is called with that of image i between zeros, [side + 2][side + 2][Out].
template <int In, int Out, class Input, class Result, class Also>
void weigh(const Input& input, const Result& gradient, float* of_weight, int inputs,
           const Shape& shape, const Also& also) {
  const int side = shape.side, width = side + 2;
  std::vector<std::vector<float>> of_weights(shape.threads);
#pragma omp parallel num_threads(shape.threads)
  {
    std::vector<bf16> padded(width * width * Out), pairs(width * side * Out);
    std::vector<bf16> even(ROWS * width * In), odd(ROWS * width * In);
    std::vector<float>& mine = of_weights[omp_get_thread_num()];
    mine.resize(9 * In * Out);
#pragma omp for schedule(static)
    for (int i = 0; i < shape.n; i++) {
      const size_t first = i * shape.pixels();
      for (int y = 0; y < side; y++)
        pad_and_pair_row<Out>(gradient, first + y * side, &padded[(y + 1) * width * Out],
                              &pairs[(y + 1) * side * Out], side);
      for (int top = 0; top < side; top += ROWS) {
        for (int y = 0; y < ROWS; y++)
          pair_row<In>(input, first + (top + y) * side, &even[y * width * In], &odd[y * width * In],
                       side);
        add_weight_gradient<In, Out>(even.data(), odd.data(), &pairs[top * side * Out], mine.data(),
                                     side);
      }
      also(i, padded.data());
    }
#pragma omp for schedule(static)
    for (int out = 0; out < Out; out++)
      for (int tap = 0; tap < 9; tap++)
        for (int in = 0; in < inputs; in++) {
          float& total = of_weight[(out * 9 + tap) * inputs + in] = 0;
          for (const auto& each : of_weights)
            if (!each.empty()) total += each[(tap * In + in) * Out + out];
        }
  }
}

// Both gradients of a convolution of `input`: of_weight, and of_input with `added`, if that is not
// null. `sums_of(pixel)` gives what becomes of that of the image that begins there, and its sums.
template <int C, class Input, class Result, class SumsOf>
void convolve_backward(const Input& input, const Result& gradient, const bf16* weight,
                       float* of_weight, const bf16* added, bf16* of_input, const SumsOf& sums_of,
                       double* sums, const Shape& shape) {
  const std::vector<bf16> taps = packed_transposed<C>(weight);
  Totals totals(C, shape.threads);
  weigh<C, C>(input, gradient, of_weight, C, shape, [&](int i, const bf16* padded) {
    const size_t first = i * shape.pixels(), next = shape.after(i);
    auto of_image = sums_of(first);
    convolve_image<C, C>(padded, taps.data(), added ? added + first * C : nullptr,
                         of_input + first * C, shape.side, of_image, [&](size_t at, size_t count) {
                           input.fetch(next + at, count);
                           gradient.fetch(next + at, count);
                           of_image.fetch(next - first + at, count);
                           if (added) prefetch(added + (next + at) * C, count * C);
                         });
    of_image.end(shape.pixels(), totals.first(), totals.second());
  });
  totals.over_threads(sums);
}
