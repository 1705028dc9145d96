// Sixteen channels at a time: bfloat16 in memory, float32 in registers.

#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

inline __m256i load_bits(const bf16* p) { return _mm256_loadu_si256((const __m256i*)p); }

inline void store_bits(bf16* p, __m256i v) { _mm256_storeu_si256((__m256i*)p, v); }

inline __m512 widened(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m256i rounded(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }

inline __m512 load(const bf16* p) { return widened(load_bits(p)); }

inline void store(bf16* p, __m512 v) { store_bits(p, rounded(v)); }

inline __m512 affine(__m512 x, const float* scale, const float* shift) {
  return _mm512_fmadd_ps(x, _mm512_loadu_ps(scale), _mm512_loadu_ps(shift));
}

inline __m512 relu(__m512 x) { return _mm512_max_ps(x, _mm512_setzero_ps()); }

inline __m512 where_positive(__m512 condition, __m512 v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(condition, _mm512_setzero_ps(), _CMP_GT_OQ), v);
}

// Of what has come from a ReLU: where it is positive.
inline __mmask16 not_zero(__m256i bits) { return _mm256_test_epi16_mask(bits, bits); }

// Two neighbours, sixteen times.
inline __m512bh pair(const bf16* p) {
  int32_t both;
  memcpy(&both, p, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}

// Sixteen of them, each in the lower half of 32 bits; and with others in the upper halves.
inline __m512i apart(__m256i bits) { return _mm512_cvtepu16_epi32(bits); }

inline __m512i paired(__m512i low, __m512i high) {
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Assembler, because GCC takes a function that only prefetches for one without effect.
inline void prefetch(const bf16* p, size_t count) {
  for (size_t at = 0; at < count; at += 32) asm volatile("prefetcht0 %0" ::"m"(p[at]));
}

inline void prefetch_to_write(bf16* p, size_t count) {
  for (size_t at = 0; at < count; at += 32) asm volatile("prefetchw %0" ::"m"(p[at]));
}
