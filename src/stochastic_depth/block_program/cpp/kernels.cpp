// Convolution and batch normalisation of residual networks, for any processor: see vectors.h.
//
// Images are [n, side, side, channels] (channels_last), with a multiple of 16 channels. A null pointer
// stands for nothing. Sums over the pixels of a mini-batch are float64, [2][channels]. The sums of a
// gradient are those of the gradient of a ReLU's input, d, and of d * (y - mean).

#include "convolution.h"
#include "passes.h"

namespace {

// With stride 2 a convolution has twice as many channels.
template <int C, int STRIDE>
struct Channels {
  static constexpr int IN = C, OUT = C * STRIDE, BY = STRIDE;
};

template <class Work>
void with_channels(int channels, int stride, const Work& work) {
  if (stride == 1 && channels == 16) work(Channels<16, 1>());
  if (stride == 1 && channels == 32) work(Channels<32, 1>());
  if (stride == 1 && channels == 64) work(Channels<64, 1>());
  if (stride == 2 && channels == 16) work(Channels<16, 2>());
  if (stride == 2 && channels == 32) work(Channels<32, 2>());
}

constexpr int MOST = Coefficients::MOST;

}  // namespace

extern "C" {

// A convolution of 3x3, and the batch normalisation of its result, y.
struct Layer {
  const stored* weight;  // [out][9][in]
  float* of_weight;
  Norm norm;
};

// An image x. If y is null, x is in memory. Otherwise x = ReLU(BN(y) + shortcut): it is stored when it
// is first convolved, or, if x is null, computed again whenever it is needed.
struct Input {
  stored* x;
  const stored *y, *shortcut;
  const Norm* norm;
};

// y = conv(x), and its statistics. With stride 2 x must be in memory.
void convolve3x3(const Input* x, const Layer* layer, stored* y, int stride, int n, int side,
                 int channels, int threads) {
  with_channels(channels, stride, [&](auto of) {
    constexpr int IN = of.IN, OUT = of.OUT, BY = of.BY;
    const Shape shape{n, side, threads};
    double sums[2 * MOST];
    const auto convolve_from = [&](const auto& source) {
      convolve<IN, OUT, BY>(source, packed<IN, OUT>(layer->weight, IN), y, sums, shape);
    };
    if constexpr (BY == 2)
      convolve_from(Image<IN>{x->x});
    else if (!x->y)
      convolve_from(Image<IN>{x->x});
    else if (!x->x)
      convolve_from(Activated<IN>{x->y, x->norm->scale, x->norm->shift});
    else
      convolve_from(Added<IN>{x->y, x->shortcut, x->norm->scale, x->norm->shift, x->x});
    normalise(layer->norm, sums, shape.strided(BY).rows(), OUT);
  });
}

// Gradients of the layer's parameters and of x, from the gradient of BN(y) and its sums. If x is
// computed from a y of its own, of_x is the gradient of its ReLU's input, and of_x_sums are its sums.
void convolve3x3_backward(const Input* x, const Layer* layer, const stored* y, const stored* gradient,
                          const double* sums, const stored* added, stored* of_x, double* of_x_sums,
                          int stride, int n, int side, int channels, int threads) {
  with_channels(channels, stride, [&](auto of) {
    constexpr int IN = of.IN, OUT = of.OUT, BY = of.BY;
    const Shape shape{n, side, threads};
    const Coefficients by = normalise_backward(layer->norm, sums, shape.strided(BY).rows(), OUT);
    const auto backward = [&](const auto& input, const auto& sums_of) {
      convolve_backward<IN, OUT, BY>(input, Normalised<OUT>{gradient, y, by}, layer->weight,
                                     layer->of_weight, added, of_x, sums_of, of_x_sums, shape);
    };
    if (!x->y) return backward(Image<IN>{x->x}, [](size_t) { return Unsummed(); });
    const float *scale = x->norm->scale, *shift = x->norm->shift, *mean = x->norm->mean;
    const auto under_stored = [&](size_t first) {
      const size_t at = first * IN;
      return UnderReLU<IN, true>{x->x + at, x->y + at, scale, shift, mean};
    };
    const auto under_computed = [&](size_t first) {
      return UnderReLU<IN, false>{nullptr, x->y + first * IN, scale, shift, mean};
    };
    if (BY == 2 || x->x) return backward(Image<IN>{x->x}, under_stored);
    if constexpr (BY == 1) backward(Activated<IN>{x->y, scale, shift}, under_computed);
  });
}

// The same for 16 channels of images of up to FEW.
void convolve_pictures(const stored* images, const Layer* layer, stored* y, int n, int side,
                       int channels, int threads) {
  const Shape shape{n, side, threads};
  double sums[2 * 16];
  convolve<FEW, 16, 1>(Pictures{images, channels}, packed<FEW, 16>(layer->weight, channels), y, sums,
                       shape);
  normalise(layer->norm, sums, shape.rows(), 16);
}

// The gradient of the images is not wanted.
void convolve_pictures_backward(const stored* images, const Layer* layer, const stored* y,
                                const stored* gradient, const double* sums, int n, int side,
                                int channels, int threads) {
  const Shape shape{n, side, threads};
  const Coefficients by = normalise_backward(layer->norm, sums, shape.rows(), 16);
  const Pictures pictures{images, channels};
  const Normalised<16> of_y{gradient, y, by};
  weigh<FEW, 16, 1>(pictures, of_y, layer->of_weight, channels, shape, [&](int) {
    return [&](int i, const factor*) {
      pictures.fetch(shape.after(i), shape.pixels());
      of_y.fetch(shape.after(i), shape.pixels());
    };
  });
}

// The statistics of a y that PyTorch has convolved; rows are its pixels.
void observe(const stored* y, const Layer* layer, long rows, int channels, int threads) {
  double sums[2 * MOST];
  sum_moments(y, sums, rows, channels, threads);
  normalise(layer->norm, sums, rows, channels);
}

// The gradient of such a y from the gradient of BN(y).
void observe_backward(const stored* y, const Layer* layer, const stored* gradient, const double* sums,
                      stored* of_y, long rows, int channels, int threads) {
  spread(gradient, y, normalise_backward(layer->norm, sums, rows, channels), of_y, rows, channels,
         threads);
}

// Stores an x that no convolution has stored yet.
void complete(const Input* x, long rows, int channels, int threads) {
  activate(x->y, *x->norm, x->shortcut, x->x, rows, channels, threads);
}

// Turns the gradient of x, in place, into that of its ReLU's input, and sums it.
void complete_backward(const Input* x, stored* gradient, double* sums, long rows, int channels,
                       int threads) {
  activate_backward(gradient, x->x, x->y, *x->norm, sums, rows, channels, threads);
}

// The cross entropy of what `layer` makes of the mean over the pixels; gradients of that and of x.
void classify(const stored* x, const Linear* layer, const int64_t* labels, float* loss,
              stored* gradient, int n, int pixels, int channels, int threads) {
  classify_images(x, *layer, labels, loss, gradient, n, pixels, channels, threads);
}

// The means of 2x2 pixels of x; channels that out has in addition are zeros. rows, of all images
// together, and columns are those of out.
void pool(const stored* x, stored* out, int rows, int columns, int channels, int out_channels,
          int threads) {
  pool_and_pad(x, out, rows, columns, channels, out_channels, threads);
}

void pool_backward(const stored* gradient, stored* of_x, int rows, int columns, int channels,
                   int out_channels, int threads) {
  pool_and_pad_backward(gradient, of_x, rows, columns, channels, out_channels, threads);
}

// Whether a convolution of images of this side, with these channels, is written.
int fits_images(int side, int channels, int stride) {
  bool result = false;
  with_channels(channels, stride, [&](auto of) { result = fits<of.IN, of.OUT, of.BY>(side); });
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

// The most that the processor can do: multiply-adds in as many independent chains as keep it busy.
// values: [64]. Returns the number of multiplications and additions.
long multiply(float* values, long rounds) {
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
