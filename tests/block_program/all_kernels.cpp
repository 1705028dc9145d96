// Every function of the kernels, on inputs that are the same everywhere: a line of results for each.

#include <cstdio>

#include "kernels.cpp"

static float drawn() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return (float)(state >> 8) / (1 << 24) - 0.5f;
}

template <class T>
static std::vector<T> values(size_t count, float mean) {
  std::vector<T> result(count);
  for (T& each : result) {
    const float value = mean + drawn();
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if constexpr (sizeof(T) == 4)
      each = value;
    else
      each = bits >> 16;
  }
  return result;
}

template <class T>
static void say(const char* name, const std::vector<T>& result) {
  printf("%s", name);
  for (size_t at = 0; at < result.size(); at += 7) {
    uint32_t bits = 0;
    memcpy(&bits, &result[at], sizeof(T));
    if (sizeof(T) == 2) bits <<= 16;
    float value;
    memcpy(&value, &bits, 4);
    printf(" %.9g", value);
  }
  puts("");
}

int main() {
  if (!permitted()) return 1;
  for (int size : {0, 1, 2, 3, 4, 5}) {
    const int C = 16 << size / 2, side = size % 2 ? 128 / C : C == 16 ? 16 : 8;  // and narrow
    const int n = 5, threads = 2;
    const size_t count = (size_t)n * side * side * C;
    auto y = values<stored>(count, 0), shortcut = values<stored>(count, 0);
    auto gradient = values<stored>(count, 0), x = values<stored>(count, 0), out = x, grad_x = x;
    auto weight = values<stored>(9 * C * C, 0);
    std::vector<float> grad_weight(9 * C * C), v(10 * C, 0.7f);
    const Layer layer{weight.data(), grad_weight.data(),
                      Norm{&v[0], &v[C], &v[2 * C], &v[3 * C], &v[4 * C], &v[5 * C], &v[6 * C],
                           &v[7 * C], &v[8 * C], &v[9 * C], 0.1f, 1e-5f, 1.25f}};
    std::vector<double> sums(2 * C, 0.5), grad_x_sums(2 * C);
    const Input inputs[] = {{x.data(), nullptr, nullptr, nullptr},
                            {nullptr, y.data(), nullptr, &layer.norm},
                            {x.data(), y.data(), shortcut.data(), &layer.norm}};
    for (const Input& input : inputs) {
      convolve3x3(&input, &layer, out.data(), 1, n, side, C, threads);
      say("forward", out);
      convolve3x3_backward(&input, &layer, y.data(), gradient.data(), sums.data(), shortcut.data(),
                           grad_x.data(), grad_x_sums.data(), 1, n, side, C, threads);
      std::vector<float> results(grad_weight);
      results.insert(results.end(), grad_x_sums.begin(), grad_x_sums.end());
      say("backward", results);
    }
    if (C < 64) {
      const int D = 2 * C;
      auto strided_weight = values<stored>(9 * C * D, 0);
      std::vector<float> grad_strided(9 * C * D), u(10 * D, 0.7f);
      const Layer strided{strided_weight.data(), grad_strided.data(),
                          Norm{&u[0], &u[D], &u[2 * D], &u[3 * D], &u[4 * D], &u[5 * D], &u[6 * D],
                               &u[7 * D], &u[8 * D], &u[9 * D], 0.1f, 1e-5f, 1.25f}};
      std::vector<double> strided_sums(2 * D, 0.5);
      auto half = values<stored>(count / 2, 0), grad_half = values<stored>(count / 2, 0);
      convolve3x3(&inputs[2], &strided, half.data(), 2, n, side, C, threads);
      say("strided", half);
      convolve3x3_backward(&inputs[2], &strided, half.data(), grad_half.data(), strided_sums.data(),
                           shortcut.data(), grad_x.data(), grad_x_sums.data(), 2, n, side, C, threads);
      grad_strided.insert(grad_strided.end(), grad_x_sums.begin(), grad_x_sums.end());
      say("strided_backward", grad_strided);
    }
    if (C != 16) continue;
    auto images = values<stored>((size_t)n * side * side * 3, 0);
    convolve_stem(images.data(), &layer, out.data(), n, side, 3, threads);
    say("pictures", out);
    convolve_stem_backward(images.data(), &layer, y.data(), gradient.data(), sums.data(), n,
                               side, 3, threads);
    say("pictures_backward", std::vector<float>(&grad_weight[0], &grad_weight[16 * 9 * 3]));
    batch_statistics(y.data(), &layer, n * side * side, C, threads);
    batch_norm_relu(&inputs[2], n * side * side, C, threads);
    relu_backward(&inputs[2], gradient.data(), sums.data(), n * side * side, C, threads);
    batch_norm_input_gradient(y.data(), &layer, gradient.data(), sums.data(), out.data(), n * side * side, C,
                     threads);
    say("between", out);
    std::vector<float> grad_linear(11 * C), linear = values<float>(11 * C, 0);
    const Linear last{&linear[0], &linear[10 * C], &grad_linear[0], &grad_linear[10 * C], 10};
    const int64_t labels[] = {3, 7, 0, 9, 1};
    float loss;
    classify(x.data(), &last, labels, &loss, out.data(), n, side * side, C, threads);
    grad_linear[10 * C + 10] = loss;
    say("head", grad_linear);
    pool_and_pad(x.data(), out.data(), n * side / 2, side / 2, C, 2 * C, threads);
    pool_and_pad_backward(out.data(), grad_x.data(), n * side / 2, side / 2, C, 2 * C, threads);
    say("pool", grad_x);
  }
}
