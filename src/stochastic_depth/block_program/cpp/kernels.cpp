// Convolution and batch normalisation of residual networks, for any processor: see vectors.h.
//
// Images are [n][side][side][channels] (channels_last), with a multiple of 16 channels. `grad_x` is the
// gradient of the loss with respect to x. The sums of a gradient are the sums over all pixels of a
// mini-batch, float64 [2][channels]: of the gradient d of a ReLU's input, and of d * (y - mean).

#include "convolution.h"
#include "passes.h"

namespace {

// A convolution of C channels; with stride 2 its result has twice as many.
template <int C, int S>
struct Sizes {
  static constexpr int IN = C, OUT = C * S, STRIDE = S;
};

// Calls work(Sizes()) with the sizes as constants; does nothing if there is no kernel for them.
template <class Work>
void with_sizes(int channels, int stride, const Work& work) {
  if (stride == 1 && channels == 16) work(Sizes<16, 1>());
  if (stride == 1 && channels == 32) work(Sizes<32, 1>());
  if (stride == 1 && channels == 64) work(Sizes<64, 1>());
  if (stride == 2 && channels == 16) work(Sizes<16, 2>());
  if (stride == 2 && channels == 32) work(Sizes<32, 2>());
}

constexpr int MOST = Coefficients::MOST;

}  // namespace

