// The end of a network: mean over the pixels, a linear layer, cross entropy.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "bfloat16.h"

// weight: [classes][channels]; bias: [classes].
struct Linear {
  const float *weight, *bias;
  float *of_weight, *of_bias;
  int classes;
};

// Of one thread's images.
struct Classified {
  double loss = 0;
  std::vector<float> of_weight, of_bias;
};

// Adds the loss of an image by its share, writes what becomes of `mean`, [channels]: its gradient.
inline void classify(const Linear& layer, float* mean, int channels, int64_t label, float share,
                     float* scores, Classified& total) {
  float highest = -INFINITY, sum = 0;
  for (int k = 0; k < layer.classes; k++) {
    __m512 product = _mm512_setzero_ps();
    for (int c = 0; c < channels; c += 16)
      product = _mm512_fmadd_ps(_mm512_loadu_ps(mean + c),
                                _mm512_loadu_ps(layer.weight + k * channels + c), product);
    scores[k] = layer.bias[k] + _mm512_reduce_add_ps(product);
    highest = std::max(highest, scores[k]);
  }
  for (int k = 0; k < layer.classes; k++) sum += std::exp(scores[k] - highest);
  const float log_sum = highest + std::log(sum);
  total.loss += share * (double)(log_sum - scores[label]);
  for (int k = 0; k < layer.classes; k++) {
    scores[k] = share * (std::exp(scores[k] - log_sum) - (k == label));
    total.of_bias[k] += scores[k];
  }
  for (int c = 0; c < channels; c += 16) {
    const __m512 m = _mm512_loadu_ps(mean + c);
    __m512 of_mean = _mm512_setzero_ps();
    for (int k = 0; k < layer.classes; k++) {
      const __m512 d = _mm512_set1_ps(scores[k]);
      const int at = k * channels + c;
      float* of_weight = &total.of_weight[at];
      _mm512_storeu_ps(of_weight, _mm512_fmadd_ps(d, m, _mm512_loadu_ps(of_weight)));
      of_mean = _mm512_fmadd_ps(d, _mm512_loadu_ps(layer.weight + at), of_mean);
    }
    _mm512_storeu_ps(mean + c, of_mean);
  }
}

// The mean loss over images x, [n, pixels, channels], and the gradients of all.
inline void classify_images(const bf16* x, const Linear& layer, const int64_t* labels, float* loss,
                            bf16* gradient, int n, int pixels, int channels, int threads) {
  std::vector<Classified> totals(threads);
  const __m512 share = _mm512_set1_ps(1.0f / pixels);
#pragma omp parallel num_threads(threads)
  {
    Classified& mine = totals[omp_get_thread_num()];
    mine.of_weight.resize((size_t)layer.classes * channels);
    mine.of_bias.resize(layer.classes);
    std::vector<float> mean(channels), scores(layer.classes);
#pragma omp for schedule(static)
    for (int i = 0; i < n; i++) {
      const size_t first = (size_t)i * pixels * channels;
      for (int c = 0; c < channels; c += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int at = 0; at < pixels; at++)
          sum = _mm512_add_ps(sum, load(x + first + at * channels + c));
        _mm512_storeu_ps(&mean[c], _mm512_mul_ps(sum, share));
      }
      classify(layer, mean.data(), channels, labels[i], 1.0f / n, scores.data(), mine);
      for (int c = 0; c < channels; c += 16) {
        const __m256i each = rounded(_mm512_mul_ps(_mm512_loadu_ps(&mean[c]), share));
        for (int at = 0; at < pixels; at++) store_bits(gradient + first + at * channels + c, each);
      }
    }
  }
  double sum = 0;
  std::fill_n(layer.of_weight, (size_t)layer.classes * channels, 0.0f);
  std::fill_n(layer.of_bias, layer.classes, 0.0f);
  for (const Classified& each : totals) {
    sum += each.loss;
    for (size_t at = 0; at < each.of_weight.size(); at++) layer.of_weight[at] += each.of_weight[at];
    for (size_t k = 0; k < each.of_bias.size(); k++) layer.of_bias[k] += each.of_bias[k];
  }
  *loss = (float)sum;
}
