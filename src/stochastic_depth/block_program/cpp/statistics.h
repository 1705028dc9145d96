// Batch normalisation, and the two sums over all pixels of a mini-batch that it needs for each channel.
// They are float32 over an image, and float64 over the mini-batch.

#pragma once

#include <cmath>

#include "threads.h"
#include "vectors.h"

// The tensors of a normalisation, each [channels]: BN(y) * factor is y * scale + shift.
struct Norm {
  const float *weight, *bias;
  float *grad_weight, *grad_bias, *running_mean, *running_var, *mean, *rstd, *scale, *shift;
  float momentum, eps, factor;
};

// Computes mean, rstd, scale and shift, and updates the running statistics.
// sums: of y and of y * y over the mini-batch, [2][channels].
inline void normalise(const Norm& norm, const double* sums, long rows, int channels) {
  for (int c = 0; c < channels; c++) {
    const double m = sums[c] / rows, square = sums[channels + c] / rows;
    const double variance = std::fmax(0., square - m * m);
    norm.mean[c] = (float)m;
    norm.rstd[c] = (float)(1 / std::sqrt(variance + norm.eps));
    const float unbiased = (float)(variance * rows / (rows - 1));
    norm.running_mean[c] += norm.momentum * (norm.mean[c] - norm.running_mean[c]);
    norm.running_var[c] += norm.momentum * (unbiased - norm.running_var[c]);
    const float scale = norm.weight[c] * norm.rstd[c];
    norm.scale[c] = scale * norm.factor;
    norm.shift[c] = (norm.bias[c] - scale * norm.mean[c]) * norm.factor;
  }
}

// The gradient of y is gradient * by_gradient + y * by_y + constant.
struct Coefficients {
  static constexpr int MOST = 64;  // channels
  alignas(64) float by_gradient[MOST], by_y[MOST], constant[MOST];
};

// Computes the gradients of weight and bias; returns how to compute the gradient of y.
// sums: of the gradient of BN(y) * factor, and of its product with y - mean, [2][channels].
inline Coefficients normalise_backward(const Norm& norm, const double* sums, long rows,
                                       int channels) {
  Coefficients result;
  for (int c = 0; c < channels; c++) {
    const double s = sums[c] * norm.factor, q = sums[channels + c] * norm.factor;
    const double by_weight = (double)norm.weight[c] * norm.rstd[c];
    const double slope = q / rows * norm.rstd[c] * norm.rstd[c];
    norm.grad_bias[c] = (float)s;
    norm.grad_weight[c] = (float)(q * norm.rstd[c]);
    result.by_gradient[c] = (float)(by_weight * norm.factor);
    result.by_y[c] = (float)(-by_weight * slope);
    result.constant[c] = (float)(by_weight * (slope * norm.mean[c] - s / rows));
  }
  return result;
}

// Two sums for each channel, by parts of the mini-batch: [parts][2][channels].
class PartSums {
 public:
  PartSums(int channels, int parts)
      : channels_(channels), parts_(parts), sums_((size_t)parts * 2 * channels) {}

  double* first(int part) { return &sums_[(size_t)part * 2 * channels_]; }
  double* second(int part) { return first(part) + channels_; }

  // The sums over all parts, [2][channels].
  void add_up(double* result) const {
    for (int at = 0; at < 2 * channels_; at++) {
      result[at] = 0;
      for (int part = 0; part < parts_; part++) result[at] += sums_[(size_t)part * 2 * channels_ + at];
    }
  }

 private:
  const int channels_, parts_;
  std::vector<double> sums_;
};

// The sums of x and of x * x over an image, where x is rounded as it will be stored. It sums the
// differences to the first pixel, so that a large mean does not cost digits of float32.
template <int C>
struct Moments {
  alignas(64) float pivot[C], sum[C] = {}, square[C] = {};

  // result: channels c to c + LANES of T pixels, from this one of the image.
  template <size_t T>
  void add(size_t pixel, int c, const Floats (&result)[T]) {
    if (pixel == 0) store(pivot + c, as_stored(result[0]));
    const Floats p = load(pivot + c);
    Floats s = load(sum + c), q = load(square + c);
#pragma GCC unroll 16
    for (size_t t = 0; t < T; t++) {
      const Floats d = as_stored(result[t]) - p;
      s += d;
      q += d * d;
    }
    store(sum + c, s);
    store(square + c, q);
  }

  void end(size_t pixels, double* sums, double* squares) const {
    for (int c = 0; c < C; c++) {
      const double p = pivot[c], s = sum[c];
      sums[c] += s + pixels * p;
      squares[c] += square[c] + p * (2 * s + pixels * p);
    }
  }
};

// Masks the gradient of x = ReLU(y * scale + shift + shortcut) over an image, which gives the gradient d
// of the ReLU's input, and sums d and d * (y - mean). If x is not stored, there is no shortcut, and x is
// computed again.
template <int C, bool is_stored>
struct ReLUGradient {
  const stored *x, *y;
  const float *scale, *shift, *mean;
  alignas(64) float sum[C] = {}, product[C] = {};

  template <size_t T>
  void add(size_t pixel, int c, Floats (&d)[T]) {
    const Floats m = load(mean + c);
    Floats s = load(sum + c), q = load(product + c);
#pragma GCC unroll 16
    for (size_t t = 0; t < T; t++) {
      const size_t at = (pixel + t) * C + c;
      const Floats v = load(y + at);
      d[t] = where_positive(is_stored ? load(x + at) : v * load(scale + c) + load(shift + c), d[t]);
      s += d[t];
      q += d[t] * (v - m);
    }
    store(sum + c, s);
    store(product + c, q);
  }

  void end(size_t, double* sums, double* products) const {
    for (int c = 0; c < C; c++) {
      sums[c] += sum[c];
      products[c] += product[c];
    }
  }
  void fetch(size_t pixel, size_t count) const { prefetch(y + pixel * C, count * C); }
};

// In place of `ReLUGradient` where x is not the output of a ReLU: no mask and no sums.
struct NoSums {
  template <size_t T>
  void add(size_t, int, const Floats (&)[T]) {}
  void end(size_t, double*, double*) const {}
  void fetch(size_t, size_t) const {}
};

// Finishes T results, channels c to c + LANES of the pixels from `pixel` on: adds `added`, unless it is
// null, adds them to `sums`, and stores them. Inlined, so that the results stay in registers until then.
template <int C, class Sums, size_t T>
[[gnu::always_inline]] inline void finish(Floats (&result)[T], size_t pixel, int c,
                                          const stored* added, stored* out, Sums& sums) {
  if (added)
#pragma GCC unroll 16
    for (size_t t = 0; t < T; t++) result[t] += load(added + (pixel + t) * C + c);
  sums.add(pixel, c, result);
#pragma GCC unroll 16
  for (size_t t = 0; t < T; t++) store(out + (pixel + t) * C + c, result[t]);
}
