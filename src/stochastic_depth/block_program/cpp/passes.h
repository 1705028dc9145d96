// The passes over images outside of the convolutions, and the end of a network. Channels are a multiple
// of 16. Functions that are extern "C" are called from Python.

#pragma once

#include <algorithm>

#include "statistics.h"

constexpr int AHEAD = 2048;  // how many elements ahead a pass over images prefetches

// Calls work(part, first, end) for the rows of all parts, some rows at a time.
template <class Work>
void in_chunks(long rows, int threads, const Work& work) {
  constexpr long CHUNK = 1024;
  in_parts(rows, threads, [&](int part, long first, long end) {
    for (; first < end; first += CHUNK) work(part, first, std::min(first + CHUNK, end));
  });
}

// An image x. If y is null, x is in memory. Otherwise x = ReLU(BN(y) + shortcut): it is stored when it
// is first convolved, or, if x is null, computed again whenever it is needed.
struct Input {
  stored* x;
  const stored *y, *shortcut;
  const Norm* norm;
};

// The sums of y and y * y over the rows of y, [rows][channels].
inline void sum_moments(const stored* y, double* sums, long rows, int channels, int threads) {
  PartSums part_sums(channels, threads);
  in_chunks(rows, threads, [&](int part, long start, long end) {
    for (int c = 0; c < channels; c += LANES) {
      Moments<LANES> moments;
      for (long row = start; row < end; row++) {
        const Floats v[1] = {load(y + row * channels + c)};
        moments.add(row - start, 0, v);
      }
      moments.end(end - start, part_sums.first(part) + c, part_sums.second(part) + c);
    }
  });
  part_sums.add_up(sums);
}

// Computes and stores x = ReLU(BN(y) + shortcut); the shortcut may be null.
extern "C" void batch_norm_relu(const Input* input, long rows, int channels, int threads) {
  stored* x = input->x;
  const stored *y = input->y, *shortcut = input->shortcut;
  const float *scale = input->norm->scale, *shift = input->norm->shift;
  in_parts(rows, threads, [&](int, long first, long end) {
    for (long row = first; row < end; row++)
      for (int c = 0; c < channels; c += LANES) {
        const size_t at = row * channels + c;
        prefetch(y + at + AHEAD, 1);
        Floats sum = load(y + at) * load(scale + c) + load(shift + c);
        if (shortcut) {
          prefetch(shortcut + at + AHEAD, 1);
          sum += load(shortcut + at);
        }
        store(x + at, relu(sum));
      }
  });
}

// Masks the gradient of x by its ReLU, in place. sums: of the result d, and of d * (y - mean).
extern "C" void relu_backward(const Input* input, stored* gradient, double* sums, long rows,
                              int channels, int threads) {
  const stored *x = input->x, *y = input->y;
  const float* mean = input->norm->mean;
  PartSums part_sums(channels, threads);
  in_chunks(rows, threads, [&](int part, long start, long end) {
    for (int c = 0; c < channels; c += LANES) {
      const Floats m = load(mean + c);
      Floats sum{}, product{};
      for (long row = start; row < end; row++) {
        const size_t at = row * channels + c;
        for (const stored* each : {(const stored*)gradient, x, y}) prefetch(each + at + AHEAD, 1);
        const Floats d = where_positive(load(x + at), load(gradient + at));
        store(gradient + at, d);
        sum += d;
        product += d * (load(y + at) - m);
      }
      for (int k = 0; k < LANES; k++) {
        part_sums.first(part)[c + k] += sum[k];
        part_sums.second(part)[c + k] += product[k];
      }
    }
  });
  part_sums.add_up(sums);
}

// The gradient of y from the gradient of BN(y).
inline void input_gradient(const stored* gradient, const stored* y, const Coefficients& by,
                           stored* grad_y, long rows, int channels, int threads) {
  in_parts(rows, threads, [&](int, long first, long end) {
    for (long row = first; row < end; row++)
      for (int c = 0; c < channels; c += LANES) {
        const size_t at = row * channels + c;
        const Floats d = load(y + at) * load(by.by_y + c) + load(by.constant + c);
        store(grad_y + at, load(gradient + at) * load(by.by_gradient + c) + d);
      }
  });
}

// out = the means over 2x2 pixels of x, with channels of zeros appended.
// x: [2 * rows][2 * columns][channels]; out: [rows][columns][out_channels]; rows of all images together.
extern "C" void pool_and_pad(const stored* x, stored* out, int rows, int columns, int channels,
                             int out_channels, int threads) {
  const size_t width = 2 * (size_t)columns * channels;
  in_parts(rows, threads, [&](int, int first, int end) {
    for (int row = first; row < end; row++)
      for (int column = 0; column < columns; column++) {
        const stored* from = x + 2 * row * width + 2 * column * channels;
        stored* to = out + ((size_t)row * columns + column) * out_channels;
        for (int c = 0; c < channels; c += LANES) {
          const Floats above = load(from + c) + load(from + c + channels);
          const Floats below = load(from + c + width) + load(from + c + channels + width);
          store(to + c, (above + below) * 0.25f);
        }
        for (int c = channels; c < out_channels; c += LANES) store(to + c, Floats{});
      }
  });
}

