// Sums of rows times factors with AVX-512 VNNI, part of kernels_bytes_vnni.hpp: four rows per instruction.
#pragma once

// Two blocks of a row from block b on, or one and zeros: the bytes at 4 bits per element.
template <class Q, bool both>
inline __m512i load_blocks(const uint8_t* row, size_t b) {
  const uint8_t* from = row + b * kBytesBlock * Q::bits / 8;
  if (Q::bits == 4) return both ? bytes_of(from) : _mm512_zextsi256_si512(half_of(from));
  const __m256i pairs = both ? half_of(from) : _mm256_zextsi128_si256(quarter_of(from));
  const __m512i fours = _mm512_maskz_cvtepu8_epi16(~0u, pairs);
  const __m512i twos = _mm512_and_si512(_mm512_or_si512(fours, _mm512_slli_epi16(fours, 4)), _mm512_set1_epi8(0x0f));
  return _mm512_and_si512(_mm512_or_si512(twos, _mm512_slli_epi16(twos, 2)), _mm512_set1_epi8(0x33));
}

// For the lanes of two blocks, the number of the block among kScaled, from block b on.
inline __m512i lanes_of_blocks(size_t b) {
  const __m512i first = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_add_epi32(first, _mm512_set1_epi32(static_cast<int>(b % kScaled)));
}

// Prefetches two blocks of a group of rows, from block b on. `next` may be null.
template <class Q>
__attribute__((always_inline)) inline void fetch_blocks(const QuantisedRow* next, size_t b) {
  if (next == nullptr) return;
  constexpr size_t bytes = kBytesBlock * Q::bits / 8;
#pragma GCC unroll 16
  for (size_t r = 0; r < kGroup; ++r) fetch_bytes(next[r].data + b * bytes, 2 * bytes);
}

__attribute__((always_inline)) inline void fetch_scales(const QuantisedRow* next, size_t blocks) {
  for (size_t r = 0; next != nullptr && r < kGroup; ++r) fetch_bytes(next[r].scales, blocks * sizeof(uint16_t));
}

// The scales of the blocks of a row from block `first` on that `there` has.
inline __m512 scales_of(const QuantisedRow& row, size_t first, __mmask16 there) {
  const __m256i shorts = _mm256_maskz_loadu_epi16(there, row.shorts() + first);
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, shorts), 16));
}

// The weights of a group for kScaled blocks, one in each lane: h times the scale of the block, rounded to 8 bits
// relative to the largest.
struct ByteWeights {
  __m512i quads[kGroup / 4];  // the bytes of four rows
  __m512i start;              // minus the middle of 4-bit integers times the weights
  __m512 scale;
};

inline ByteWeights round_to_weights(const QuantisedRow* rows, const float* h, size_t first, size_t blocks) {
  const __mmask16 there = lanes_left(blocks, first);
  __m512 exact[kGroup];
  __m512i largest = _mm512_setzero_si512();
  for (size_t r = 0; r < kGroup; ++r) {
    exact[r] = _mm512_mul_ps(_mm512_set1_ps(h[r]), scales_of(rows[r], first, there));
    // Compared as integers, a NaN is larger than any number. Rounding alone would turn it into one.
    largest = _mm512_maskz_max_epi32(0xffff, largest, _mm512_castps_si512(_mm512_abs_ps(exact[r])));
  }
  const __m512 most = _mm512_castsi512_ps(largest);
  const __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_set1_ps(1e-30f), _CMP_GT_OQ);
  const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(kByteMost), most);
  const __m512i ones = _mm512_set1_epi8(1);
  ByteWeights weights;
  __m512i total = _mm512_setzero_si512();
  for (size_t q = 0; q < kGroup / 4; ++q) {
    __m512i bytes = _mm512_setzero_si512();
    for (size_t r = 4; r-- > 0;) {
      const __m512i integers = _mm512_maskz_cvtps_epi32(0xffff, _mm512_mul_ps(exact[4 * q + r], inverse));
      const __m512i others = _mm512_maskz_slli_epi32(0xffff, bytes, 8);
      bytes = _mm512_mask_blend_epi8(0x1111111111111111, others, integers);
    }
    weights.quads[q] = bytes;
    total = _mm512_dpbusd_epi32(total, ones, bytes);
  }
  weights.start = _mm512_mullo_epi32(total, _mm512_set1_epi32(-8));
  weights.scale = _mm512_mul_ps(most, _mm512_set1_ps(1 / kByteMost));
  return weights;
}

// sum += products of four unsigned and four signed bytes in each lane, as _mm512_dpbusd_epi32 does. With the intrinsic,
// GCC copies each of many sums to another register and back.
inline void add_products(__m512i& sum, __m512i bytes, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(weights));
}

// Adds half of the bytes of two blocks from block b on, or of one, of a group of rows to the sums of M tokens. Sums are
// in the order of interleave_half: vector 2 j is of the even elements, the next one of the odd ones.
template <class Q, size_t M, bool half, bool both>
inline void accumulate_half(const QuantisedRow* rows, const ByteWeights* weights, size_t b, float* const* sums) {
  const __m512i lanes = lanes_of_blocks(b);
  __m512i totals[M][4];
#pragma GCC unroll 4
  for (size_t t = 0; t < M; ++t) {
    const __m512i start = _mm512_maskz_permutexvar_epi32(0xffff, lanes, weights[t].start);
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) totals[t][i] = Q::bits == 2 ? _mm512_maskz_srai_epi32(0xffff, start, 2) : start;
  }
