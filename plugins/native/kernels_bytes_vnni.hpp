// Integer kernels for the rows of a low-bit copy, its residuals or both, part of kernels_bytes.hpp: four products per
// instruction and lane (AVX-512 VNNI), for two blocks at a time.
#pragma once

// Vectors of bytes, one for each half of two blocks: the even and the odd elements. The lower 32 bytes of a vector are
// of the first block.
struct alignas(64) ByteStep {
  int8_t halves[2][64];
};

constexpr size_t kScaled = 16;  // blocks whose scales are one vector

inline size_t byte_steps(size_t blocks) { return (blocks + 1) / 2; }

// An input as bytes: its steps, then the scales of its blocks, and the sums of their elements, each padded to whole
// vectors.
struct ByteInput {
  ByteInput() = default;
  ByteInput(const float* room, size_t blocks)
      : steps(reinterpret_cast<const ByteStep*>(room)),
        scales(reinterpret_cast<const float*>(steps + byte_steps(blocks))),
        sums(scales + (blocks + kScaled - 1) / kScaled * kScaled) {}

  const ByteStep* steps;
  const float *scales, *sums;
};
static_assert(sizeof(ByteStep) + 4 * sizeof(__m512) <= 2 * kBytesBlock * sizeof(float), "it fits into room");

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
  const size_t blocks = width / kBytesBlock, count = byte_steps(blocks);
  const ByteInput input(room, blocks);
  ByteStep* steps = reinterpret_cast<ByteStep*>(room);
  float *scales = room + (input.scales - room), *sums = room + (input.sums - room);
  if (blocks % 2 != 0) memset(steps + count - 1, 0, sizeof *steps);
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
    alignas(64) int8_t halves[2][32];
    _mm512_store_si512(halves, halves_of(bytes));
    ByteStep& step = steps[b / 2];
    for (size_t half = 0; half < 2; ++half) memcpy(step.halves[half] + b % 2 * 32, halves[half], 32);
    scales[b] = peak / kByteMost;
    sums[b] = scales[b] * static_cast<float>(_mm512_reduce_add_epi32(total));
  }
  for (size_t b = blocks; b % kScaled != 0; ++b) scales[b] = sums[b] = 0;
  return room;
}

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

inline __m512i low_halves(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline __m512i high_halves(__m512i bytes) { return low_halves(_mm512_srli_epi16(bytes, 4)); }

// The integers of two blocks of a row, in the order of ByteStep.
template <class Q, bool both>
struct ByteRow {
  ByteRow(const QuantisedRow& row, size_t b) {
    const __m512i bytes = load_blocks<Q, both>(row.data, b);
    halves[0] = low_halves(bytes), halves[1] = high_halves(bytes);
  }
  __m512i halves[2];
};

// The bits of `a` where the mask has ones, and those of `b` elsewhere.
inline __m512i select_bits(__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }

// The bits of the copy above those of the residual, of bytes with 4 bits of two elements each.
template <class R>
struct NestedHalves {
  NestedHalves(__m512i copy, __m512i low) {
    const __m512i upper = _mm512_set1_epi8(static_cast<char>(15 << R::bits));
    halves[0] = select_bits(upper, _mm512_slli_epi16(copy, R::bits), low);
    halves[1] = select_bits(upper, _mm512_srli_epi16(copy, 4 - R::bits), _mm512_srli_epi16(low, 4));
  }
  __m512i halves[2];
};

template <class R, bool both>
struct ByteRow<Nested<R>, both> : NestedHalves<R> {
  ByteRow(const QuantisedRow& row, size_t b)
      : NestedHalves<R>(load_blocks<Bits4, both>(row.data, b), load_blocks<R, both>(row.residual, b)) {}
};

template <class Q, bool both>
struct ByteRow<Unpacked<Q>, both> {
  ByteRow(const QuantisedRow& row, size_t b) {
    for (size_t half = 0; half < 2; ++half) halves[half] = bytes_of(row.data + b * kBytesBlock + half * 64);
  }
  __m512i halves[2];
};

template <class Q>
inline size_t unpacked_bytes(size_t blocks) {
  return byte_steps(blocks) * 2 * kBytesBlock;
}

template <class Q, bool both>
inline void unpack_blocks(const QuantisedRow& row, size_t b, uint8_t* to) {
  const ByteRow<Q, both> unpacked(row, b);
  for (size_t half = 0; half < 2; ++half) _mm512_store_si512(to + b * kBytesBlock + half * 64, unpacked.halves[half]);
}

template <class Q>
inline void unpack_row(const QuantisedRow& row, size_t blocks, uint8_t* to) {
  const size_t pairs = blocks / 2 * 2;
  for (size_t b = 0; b < pairs; b += 2) unpack_blocks<Q, true>(row, b, to);
  if (pairs != blocks) unpack_blocks<Q, false>(row, pairs, to);
}

inline __mmask16 lanes_left(size_t blocks, size_t b) {
  return blocks - b >= 16 ? 0xffff : static_cast<__mmask16>((1u << (blocks - b)) - 1);
}

// For the lanes of two blocks, the number of the block among kScaled, from block b on.
inline __m512i lanes_of_blocks(size_t b) {
  const __m512i first = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_add_epi32(first, _mm512_set1_epi32(static_cast<int>(b % kScaled)));
}

// The sums of four vectors.
inline __m128 sums_of(const __m512 v[4]) {
  __m256 half[4];
  for (size_t i = 0; i < 4; ++i) half[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// Prefetches two blocks of R rows, from block b on. `next` may be null.
template <class Q, size_t R>
__attribute__((always_inline)) inline void fetch_blocks(const QuantisedRow* next, size_t b) {
  if (next == nullptr) return;
  constexpr size_t bytes = kBytesBlock * (Q::bits - Q::residual_bits) / 8, beside = kBytesBlock * Q::residual_bits / 8;
#pragma GCC unroll 16
  for (size_t r = 0; r < R; ++r) {
    fetch_bytes(next[r].data + b * bytes, 2 * bytes);
    if (beside != 0) fetch_bytes(next[r].residual + b * beside, 2 * beside);
  }
}

template <size_t R>
__attribute__((always_inline)) inline void fetch_scales(const QuantisedRow* next, size_t blocks) {
  for (size_t r = 0; next != nullptr && r < R; ++r) fetch_bytes(next[r].scales, blocks * sizeof(uint16_t));
}

// The scales of the blocks of a row from block `first` on that `there` has.
inline __m512 scales_of(const QuantisedRow& row, size_t first, __mmask16 there) {
  const __m256i shorts = _mm256_maskz_loadu_epi16(there, row.shorts() + first);
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, shorts), 16));
}

