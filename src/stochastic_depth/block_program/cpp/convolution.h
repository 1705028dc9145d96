// Convolutions of 3x3 with padding 1 and stride 1 from In to Out channels, and their gradients.
// Images are [n, side, side, channels]; channels are multiples of 16, or FEW; sums are in float32.
//
// Each image is copied into a frame of zeros, as factors that the first caches hold. What normalisation,
// addition and ReLU make of it is computed on the way, so that it need not be read again, or not
// even stored.

#pragma once

#include "statistics.h"

// ---------------------------------------------------------------------------- what is convolved
//
// `reader(c)` gives what reads CHANNELS channels of a pixel from c on; `fetch` is for pixels to come.

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

// x = ReLU(y * scale + shift + shortcut), which is stored as it is read; the shortcut may be null.
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

// The gradient of y from that of BN(y).
template <int C>
struct Normalised {
  static constexpr int CHANNELS = LANES;
  const stored *gradient, *y;
  const Coefficients& by;

  auto reader(int c) const {
    const Floats by_gradient = load(by.by_gradient + c);
    const Floats by_y = load(by.by_y + c), constant = load(by.constant + c);
    return [gradient = gradient + c, y = y + c, by_gradient, by_y, constant](size_t pixel) {
      const Floats of_y = load(y + pixel * C) * by_y + constant;
      return factors(load(gradient + pixel * C) * by_gradient + of_y);
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

// A row of the image between two zeros, which are there already: [side + 2][C].
template <int C, class Source>
void pad_row(const Source& source, size_t first, factor* padded, int side) {
  for (int c = 0; c < C; c += Source::CHANNELS) {
    const auto read = source.reader(c);
    for (int x = 0; x < side; x++) put(padded + (x + 1) * C + c, read(first + x));
  }
}

// ---------------------------------------------------------------------------- one image

// Results that are summed at a time, in registers, and the taps of a row that share the broadcast of
// a pixel.
struct Tile {
  int pixels, vectors, taps;
};
#ifndef TILE
#define TILE {8, 1, 3}
#endif
constexpr Tile tile(int outputs) {
  if (LANES == 16) return outputs == 16 ? Tile{16, 1, 3} : Tile{8, 2, 3};
  if (LANES == 8) return Tile TILE;
  return {4, 4, 1};
}

// padded: [side + 2][side + 2][In]; weight: as `packed` gives it; added: null, or as out.
// `ahead(pixel, count)` is called on the way with every part of the image.
template <int In, int Out, class Sums, class Ahead>
void convolve_image(const factor* padded, const factor* weight, const stored* added, stored* out,
                    int side, Sums& sums, const Ahead& ahead) {
  constexpr int T = tile(Out).pixels, V = tile(Out).vectors, R = tile(Out).taps;
  const int width = side + 2;
  for (int block = 0; block < Out / LANES; block += V)
    for (int y = 0; y < side; y++)
      for (int x = 0; x < side; x += T) {
        const size_t pixel = (size_t)y * side + x;
        if (block == 0) ahead(pixel, T);
        Floats sum[V][T] = {};
        for (int down = 0; down < 3; down++)
          for (int tap = 0; tap < 3; tap += R) {
            const factor* in = padded + ((y + down) * width + x + tap) * In;
            const factor* w = weight + (block * 9 + 3 * down + tap) * In * LANES;
            for (int c = 0; c < In; c += PER_LANE) {
              Operand k[R][V];
#pragma GCC unroll 3
              for (int right = 0; right < R; right++)
#pragma GCC unroll 4
                for (int v = 0; v < V; v++)
                  k[right][v] = get<Operand>(w + ((v * 9 + right) * In + c) * LANES);
#pragma GCC unroll 18
              for (int t = 0; t < T + R - 1; t++) {
                const Operand pixel = broadcast(in + t * In + c);
#pragma GCC unroll 3
                for (int right = 0; right < R; right++) {
                  if (t < right || t >= T + right) continue;
#pragma GCC unroll 4
                  for (int v = 0; v < V; v++)
                    sum[v][t - right] = multiply_add(sum[v][t - right], k[right][v], pixel);
                }
              }
            }
          }
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
          const int c = (block + v) * LANES;
          if (added)
#pragma GCC unroll 16
            for (int t = 0; t < T; t++) sum[v][t] += load(added + (pixel + t) * Out + c);
          sums.add(pixel, c, sum[v]);
#pragma GCC unroll 16
          for (int t = 0; t < T; t++) store(out + (pixel + t) * Out + c, sum[v][t]);
        }
      }
}

// weight: [Out][9][inputs], as [Out/LANES][9][In/PER_LANE][LANES outputs][PER_LANE inputs].
template <int In, int Out>
Scratch<factor> packed(const stored* weight, int inputs) {
  Scratch<factor> result(9 * In * Out);
  factor* to = result.data();
  for (int out = 0; out < Out; out += LANES)
    for (int tap = 0; tap < 9; tap++)
      for (int in = 0; in < In; in += PER_LANE)
        for (int lane = 0; lane < LANES; lane++)
          for (int i = in; i < in + PER_LANE; i++)
            *to++ = i < inputs ? one_factor(weight[((out + lane) * 9 + tap) * inputs + i]) : 0;
  return result;
}

// For the gradient of the input, which is a convolution too: with the taps the other way round, and
// inputs and outputs exchanged.
template <int C>
Scratch<factor> packed_transposed(const stored* weight) {
  Scratch<factor> result(9 * C * C);
  for (int out = 0; out < C; out += LANES)
    for (int tap = 0; tap < 9; tap++)
      for (int in = 0; in < C; in += PER_LANE) {
        factor* to = &result[((out / LANES * 9 + tap) * C + in) * LANES];
        const stored* from = weight + (in * 9 + 8 - tap) * C + out;
        if constexpr (PER_LANE == 1)
          put(to, load_factors(from));
        else
          put(to, paired<LANES>(load_factors(from), load_factors(from + 9 * C)));
      }
  return result;
}

// The gradient of the weight sums over pixels, so that lanes are of PER_LANE neighbouring pixels:
// [pixels/PER_LANE][C][PER_LANE]. With one there is nothing to pair: padded rows are what is wanted.
//
// A row of the input between two zeros: pairs that begin at even pixels and, since taps shift them,
// those that begin at odd ones.
template <int C, class Source>
void pair_row(const Source& source, size_t first, factor* even, factor* odd, int side) {
  if constexpr (PER_LANE == 1) {
    pad_row<C>(source, first, even, side);
  } else {
    constexpr int N = Source::CHANNELS;
    for (int c = 0; c < C; c += N) {
      const auto read = source.reader(c);
      Vector<factor, N> last{};
      for (int x = 0; x < side; x += 2) {
        const auto one = read(first + x), two = read(first + x + 1);
        put(even + x * C + 2 * c, paired<N>(last, one));
        put(odd + x * C + 2 * c, paired<N>(one, two));
        last = two;
      }
      put(even + side * C + 2 * c, paired<N>(last, Vector<factor, N>{}));
    }
  }
}

// A row of the gradient, for both uses. pairs: from its first pixel on, [side][C].
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

template <int C>
constexpr int ROWS = PER_LANE == 1 && C == 16 ? 4 : 8;  // at a time, so that the first cache holds them

// Adds to result, [9][In][Out].
// even, odd: of `rows` rows of the input; pairs: of the gradient, from the row above them to the row
// below, all of them side + 2 pixels wide.
template <int In, int Out>
void add_weight_gradient(const factor* even, const factor* odd, const factor* pairs, float* result,
                         int side) {
  constexpr int INPUTS = In < 8 || LANES == 8 ? 4 : 8;  // at a time
  const int width = side + 2;
  for (int right = 0; right < 3; right++)
    for (int out = 0; out < Out; out += LANES)
      for (int in = 0; in < In; in += INPUTS) {
        Floats sum[INPUTS][3];
        float* r = result + (right * In + in) * Out + out;
#pragma GCC unroll 8
        for (int t = 0; t < INPUTS; t++)
#pragma GCC unroll 3
          for (int down = 0; down < 3; down++) sum[t][down] = load(r + (3 * down * In + t) * Out);
        for (int y = 0; y < ROWS<In>; y++) {
          const factor* row = (right % PER_LANE ? odd : even + right * In) + y * width * In;
          const factor* x = row + in * PER_LANE;
          const factor* g = pairs + y * width * Out + out * PER_LANE;
          for (const factor* end = x + side * In; x < end; x += In * PER_LANE) {
            Operand k[3];
#pragma GCC unroll 3
            for (int down = 0; down < 3; down++) k[down] = get<Operand>(g + (2 - down) * width * Out);
#pragma GCC unroll 8
            for (int t = 0; t < INPUTS; t++) {
              const Operand v = broadcast(x + t * PER_LANE);
#pragma GCC unroll 3
              for (int down = 0; down < 3; down++)
                sum[t][down] = multiply_add(sum[t][down], k[down], v);
            }
            g += Out * PER_LANE;
          }
        }
#pragma GCC unroll 8
        for (int t = 0; t < INPUTS; t++)
#pragma GCC unroll 3
          for (int down = 0; down < 3; down++) store(r + (3 * down * In + t) * Out, sum[t][down]);
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
void convolve(const Source& source, Scratch<factor> taps, stored* out, double* sums,
              const Shape& shape) {
  const int side = shape.side, width = side + 2;
  Totals totals(Out, shape.threads);
#pragma omp parallel num_threads(shape.threads)
  {
    Scratch<factor> padded(width * width * In);
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
  std::vector<Scratch<float>> of_weights(shape.threads);
#pragma omp parallel num_threads(shape.threads)
  {
    Scratch<factor> padded(width * width * Out), even(ROWS<In> * width * In);
    Scratch<factor> odd(PER_LANE == 1 ? 0 : ROWS<In> * width * In);
    Scratch<factor> apart(PER_LANE == 1 ? 0 : width * width * Out);
    factor* pairs = PER_LANE == 1 ? &padded[Out] : apart.data();
    Scratch<float>& mine = of_weights[omp_get_thread_num()] = Scratch<float>(9 * In * Out);
#pragma omp for schedule(static)
    for (int i = 0; i < shape.n; i++) {
      const size_t first = i * shape.pixels();
      for (int y = 0; y < side; y++) {
        const int at = (y + 1) * width * Out;
        pad_and_pair_row<Out>(gradient, first + y * side, &padded[at], pairs + at, side);
      }
      for (int top = 0; top < side; top += ROWS<In>) {
        for (int y = 0; y < ROWS<In>; y++) {
          const int at = y * width * In;
          pair_row<In>(input, first + (top + y) * side, &even[at], odd.data() + at, side);
        }
        add_weight_gradient<In, Out>(even.data(), odd.data(), pairs + top * width * Out,
                                     mine.data(), side);
      }
      also(i, padded.data());
    }
#pragma omp for schedule(static)
    for (int out = 0; out < Out; out++)
      for (int tap = 0; tap < 9; tap++)
        for (int in = 0; in < inputs; in++) {
          float& total = of_weight[(out * 9 + tap) * inputs + in] = 0;
          for (int t = 0; t < omp_get_num_threads(); t++)
            total += of_weights[t][(tap * In + in) * Out + out];
        }
  }
}

// Both gradients of a convolution of `input`: of_weight, and of_input with `added`, if that is not
// null. `sums_of(pixel)` gives what becomes of that of the image that begins there, and its sums.
template <int C, class Input, class Result, class SumsOf>
void convolve_backward(const Input& input, const Result& gradient, const stored* weight,
                       float* of_weight, const stored* added, stored* of_input,
                       const SumsOf& sums_of, double* sums, const Shape& shape) {
  Scratch<factor> taps = packed_transposed<C>(weight);
  Totals totals(C, shape.threads);
  weigh<C, C>(input, gradient, of_weight, C, shape, [&](int i, const factor* padded) {
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
