// Vectors of floats for the kernels: loads of every weight type, stores, sums and exp. Part of kernels.hpp.
#pragma once

#include <math.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "rows.hpp"

namespace shadowllm {
namespace {

constexpr size_t W = SHADOWLLM_VECTOR_BYTES / sizeof(float);
typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t VI __attribute__((vector_size(4 * W)));
typedef uint32_t VU __attribute__((vector_size(4 * W)));
typedef uint16_t VH __attribute__((vector_size(2 * W)));

template <size_t N>
struct Count {
  static constexpr size_t value = N;
};

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline V splat(float x) { return V{} + x; }

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline VU load_halves(const void* p) {
  VH h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, VU);
}

inline V load(const Bf16* p) { return bits_as<V>(load_halves(p) << 16); }

// The portable form scales the exponent by an exact multiplication, then restores infinities and NaNs.
inline V load(const F16* p) {
#if defined(__AVX512F__)
  __m256i h;
  memcpy(&h, p, sizeof h);
  return (V)_mm512_maskz_cvtph_ps(0xffff, h);  // GCC 12 warns about the plain form
#elif defined(__F16C__)
  __m128i h;
  memcpy(&h, p, sizeof h);
  return (V)_mm256_cvtph_ps(h);
#else
  const VU h = load_halves(p), magnitude = (h & 0x7fff) << 13;
  const VU scaled = bits_as<VU>(bits_as<V>(magnitude) * splat(0x1p112f));
  const VU special = (VU)((h & 0x7c00) == 0x7c00) & 0x7f800000;
  return bits_as<V>(scaled | special | (h & 0x8000) << 16);
#endif
}

inline float load_one(const float* p) { return *p; }
template <class T>
inline float load_one(const T* p) {
  T lanes[W] = {*p};
  return load(lanes)[0];
}

inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }

inline float sum(V v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float lanes[W];
  store(lanes, v);
  for (size_t half = W / 2; half > 0; half /= 2)
    for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

// out = the sums of four vectors, in fewer steps than one after the other.
inline void sums_of_four(V a, V b, V c, V d, float* out) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const auto half = [](V v) {
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  };
#else
  const auto half = [](V v) { return (__m256)v; };
#endif
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}

// exp(x) = 2^n exp(r), |r| <= ln(2)/2, with the Taylor polynomial of degree 7 (remainder 5e-9 relative). The argument
// is clamped so that the result is a normal float. Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the
// low bits.
inline V exponential(V x) {
  x = x > 88.0f ? splat(88.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  const V shifted = x * 1.44269504f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, the first exact in few bits
  V p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const VI power = (bits_as<VI>(shifted) - 0x4b400000 + 127) << 23;
  return p * bits_as<V>(power);
}

}  // namespace
}  // namespace shadowllm