extern "C" {

// A 3x3 convolution, and the batch normalisation of its result, y.
struct Layer {
  const stored* weight;  // [out][9][in]
  float* grad_weight;
  Norm norm;
};

// y = conv(x), and the statistics of y. With stride 2 x must be in memory.
void convolve3x3(const Input* x, const Layer* layer, stored* y, int stride, int n, int side,
                 int channels, int threads) {
  with_sizes(channels, stride, [&](auto sizes) {
    constexpr int IN = sizes.IN, OUT = sizes.OUT, STRIDE = sizes.STRIDE;
    const Shape shape{n, side, threads};
    double sums[2 * MOST];
    const auto convolve_from = [&](const auto& source) {
      convolve<IN, OUT, STRIDE>(source, packed<IN, OUT>(layer->weight, IN), y, sums, shape);
    };
    if constexpr (STRIDE == 2)
      convolve_from(Image<IN>{x->x});
    else if (!x->y)
      convolve_from(Image<IN>{x->x});
    else if (!x->x)
      convolve_from(Activated<IN>{x->y, x->norm->scale, x->norm->shift});
    else
      convolve_from(Added<IN>{x->y, x->shortcut, x->norm->scale, x->norm->shift, x->x});
    normalise(layer->norm, sums, shape.strided(STRIDE).rows(), OUT);
  });
}

// Gradients of the layer's parameters and of x, from the gradient of BN(y) and its sums. If x is fused
// (x->y is set), grad_x receives the gradient of the input of x's ReLU, and grad_x_sums its sums.
void convolve3x3_backward(const Input* x, const Layer* layer, const stored* y, const stored* gradient,
                          const double* sums, const stored* added, stored* grad_x, double* grad_x_sums,
                          int stride, int n, int side, int channels, int threads) {
  with_sizes(channels, stride, [&](auto sizes) {
    constexpr int IN = sizes.IN, OUT = sizes.OUT, STRIDE = sizes.STRIDE;
    const Shape shape{n, side, threads};
    const Coefficients by = normalise_backward(layer->norm, sums, shape.strided(STRIDE).rows(), OUT);
    const auto backward = [&](const auto& input, const auto& sums_of) {
      convolve_backward<IN, OUT, STRIDE>(input, Normalised<OUT>{gradient, y, by}, layer->weight,
                                     layer->grad_weight, added, grad_x, sums_of, grad_x_sums, shape);
    };
    if (!x->y) return backward(Image<IN>{x->x}, [](size_t) { return NoSums(); });
    const float *scale = x->norm->scale, *shift = x->norm->shift, *mean = x->norm->mean;
    const auto mask_by_stored = [&](size_t first) {
      const size_t at = first * IN;
      return ReLUGradient<IN, true>{x->x + at, x->y + at, scale, shift, mean};
    };
    const auto mask_by_computed = [&](size_t first) {
      return ReLUGradient<IN, false>{nullptr, x->y + first * IN, scale, shift, mean};
    };
    if (STRIDE == 2 || x->x) return backward(Image<IN>{x->x}, mask_by_stored);
    if constexpr (STRIDE == 1) backward(Activated<IN>{x->y, scale, shift}, mask_by_computed);
  });
}

// The stem: a 3x3 convolution from at most FEW input channels to 16.
void convolve_stem(const stored* images, const Layer* layer, stored* y, int n, int side,
                   int channels, int threads) {
  const Shape shape{n, side, threads};
  double sums[2 * 16];
  convolve<FEW, 16, 1>(Pictures{images, channels}, packed<FEW, 16>(layer->weight, channels), y, sums,
                       shape);
  normalise(layer->norm, sums, shape.rows(), 16);
}

// The gradients of the stem's parameters; nothing needs the gradient of the images.
void convolve_stem_backward(const stored* images, const Layer* layer, const stored* y,
                            const stored* gradient, const double* sums, int n, int side,
                            int channels, int threads) {
  const Shape shape{n, side, threads};
  const Coefficients by = normalise_backward(layer->norm, sums, shape.rows(), 16);
  const Pictures pictures{images, channels};
  const Normalised<16> grad_y{gradient, y, by};
  fused_weight_gradient<FEW, 16, 1>(pictures, grad_y, layer->grad_weight, channels, shape, [&](int) {
    return [&](int i, const factor*) {
      pictures.fetch(shape.after(i), shape.pixels());
      grad_y.fetch(shape.after(i), shape.pixels());
    };
  });
}

// The statistics of a y that PyTorch has convolved; rows are its pixels.
void batch_statistics(const stored* y, const Layer* layer, long rows, int channels, int threads) {
  double sums[2 * MOST];
  sum_moments(y, sums, rows, channels, threads);
  normalise(layer->norm, sums, rows, channels);
}

// The gradients of weight and bias of the normalisation of such a y, and of y, from the gradient of BN(y).
void batch_norm_input_gradient(const stored* y, const Layer* layer, const stored* gradient,
                               const double* sums, stored* grad_y, long rows, int channels,
                               int threads) {
  const Coefficients by = normalise_backward(layer->norm, sums, rows, channels);
  input_gradient(gradient, y, by, grad_y, rows, channels, threads);
}

// Whether there is a kernel for the convolution of images of this side with these channels.
int fits_images(int side, int channels, int stride) {
  bool result = false;
  with_sizes(channels, stride, [&](auto sizes) { result = fits<sizes.IN, sizes.OUT, sizes.STRIDE>(side); });
  return result;
}

// Whether the system lets this process use the registers that the kernels are compiled for.
int permitted() {
#ifdef TILES
  return tiles_permitted();
#else
  return true;
#endif
}

// Whether the operands of a product are rounded to bfloat16.
int rounds_factors() { return sizeof(factor) == 2; }

// Peak throughput: multiply-adds in as many independent chains as keep the processor busy.
// values: [64]. Returns the number of multiplications and additions.
long run_multiply_adds(float* values, long rounds) {
#ifdef TILES
  // Products of zeros are twice as fast: the processor limits the power that tiles take.
  Scratch<factor> numbers(16 * 32);
  for (int at = 0; at < 16 * 32; at++) numbers[at] = 0x3f80 + at % 64;  // from 1 to 1.5
  const Tiles tiles;
  load_tile<A<32>>(numbers.data(), 32);
  load_tile<B<32>>(numbers.data(), 32);
  for (long round = 0; round < rounds; round++) {
    multiply_tiles<32, 0>();
    multiply_tiles<32, 1>();
    multiply_tiles<32, 2>();
    multiply_tiles<32, 3>();
  }
  return rounds * 4 * 2 * 16 * 16 * 32;
#endif
  constexpr int CHAINS = 12;
  Floats sum[CHAINS];
#pragma GCC unroll 12
  for (int k = 0; k < CHAINS; k++) sum[k] = load(values + k);
  const Floats first = load(values);
  for (long round = 0; round < rounds; round++)
#pragma GCC unroll 12
    for (int k = 0; k < CHAINS; k++)
      sum[k] = multiply_add(first, (Operand)sum[k], (Operand)sum[k]);
#pragma GCC unroll 12
  for (int k = 0; k < CHAINS; k++) store(values, load(values) + sum[k]);
  return 2 * rounds * CHAINS * LANES * PER_LANE;
}
}
