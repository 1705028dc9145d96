// The gradients of a convolution of stride 2, from In to Out channels, by vectors of channels. The sides
// of its input are twice the sides of its result.

#pragma once

#include "by_vectors.h"

// The gradient of the weight. For each of the three vertical positions of the taps, one row of the input
// belongs to a row of the result.
template <int In, int Out>
class StridedWeightGradient {
 public:
  explicit StridedWeightGradient(int side)
      : side_(side), rows_(std::max(side, 8 / side * side)), taps_(3 * (size_t)rows_ * side * In) {}

  static int images_at_a_time(int side) { return std::max(1, 8 / side); }

  // As that of WeightGradientByVectors; the side is that of the result.
  template <class Source>
  void add(const Source& input, int image, int images, const factor* pairs, float* result) {
    const int rows = images * side_, width = 2 * side_;
    const size_t first = (size_t)image * width * width;
    for (int down = 0; down < 3; down++) {
      for (int y = 0; y < rows; y++) {
        const bool outside = down == 0 && y % side_ == 0;
        take_row(input, first + (2 * y + down - 1) * width, outside, y);
      }
      for (int right = 0; right < 3; right++)
        add_tap(&taps_[right * rows_ * side_ * In], pairs, result + (3 * down + right) * In * Out,
                rows);
    }
  }

 private:
  // Copies the pixels of a row of the input that each of three neighbouring taps reads, in pairs of lanes.
  template <class Source>
  void take_row(const Source& input, size_t first, bool outside, int y) {
    constexpr int N = Source::CHANNELS;
    const Vector<factor, N> zeros{};
    for (int c = 0; c < In; c += N) {
      const auto read = input.reader(c);
      for (int right = 0; right < 3; right++) {
        factor* to = &taps_[(right * rows_ + y) * side_ * In + c * PER_LANE];
        const auto at = [&](int x) {
          return outside || x < 0 ? zeros : read(first + x);
        };
        for (int x = 0; x < side_; x += PER_LANE, to += In * PER_LANE)
          if constexpr (PER_LANE == 1)
            put(to, at(2 * x + right - 1));
          else
            put(to, paired<N>(at(2 * x + right - 1), at(2 * x + right + 1)));
      }
    }
  }

  void add_tap(const factor* taps, const factor* pairs, float* result, int rows) const {
    constexpr int INPUTS = LANES == 8 ? 4 : 8, V = 2;  // at a time
    const int width = side_ + 2;
    for (int out = 0; out < Out; out += V * LANES)
      for (int in = 0; in < In; in += INPUTS) {
        Floats sum[INPUTS][V];
        float* r = result + in * Out + out;
#pragma GCC unroll 8
        for (int t = 0; t < INPUTS; t++)
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) sum[t][v] = load(r + t * Out + v * LANES);
        for (int y = 0; y < rows; y++) {
          const factor* x = taps + y * side_ * In + in * PER_LANE;
          const factor* g = pairs + (y + y / side_ * 2 + 1) * width * Out + out * PER_LANE;
          for (const factor* end = x + side_ * In; x < end; x += In * PER_LANE, g += Out * PER_LANE) {
            Operand k[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) k[v] = get<Operand>(g + v * LANES * PER_LANE);
#pragma GCC unroll 8
            for (int t = 0; t < INPUTS; t++) {
              const Operand pixel = broadcast(x + t * PER_LANE);
#pragma GCC unroll 2
              for (int v = 0; v < V; v++) sum[t][v] = multiply_add(sum[t][v], k[v], pixel);
            }
          }
        }
#pragma GCC unroll 8
        for (int t = 0; t < INPUTS; t++)
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) store(r + t * Out + v * LANES, sum[t][v]);
      }
  }

  const int side_, rows_;
  Scratch<factor> taps_;  // [3][rows][side / PER_LANE][In][PER_LANE]
};

// The gradient of the input. Two pixels of it that are neighbours in a row are computed from the same
// pixels of the result: the first by the middle tap, and the second by those on both of its sides.
template <int In, int Out>
class StridedInputGradient {
 public:
  explicit StridedInputGradient(int side) : side_(side) {}

  // padded: the gradient of the result in a frame of zeros; taps: as `packed_transposed` returns them;
  // added, out: of the input, [2 side][2 side][In]; the rest as for ConvolutionByVectors.
  template <class Sums, class Ahead>
  void operator()(const factor* padded, const factor* taps, const stored* added, stored* out,
                  Sums& sums, const Ahead& ahead) const {
    constexpr int FEWEST = narrow(Out, 2).pixels;
    if (LANES == 16 && side_ % 8 == 0)
      by<8>(padded, taps, added, out, sums, ahead);
    else
      by<FEWEST>(padded, taps, added, out, sums, ahead);
  }

 private:
  template <int T, class Sums, class Ahead>
  void by(const factor* padded, const factor* taps, const stored* added, stored* out, Sums& sums,
          const Ahead& ahead) const {
    const int width = side_ + 2;
    for (int c = 0; c < In; c += LANES)
      for (int row = 0; row < 2 * side_; row++)
        for (int x = 0; x < side_; x += T) {
          const size_t pixel = (size_t)row * 2 * side_ + 2 * x;
          if (c == 0) ahead(pixel, 2 * T);
          Floats result[2 * T] = {};
          // Even rows are read by the middle tap only, odd rows by the taps above and below it.
          for (int down = row % 2 ? 0 : 1; down < 3; down += 2) {
            const int y = (row + 1 - down) / 2;
            const factor* in = padded + ((y + 1) * width + x + 1) * Out;
            const factor* w = taps + (c / LANES * 9 + 3 * (2 - down)) * Out * LANES;  // in reverse order
            for (int o = 0; o < Out; o += PER_LANE) {
              Operand k[3];
#pragma GCC unroll 3
              for (int right = 0; right < 3; right++)
                k[right] = get<Operand>(w + ((2 - right) * Out + o) * LANES);
#pragma GCC unroll 9
              for (int t = 0; t <= T; t++) {
                const Operand g = broadcast(in + t * Out + o);
                if (t > 0) result[2 * t - 1] = multiply_add(result[2 * t - 1], k[0], g);
                if (t == T) continue;
                result[2 * t] = multiply_add(result[2 * t], k[1], g);
                result[2 * t + 1] = multiply_add(result[2 * t + 1], k[2], g);
              }
            }
          }
          finish<In>(result, pixel, c, added, out, sums);
        }
  }

  const int side_;
};