constexpr size_t kProductTokens = 8;  // tokens of a tile of products

template <size_t M>
constexpr size_t kRowsOfTile = M <= 2   ? 4
                               : M <= 4 ? 2
                                        : 1;

// Products of R rows with the inputs of M tokens. R * M is at most 8.
template <class Q, size_t R, size_t M>
struct ByteTile {
  const QuantisedRow* rows;
  const ByteInput* inputs;
  __m512 scales[R * M];  // of rows times those of inputs, for kScaled blocks
  __m512 acc[(R * M + 3) / 4 * 4];

  ByteTile(const QuantisedRow* of, const ByteInput* with) : rows(of), inputs(with) {
#pragma GCC unroll 8
    for (__m512& one : acc) one = _mm512_setzero_ps();
  }

  // Reads the scales of kScaled blocks from block `first` on, and subtracts the middle of the integers times the input.
  __attribute__((always_inline)) void scale(size_t first, size_t blocks) {
    const __mmask16 there = lanes_left(blocks, first);
#pragma GCC unroll 4
    for (size_t r = 0; r < R; ++r) {
      const __m512 own = scales_of(rows[r], first, there), middle = _mm512_mul_ps(own, _mm512_set1_ps(Q::middle));
#pragma GCC unroll 8
      for (size_t t = 0; t < M; ++t) {
        scales[r * M + t] = _mm512_mul_ps(own, _mm512_load_ps(inputs[t].scales + first));
        acc[r * M + t] = _mm512_fnmadd_ps(middle, _mm512_load_ps(inputs[t].sums + first), acc[r * M + t]);
      }
    }
  }

  // Adds the products of two blocks from block b on, or of one.
  template <bool both>
  __attribute__((always_inline)) void add(size_t b) {
    const __m512i lanes = lanes_of_blocks(b);
#pragma GCC unroll 4
    for (size_t r = 0; r < R; ++r) {
      const ByteRow<Q, both> row(rows[r], b);
#pragma GCC unroll 8
      for (size_t t = 0; t < M; ++t) {
        const ByteStep& step = inputs[t].steps[b / 2];
        __m512i total = _mm512_setzero_si512();
        for (size_t half = 0; half < 2; ++half)
          total = _mm512_dpbusd_epi32(total, row.halves[half], bytes_of(step.halves[half]));
        const __m512 scale = _mm512_maskz_permutexvar_ps(0xffff, lanes, scales[r * M + t]);
        acc[r * M + t] = _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(0xffff, total), scale, acc[r * M + t]);
      }
    }
  }
};

// out[r * M + t]
template <class Q, size_t R, size_t M>
inline void project_bytes_tile(const QuantisedRow* rows, const QuantisedRow* next, const float* const* inputs,
                               size_t blocks, float* out) {
  const size_t pairs = blocks / 2 * 2;
  ByteInput in[M];
  for (size_t t = 0; t < M; ++t) in[t] = ByteInput(inputs[t], blocks);
  ByteTile<Q, R, M> tile(rows, in);
  fetch_scales<R>(next, blocks);
  for (size_t first = 0; first < blocks; first += kScaled) {
    tile.scale(first, blocks);
    for (size_t b = first; b < pairs && b < first + kScaled; b += 2) {
      fetch_blocks<Q, R>(next, b);
      tile.template add<true>(b);
    }
  }
  if (pairs != blocks) {  // the scales are still those of the last blocks
    fetch_blocks<Q, R>(next, pairs);
    tile.template add<false>(pairs);
  }
  for (size_t i = 0; i < R * M; i += 4) _mm_storeu_ps(out + i, sums_of(tile.acc + i));
}

#include "kernels_bytes_vnni_accumulate.hpp"
