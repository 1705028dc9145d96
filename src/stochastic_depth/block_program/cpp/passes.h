// What is computed outside of the convolutions, and the end of a network. Channels are a multiple of 16.

#pragma once

#include <algorithm>

#include "statistics.h"

constexpr int AHEAD = 2048;  // elements by which a pass over images prefetches

// Calls work(part, first, end) for the rows of all parts, a stretch at a time.
template <class Work>
void in_stretches(long rows, int threads, const Work& work) {
  constexpr long STRETCH = 1024;
  in_parts(rows, threads, [&](int part, long first, long end) {
    for (; first < end; first += STRETCH) work(part, first, std::min(first + STRETCH, end));
  });
}

// Sums of y, [rows, channels].
inline void sum_moments(const stored* y, double* sums, long rows, int channels, int threads) {
  Totals totals(channels, threads);
  in_stretches(rows, threads, [&](int part, long start, long end) {
    for (int c = 0; c < channels; c += LANES) {
      Moments<LANES> moments;
      for (long row = start; row < end; row++) {
        const Floats v[1] = {load(y + row * channels + c)};
        moments.add(row - start, 0, v);
      }
      moments.end(end - start, totals.first(part) + c, totals.second(part) + c);
    }
  });
  totals.over_parts(sums);
}

// x = ReLU(y * scale + shift + shortcut); the shortcut may be null.
inline void activate(const stored* y, const Norm& norm, const stored* shortcut, stored* x,
                     long rows, int channels, int threads) {
  in_parts(rows, threads, [&](int, long first, long end) {
    for (long row = first; row < end; row++)
      for (int c = 0; c < channels; c += LANES) {
        const size_t at = row * channels + c;
        prefetch(y + at + AHEAD, 1);
        Floats sum = load(y + at) * load(norm.scale + c) + load(norm.shift + c);
        if (shortcut) {
          prefetch(shortcut + at + AHEAD, 1);
          sum += load(shortcut + at);
        }
        store(x + at, relu(sum));
      }
  });
}

// Turns the gradient of x, in place, into that of its ReLU's input, and sums it.
inline void activate_backward(stored* gradient, const stored* x, const stored* y, const Norm& norm,
                              double* sums, long rows, int channels, int threads) {
  Totals totals(channels, threads);
  in_stretches(rows, threads, [&](int part, long start, long end) {
    for (int c = 0; c < channels; c += LANES) {
      const Floats m = load(norm.mean + c);
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
        totals.first(part)[c + k] += sum[k];
        totals.second(part)[c + k] += product[k];
      }
    }
  });
  totals.over_parts(sums);
}

// The gradient of y from that of BN(y).
inline void spread(const stored* gradient, const stored* y, const Coefficients& by, stored* of_y,
                   long rows, int channels, int threads) {
  in_parts(rows, threads, [&](int, long first, long end) {
    for (long row = first; row < end; row++)
      for (int c = 0; c < channels; c += LANES) {
        const size_t at = row * channels + c;
        const Floats d = load(y + at) * load(by.by_y + c) + load(by.constant + c);
        store(of_y + at, load(gradient + at) * load(by.by_gradient + c) + d);
      }
  });
}

// Means over 2x2 of x, [2 rows, 2 columns, channels] with the rows of all images, and zeros in the
// channels after them: [rows, columns, out_channels].
inline void pool_and_pad(const stored* x, stored* out, int rows, int columns, int channels,
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

// The gradient of x from that of out.
inline void pool_and_pad_backward(const stored* gradient, stored* of_x, int rows, int columns,
                                  int channels, int out_channels, int threads) {
  const size_t width = 2 * (size_t)columns * channels;
  in_parts(rows, threads, [&](int, int first, int end) {
    for (int row = first; row < end; row++)
      for (int column = 0; column < columns; column++) {
        const stored* from = gradient + ((size_t)row * columns + column) * out_channels;
        stored* to = of_x + 2 * row * width + 2 * column * channels;
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
  float *of_weight, *of_bias;
  int classes;
};

// Of the images of one part.
struct Classified {
  double loss = 0;
  std::vector<float> of_weight, of_bias;
};

// Adds the loss of an image by its share, writes what becomes of `mean`, [channels]: its gradient.
inline void classify(const Linear& layer, float* mean, int channels, int64_t label, float share,
                     float* scores, Classified& total) {
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
  total.loss += share * (double)(log_sum - scores[label]);
  for (int k = 0; k < layer.classes; k++) {
    scores[k] = share * (std::exp(scores[k] - log_sum) - (k == label));
    total.of_bias[k] += scores[k];
  }
  for (int c = 0; c < channels; c += LANES) {
    const Floats m = load(mean + c);
    Floats of_mean{};
    for (int k = 0; k < layer.classes; k++) {
      float* of_weight = &total.of_weight[k * channels + c];
      store(of_weight, load(of_weight) + scores[k] * m);
      of_mean += scores[k] * load(layer.weight + k * channels + c);
    }
    store(mean + c, of_mean);
  }
}

// The mean loss over images x, [n, pixels, channels], and the gradients of all.
inline void classify_images(const stored* x, const Linear& layer, const int64_t* labels,
                            float* loss, stored* gradient, int n, int pixels, int channels,
                            int threads) {
  std::vector<Classified> totals(threads);
  const float share = 1.0f / pixels;
  in_parts(n, threads, [&](int part, int begin, int end) {
    Classified& mine = totals[part];
    mine.of_weight.resize((size_t)layer.classes * channels);
    mine.of_bias.resize(layer.classes);
    std::vector<float> mean(channels), scores(layer.classes);
    for (int i = begin; i < end; i++) {
      const size_t first = (size_t)i * pixels * channels;
      for (int c = 0; c < channels; c += LANES) {
        Floats sum{};
        for (int at = 0; at < pixels; at++) sum += load(x + first + at * channels + c);
        store(&mean[c], sum * share);
      }
      classify(layer, mean.data(), channels, labels[i], 1.0f / n, scores.data(), mine);
      for (int c = 0; c < channels; c += LANES) {
        const Floats each = load(&mean[c]) * share;
        for (int at = 0; at < pixels; at++) store(gradient + first + at * channels + c, each);
      }
    }
  });
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
