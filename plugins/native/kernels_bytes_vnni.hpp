// Integer kernels for the rows of a low-bit copy, its residuals or both, part of kernels_bytes.hpp: four products per
// instruction and lane (AVX-512 VNNI).
#pragma once

// The input of a block: its even and its odd elements.
struct alignas(64) ByteBlock {
  int8_t halves[2][32];
};

constexpr size_t kScaled = 16;  // blocks whose scales are one vector

// An input as bytes: its blocks, then their scales, and the sums of their elements.
struct ByteInput {
  ByteInput() = default;
  ByteInput(const float* room, size_t count)
      : blocks(reinterpret_cast<const ByteBlock*>(room)), scales(reinterpret_cast<const float*>(blocks + count)),
        sums(scales + count) {}

  const ByteBlock* blocks;
  const float *scales, *sums;
};
static_assert(sizeof(ByteBlock) + 2 * sizeof(float) <= kBytesBlock * sizeof(float), "it fits into room");

inline __m512i bytes_of(const void* bytes) { return _mm512_loadu_si512(bytes); }
inline __m256i half_of(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }
inline __m128i quarter_of(const void* bytes) { return _mm_loadu_si128(static_cast<const __m128i*>(bytes)); }

// Two vectors of 32 bytes as one.
inline __m512i together(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_zextsi256_si512(low), high, 1); }

// The 64 elements of a block as bytes, its halves one after the other.
inline __m512i halves_of(const __m128i parts[4]) {
  const __m512i bytes = together(_mm256_set_m128i(parts[1], parts[0]), _mm256_set_m128i(parts[3], parts[2]));
  const __m128i order = _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i split = _mm512_shuffle_epi8(bytes, _mm512_maskz_broadcast_i32x4(0xffff, order));
  return _mm512_maskz_permutexvar_epi64(0xff, _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), split);
}

inline const float* round_to_bytes(const float* x, size_t width, float* room) {
  const size_t blocks = width / kBytesBlock;
  const ByteInput input(room, blocks);
  float *scales = room + (input.scales - room), *sums = room + (input.sums - room);
  for (size_t b = 0; b < blocks; ++b) {
    __m512 in[4], most = _mm512_setzero_ps();
    __mmask16 unordered = 0;
    for (size_t i = 0; i < 4; ++i) {
      in[i] = _mm512_loadu_ps(x + b * kBytesBlock + 16 * i);
      most = _mm512_maskz_max_ps(0xffff, most, _mm512_abs_ps(in[i]));
      unordered |= _mm512_cmp_ps_mask(in[i], in[i], _CMP_UNORD_Q);
    }
    // Rounding would turn a NaN into a number.
    const float peak = unordered == 0 ? _mm512_reduce_max_ps(most) : NAN;
    const __m512 inverse = _mm512_set1_ps(peak > 1e-30f ? kByteMost / peak : 0);
    __m128i bytes[4];
    __m512i total = _mm512_setzero_si512();
    for (size_t i = 0; i < 4; ++i) {
      const __m512i integers = _mm512_maskz_cvtps_epi32(0xffff, _mm512_mul_ps(in[i], inverse));
      total = _mm512_add_epi32(total, integers);
      bytes[i] = _mm512_maskz_cvtepi32_epi8(0xffff, integers);
    }
    _mm512_store_si512(reinterpret_cast<ByteBlock*>(room) + b, halves_of(bytes));
    scales[b] = peak / kByteMost;
    sums[b] = scales[b] * static_cast<float>(_mm512_reduce_add_epi32(total));
  }
  return room;
}

inline __m512i low_halves(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline __m512i high_halves(__m512i bytes) { return low_halves(_mm512_srli_epi16(bytes, 4)); }

// The bits of `a` where the mask has ones, and those of `b` elsewhere.
inline __m512i select_bits(__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }

inline __mmask16 lanes_left(size_t blocks, size_t b) {
  return blocks - b >= 16 ? 0xffff : static_cast<__mmask16>((1u << (blocks - b)) - 1);
}

#include "kernels_bytes_vnni_accumulate.hpp"
#include "kernels_bytes_vnni_project.hpp"
