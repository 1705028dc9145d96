// Vectors of channels, as wide as the processor's registers, in the compiler's own vector types.
//
// `stored` is the type in which images lie in memory: bfloat16, or float32 if FLOAT32 is defined.
// `factor` is the type of the operands of a product, whose sums are always float32. Where the
// processor can sum products of pairs of bfloat16, a factor is bfloat16, and a lane of 32 bits holds
// PER_LANE = 2 of them; otherwise a factor is float32. Macros, which tests define by hand too:
// PAIRS: products of pairs; emulated where the processor has no instruction for them.
// TILES: products of matrices of pairs; see tiles.h.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512BF16__) && !defined(FLOAT32)
#include <immintrin.h>
#if defined(__AMX_BF16__) && !defined(PAIRS) && !defined(LANES)
#define TILES
#endif
#define PAIRS
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && !defined(FLOAT32)
#include <arm_neon.h>
#define PAIRS
#endif

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

using bf16 = uint16_t;
#ifdef FLOAT32
using stored = float;
#else
using stored = bf16;
#endif
#ifdef PAIRS
using factor = bf16;
#else
using factor = float;
#endif
constexpr int PER_LANE = 4 / sizeof(factor);

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N = LANES>
using Vector = typename VectorOf<T, N>::type;
using Floats = Vector<float>;
using Lanes = Vector<uint32_t>;

// Load from and store to memory that is aligned for its elements only.
template <class V, class T>
V get(const T* p) {
  typedef V Unaligned __attribute__((aligned(alignof(T)), may_alias));
  return *(const Unaligned*)p;
}

template <class V, class T>
void put(T* p, V v) {
  typedef V Unaligned __attribute__((aligned(alignof(T)), may_alias));
  *(Unaligned*)p = v;
}

template <class To, class V>
To convert(V v) {
  return __builtin_convertvector(v, To);
}

// ---------------------------------------------------------------------------- bfloat16 and float32

inline Floats widened(Vector<bf16> bits) { return (Floats)(convert<Lanes>(bits) << 16); }

// Round to nearest, ties to even; quiet NaNs survive.
inline Vector<bf16> narrowed(Floats v) {
#if defined(__AVX512BF16__) && !defined(FLOAT32) && LANES == 16
  return (Vector<bf16>)_mm512_cvtneps_pbh((__m512)v);
#else
  const Lanes bits = (Lanes)v;
  return convert<Vector<bf16>>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

inline Floats load(const float* p) { return get<Floats>(p); }
inline Floats load(const bf16* p) { return widened(get<Vector<bf16>>(p)); }
inline void store(float* p, Floats v) { put(p, v); }
inline void store(bf16* p, Floats v) { put(p, narrowed(v)); }

// The value that is read back after v has been stored.
inline Floats as_stored(Floats v) {
  if constexpr (sizeof(stored) == 4) return v;
  return widened(narrowed(v));
}

// NaN propagates, so that it reaches the loss.
inline Floats relu(Floats v) { return v < 0 ? Floats{} : v; }
inline Floats where_positive(Floats condition, Floats v) { return condition <= 0 ? Floats{} : v; }

// Fetch memory into the cache, to be read or to be written. GCC removes calls of a function that does
// nothing but prefetch; the empty instruction prevents that.
inline void prefetch(const stored* p, size_t count) {
  for (size_t at = 0; at < count; at += 64 / sizeof(stored)) __builtin_prefetch(p + at);
  asm volatile("");
}
inline void prefetch_to_write(stored* p, size_t count) {
  for (size_t at = 0; at < count; at += 64 / sizeof(stored)) __builtin_prefetch(p + at, 1);
  asm volatile("");
}

// ---------------------------------------------------------------------------- factors

using Factors = Vector<factor>;

inline Factors factors(Floats v) {
#ifdef PAIRS
  return narrowed(v);
#else
  return v;
#endif
}

inline Factors load_factors(const stored* p) {
#ifdef PAIRS
  return get<Factors>(p);
#else
  return load(p);
#endif
}

inline factor one_factor(stored value) {
  if constexpr (sizeof(stored) == sizeof(factor)) return value;
  const uint32_t bits = (uint32_t)value << 16;
  return get<factor>(&bits);
}

// An operand of `multiply_add`, lane by lane; `broadcast` copies one lane into all of them.
#ifdef PAIRS
using Operand = Lanes;
inline Operand broadcast(const factor* p) { return get<uint32_t>(p) - Operand{}; }
#else
using Operand = Floats;
inline Operand broadcast(const factor* p) { return *p - Operand{}; }
#endif

// The factors of two pixels, channel by channel, side by side in a lane.
template <int N>
Vector<uint32_t, N> paired(Vector<factor, N> one, Vector<factor, N> two) {
  using Wide = Vector<uint32_t, N>;
  return convert<Wide>(one) | convert<Wide>(two) << 16;
}

inline Floats multiply_add(Floats sum, Operand a, Operand b) {
#if defined(PAIRS) && defined(__AVX512BF16__) && LANES == 16
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#elif defined(PAIRS) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (Floats)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
#elif defined(PAIRS)
  const Floats low = sum + (Floats)(a << 16) * (Floats)(b << 16);
  return low + (Floats)(a & 0xffff0000) * (Floats)(b & 0xffff0000);
#else
  return sum + a * b;
#endif
}

// Zeroed memory that begins on a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(size_t count = 0) : lines_(count * sizeof(T) / 64 + 1) {}
  T* data() { return lines_[0].values; }
  T& operator[](size_t at) { return data()[at]; }

 private:
  struct alignas(64) Line {
    T values[64 / sizeof(T)];
  };
  std::vector<Line> lines_;
};