#pragma GCC unroll 1
  for (size_t q = 0; q < kGroup / 4; ++q) {
    __m512i bytes[4], mixed[2];
    for (size_t r = 0; r < 4; ++r) bytes[r] = load_blocks<Q, both>(rows[4 * q + r].data, b);
    interleave_half<half>(bytes, mixed);
    const __m512i parts[4] = {low_halves(mixed[0]), high_halves(mixed[0]), low_halves(mixed[1]), high_halves(mixed[1])};
#pragma GCC unroll 4
    for (size_t t = 0; t < M; ++t) {
      const __m512i quad = _mm512_maskz_permutexvar_epi32(0xffff, lanes, weights[t].quads[q]);
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) add_products(totals[t][i], parts[i], quad);
    }
  }
#pragma GCC unroll 4
  for (size_t t = 0; t < M; ++t) {
    const __m512 scale = _mm512_maskz_permutexvar_ps(0xffff, lanes, weights[t].scale);
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) {
      float* sum = sums[t] + 16 * i;
      const __m512 exact = _mm512_maskz_cvtepi32_ps(0xffff, totals[t][i]);
      _mm512_store_ps(sum, _mm512_fmadd_ps(exact, scale, _mm512_load_ps(sum)));
    }
  }
}

// Adds the sums of two blocks, or of the first one alone, to y.
inline void add_in_order(const float* sums, size_t floats, float* y) {
  for (size_t first = 0; first < floats; first += 32)  // the elements of a lane
    for (size_t j = 0; j < 4; ++j) {
      const float* even = sums + 32 * j + first / 8;
      float* to = y + first + 8 * j;
      const __m128 evens = _mm_load_ps(even), odds = _mm_load_ps(even + 16);
      _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), _mm_unpacklo_ps(evens, odds)));
      _mm_storeu_ps(to + 4, _mm_add_ps(_mm_loadu_ps(to + 4), _mm_unpackhi_ps(evens, odds)));
    }
}

// Adds two blocks from block b on, or one, of a group of rows to the sums of M tokens.
template <class Q, size_t M, bool both>
inline void accumulate_blocks(const QuantisedRow* rows, const ByteWeights* weights, size_t b, float* const* sums) {
  float* other[M];
  for (size_t t = 0; t < M; ++t) other[t] = sums[t] + kBytesBlock;
  accumulate_half<Q, M, false, both>(rows, weights, b, sums);
  accumulate_half<Q, M, true, both>(rows, weights, b, other);
}

// Blocks whose sums for M tokens stay in the first-level cache.
template <size_t M>
constexpr size_t kColumns = M == 1   ? 4 * kScaled
                            : M == 2 ? 2 * kScaled
                                     : kScaled;

// Adds all groups of rows to the blocks from `begin` up to `end`, at most kColumns<M>, of M tokens.
template <class Q, size_t M>
inline void accumulate_columns(const Rows& rows, Picks picks, const float* const* h, size_t stride, size_t begin,
                               size_t end, size_t blocks, float* const* y) {
  static_assert(kColumns<M> % kScaled == 0, "a pass starts where round_to_weights does");
  constexpr size_t floats = 2 * kBytesBlock;
  alignas(64) float sums[M][kColumns<M> / 2 * floats];
  for (size_t t = 0; t < M; ++t) memset(sums[t], 0, (end - begin + 1) / 2 * floats * sizeof(float));
  for (size_t i = 0; i < picks.count; i += kGroup) {
    const RowGroup<Q, M> group(rows, picks, h, stride, i);
    const QuantisedRow* next = group.follows ? group.next : nullptr;
    if (begin == 0) fetch_scales(next, blocks);
    ByteWeights weights[M];
    for (size_t b = begin; b < end; b += 2) {
      for (size_t t = 0; b % kScaled == 0 && t < M; ++t)
        weights[t] = round_to_weights(group.now, group.factors[t], b, blocks);
      fetch_blocks<Q>(next, b);
      float* of[M];
      for (size_t t = 0; t < M; ++t) of[t] = sums[t] + (b - begin) / 2 * floats;
      if (b + 1 < blocks)
        accumulate_blocks<Q, M, true>(group.now, weights, b, of);
      else
        accumulate_blocks<Q, M, false>(group.now, weights, b, of);
    }
  }
  for (size_t t = 0; t < M; ++t)
    for (size_t b = begin; b < end; b += 2)
      add_in_order(sums[t] + (b - begin) / 2 * floats, b + 1 < blocks ? floats : floats / 2, y[t] + b * kBytesBlock);
}

// y[t] += sum over i of h[t][i * stride] times row i, for M tokens
template <class Q, size_t M>
inline void accumulate_tile_of_bytes(const Rows& rows, Picks picks, const float* const* h, size_t stride,
                                     float* const* y) {
  const size_t blocks = rows.width / kBytesBlock;
  for (size_t b = 0; b < blocks; b += kColumns<M>) {
    const size_t end = blocks - b < kColumns<M> ? blocks : b + kColumns<M>;
    accumulate_columns<Q, M>(rows, picks, h, stride, b, end, blocks, y);
  }
}
