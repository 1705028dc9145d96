// Batch normalisation of images whose sums are known.

#pragma once

#include <cmath>

// The tensors of one, each [channels]: BN(y) * factor is y * scale + shift.
struct Norm {
  const float *weight, *bias;
  float *of_weight, *of_bias, *running_mean, *running_var, *mean, *rstd, *scale, *shift;
  float momentum, eps, factor;
};

// sums: of y and of y * y, [2][channels].
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

// sums: of the gradient of BN(y) * factor, and of its product with y - mean.
inline Coefficients normalise_backward(const Norm& norm, const double* sums, long rows,
                                       int channels) {
  Coefficients result;
  for (int c = 0; c < channels; c++) {
    const double s = sums[c] * norm.factor, q = sums[channels + c] * norm.factor;
    const double by_weight = (double)norm.weight[c] * norm.rstd[c];
    const double slope = q / rows * norm.rstd[c] * norm.rstd[c];
    norm.of_bias[c] = (float)s;
    norm.of_weight[c] = (float)(q * norm.rstd[c]);
    result.by_gradient[c] = (float)(by_weight * norm.factor);
    result.by_y[c] = (float)(-by_weight * slope);
    result.constant[c] = (float)(by_weight * (slope * norm.mean[c] - s / rows));
  }
  return result;
}