// The gradient of x from the gradient of out.
extern "C" void pool_and_pad_backward(const stored* gradient, stored* grad_x, int rows, int columns,
                                      int channels, int out_channels, int threads) {
  const size_t width = 2 * (size_t)columns * channels;
  in_parts(rows, threads, [&](int, int first, int end) {
    for (int row = first; row < end; row++)
      for (int column = 0; column < columns; column++) {
        const stored* from = gradient + ((size_t)row * columns + column) * out_channels;
        stored* to = grad_x + 2 * row * width + 2 * column * channels;
        for (int c = 0; c < channels; c += LANES) {
          const Floats each = load(from + c) * 0.25f;
          for (size_t at : {(size_t)0, (size_t)channels, width, width + channels})
            store(to + at + c, each);
        }
      }
  });
}

// ---------------------------------------------------------------------------- the end of a network
//
// Mean over the pixels, a linear layer, cross entropy.

// weight: [classes][channels]; bias: [classes].
struct Linear {
  const float *weight, *bias;
  float *grad_weight, *grad_bias;
  int classes;
};

// The sums over the images of one part.
struct HeadSums {
  double loss = 0;
  std::vector<float> grad_weight, grad_bias;
};

// Adds the weighted loss of one image and its gradients to `sums`; overwrites `mean`, [channels], with its
// gradient.
inline void classify_image(const Linear& layer, float* mean, int channels, int64_t label,
                           float loss_weight, float* scores, HeadSums& sums) {
  float highest = -INFINITY, sum = 0;
  for (int k = 0; k < layer.classes; k++) {
    Floats product{};
    for (int c = 0; c < channels; c += LANES)
      product += load(mean + c) * load(layer.weight + k * channels + c);
    scores[k] = layer.bias[k];
    for (int lane = 0; lane < LANES; lane++) scores[k] += product[lane];
    highest = std::max(highest, scores[k]);
  }
  for (int k = 0; k < layer.classes; k++) sum += std::exp(scores[k] - highest);
  const float log_sum = highest + std::log(sum);
  sums.loss += loss_weight * (double)(log_sum - scores[label]);
  for (int k = 0; k < layer.classes; k++) {
    scores[k] = loss_weight * (std::exp(scores[k] - log_sum) - (k == label));
    sums.grad_bias[k] += scores[k];
  }
  for (int c = 0; c < channels; c += LANES) {
    const Floats m = load(mean + c);
    Floats grad_mean{};
    for (int k = 0; k < layer.classes; k++) {
      float* grad_weight = &sums.grad_weight[k * channels + c];
      store(grad_weight, load(grad_weight) + scores[k] * m);
      grad_mean += scores[k] * load(layer.weight + k * channels + c);
    }
    store(mean + c, grad_mean);
  }
}

// The mean cross-entropy of `linear` on the mean over the pixels of x, [n][pixels][channels]; writes the
// gradients of the layer and of x.
extern "C" void classify(const stored* x, const Linear* linear, const int64_t* labels, float* loss,
                         stored* gradient, int n, int pixels, int channels, int threads) {
  const Linear& layer = *linear;
  std::vector<HeadSums> part_sums(threads);
  const float pixel_weight = 1.0f / pixels;
  in_parts(n, threads, [&](int part, int begin, int end) {
    HeadSums& mine = part_sums[part];
    mine.grad_weight.resize((size_t)layer.classes * channels);
    mine.grad_bias.resize(layer.classes);
    std::vector<float> mean(channels), scores(layer.classes);
    for (int i = begin; i < end; i++) {
      const size_t first = (size_t)i * pixels * channels;
      for (int c = 0; c < channels; c += LANES) {
        Floats sum{};
        for (int at = 0; at < pixels; at++) sum += load(x + first + at * channels + c);
        store(&mean[c], sum * pixel_weight);
      }
      classify_image(layer, mean.data(), channels, labels[i], 1.0f / n, scores.data(), mine);
      for (int c = 0; c < channels; c += LANES) {
        const Floats each = load(&mean[c]) * pixel_weight;
        for (int at = 0; at < pixels; at++) store(gradient + first + at * channels + c, each);
      }
    }
  });
  double sum = 0;
  std::fill_n(layer.grad_weight, (size_t)layer.classes * channels, 0.0f);
  std::fill_n(layer.grad_bias, layer.classes, 0.0f);
  for (const HeadSums& each : part_sums) {
    sum += each.loss;
    for (size_t at = 0; at < each.grad_weight.size(); at++) layer.grad_weight[at] += each.grad_weight[at];
    for (size_t k = 0; k < each.grad_bias.size(); k++) layer.grad_bias[k] += each.grad_bias[k];
  }
  *loss = (float)sum;
}
