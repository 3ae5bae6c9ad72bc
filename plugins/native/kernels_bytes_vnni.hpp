// Integer kernels for the rows of a low-bit copy or its residuals, part of kernels_bytes.hpp: four products per
// instruction and lane (AVX-512 VNNI), for two blocks at a time.
#pragma once

// Vectors of bytes, one for each half of two blocks: the even and the odd elements, or with rows of 8 bits the first
// and the second half. The lower 32 bytes of a vector are of the first block.
struct alignas(64) ByteStep {
  int8_t halves[2][64];
  int32_t start[16];  // minus the middle of the integers of a row times the input
  float scale[16];    // of the block, for each lane
};
static_assert(sizeof(ByteStep) <= 2 * kBytesBlock * sizeof(float), "it fits into room");

constexpr size_t kScaled = 16;  // blocks whose scales are one vector

inline size_t byte_steps(size_t blocks) { return (blocks + 1) / 2; }

inline __m512i bytes_of(const void* bytes) { return _mm512_loadu_si512(bytes); }
inline __m256i half_of(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }
inline __m128i quarter_of(const void* bytes) { return _mm_loadu_si128(static_cast<const __m128i*>(bytes)); }

// Two vectors of 32 bytes as one.
inline __m512i together(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_zextsi256_si512(low), high, 1); }

// The 64 elements of a block as bytes, its halves one after the other.
template <class Q>
inline __m512i halves_of(const __m128i parts[4]) {
  const __m512i bytes = together(_mm256_set_m128i(parts[1], parts[0]), _mm256_set_m128i(parts[3], parts[2]));
  if (Q::bits == 8) return bytes;
  const __m128i order = _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i split = _mm512_shuffle_epi8(bytes, _mm512_maskz_broadcast_i32x4(0xffff, order));
  return _mm512_maskz_permutexvar_epi64(0xff, _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), split);
}

template <class Q>
inline const float* round_to_bytes(const float* x, size_t width, float* room) {
  const size_t blocks = width / kBytesBlock, count = byte_steps(blocks);
  ByteStep* steps = reinterpret_cast<ByteStep*>(room);
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
    for (size_t i = 0; i < 4; ++i) {
      const __m512i integers = _mm512_maskz_cvtps_epi32(0xffff, _mm512_mul_ps(in[i], inverse));
      bytes[i] = _mm512_maskz_cvtepi32_epi8(0xffff, integers);
    }
    alignas(64) int8_t halves[2][32];
    _mm512_store_si512(halves, halves_of<Q>(bytes));
    ByteStep& step = steps[b / 2];
    for (size_t half = 0; half < 2; ++half) memcpy(step.halves[half] + b % 2 * 32, halves[half], 32);
    _mm256_store_ps(step.scale + b % 2 * 8, _mm256_set1_ps(peak / kByteMost));
  }
  constexpr int middle = 1 << (Q::bits - 1);
  const __m512i ones = _mm512_set1_epi8(1);
  for (size_t s = 0; s < count; ++s) {
    __m512i sums = _mm512_setzero_si512();
    for (size_t half = 0; half < 2; ++half) sums = _mm512_dpbusd_epi32(sums, ones, bytes_of(steps[s].halves[half]));
    _mm512_store_si512(steps[s].start, _mm512_mullo_epi32(sums, _mm512_set1_epi32(-middle)));
  }
  return room;
}

// Two blocks of a row from block b on, the second one zero if the row has none: its bytes at 4 bits per element.
template <class Q>
inline __m512i load_blocks(const uint8_t* row, size_t b, size_t blocks) {
  const uint8_t* from = row + b * kBytesBlock * Q::bits / 8;
  const bool both = b + 1 < blocks;
  if (Q::bits == 4) return both ? bytes_of(from) : _mm512_zextsi256_si512(half_of(from));
  const __m256i pairs = both ? half_of(from) : _mm256_zextsi128_si256(quarter_of(from));
  const __m512i fours = _mm512_maskz_cvtepu8_epi16(~0u, pairs);
  const __m512i twos = _mm512_and_si512(_mm512_or_si512(fours, _mm512_slli_epi16(fours, 4)), _mm512_set1_epi8(0x0f));
  return _mm512_and_si512(_mm512_or_si512(twos, _mm512_slli_epi16(twos, 2)), _mm512_set1_epi8(0x33));
}

inline __m512i low_halves(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline __m512i high_halves(__m512i bytes) { return low_halves(_mm512_srli_epi16(bytes, 4)); }

// The integers of two blocks of a row, in the order of ByteStep.
template <class Q>
struct ByteRow {
  ByteRow(const uint8_t* row, size_t b, size_t blocks) {
    const __m512i bytes = load_blocks<Q>(row, b, blocks);
    halves[0] = low_halves(bytes), halves[1] = high_halves(bytes);
  }
  __m512i halves[2];
};

template <>
struct ByteRow<Bits8> {
  ByteRow(const uint8_t* row, size_t b, size_t blocks) {
    const uint8_t* from = row + b * kBytesBlock;
    const bool both = b + 1 < blocks;
    for (size_t half = 0; half < 2; ++half, from += 32)
      halves[half] = together(half_of(from), both ? half_of(from + kBytesBlock) : _mm256_setzero_si256());
  }
  __m512i halves[2];
};

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

// Rows of 2 bits share the input of rows of 4 bits, whose middle is four times theirs.
template <class Q>
inline __m512i start_of(const int32_t* start) {
  const __m512i sums = _mm512_load_si512(start);
  return Q::bits == 2 ? _mm512_maskz_srai_epi32(0xffff, sums, 2) : sums;
}

// Prefetches for R rows at two blocks from block b on, as fetch_block does.
template <class Q, size_t R>
__attribute__((always_inline)) inline void fetch_blocks(const QuantisedRow* next, size_t b, size_t blocks) {
  fetch_block<Q, R>(next, b, blocks, kBytesBlock);
  if (b + 1 < blocks) fetch_block<Q, R>(next, b + 1, blocks, kBytesBlock);
}

template <size_t M>
constexpr size_t kRowsOfTile = M <= 2 ? 4 : 2;

// Products of R rows with the inputs of M tokens: out[r * M + t]. R * M is at most 8.
template <class Q, size_t R, size_t M>
inline void project_bytes_tile(const QuantisedRow* rows, const QuantisedRow* next, const float* const* inputs,
                               size_t blocks, float* out) {
  constexpr size_t sums = (R * M + 3) / 4 * 4;
  __m512 acc[sums];
  for (size_t i = 0; i < sums; ++i) acc[i] = _mm512_setzero_ps();
  for (size_t first = 0; first < blocks; first += kScaled) {
    const __mmask16 there = lanes_left(blocks, first);
    __m512 scales[R];
    for (size_t r = 0; r < R; ++r) scales[r] = _mm512_maskz_loadu_ps(there, rows[r].scales + first);
    for (size_t b = first; b < blocks && b < first + kScaled; b += 2) {
      fetch_blocks<Q, R>(next, b, blocks);
      const __m512i lanes = lanes_of_blocks(b);
#pragma GCC unroll 8
      for (size_t r = 0; r < R; ++r) {
        const ByteRow<Q> row(rows[r].data, b, blocks);
        const __m512 scale = _mm512_maskz_permutexvar_ps(0xffff, lanes, scales[r]);
#pragma GCC unroll 8
        for (size_t t = 0; t < M; ++t) {
          const ByteStep& step = reinterpret_cast<const ByteStep*>(inputs[t])[b / 2];
          __m512i total = start_of<Q>(step.start);
          for (size_t half = 0; half < 2; ++half)
            total = _mm512_dpbusd_epi32(total, row.halves[half], bytes_of(step.halves[half]));
          const __m512 exact = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(0xffff, total), _mm512_load_ps(step.scale));
          acc[r * M + t] = _mm512_fmadd_ps(exact, scale, acc[r * M + t]);
        }
      }
    }
  }
  for (size_t i = 0; i < sums; i += 4) _mm_storeu_ps(out + i, sums_of(acc + i));
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
    exact[r] = _mm512_mul_ps(_mm512_set1_ps(h[r]), _mm512_maskz_loadu_ps(there, rows[r].scales + first));
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

// Adds half of the bytes of two blocks, from block b on, of a group of rows to the sums of M tokens. Sums are in the
// order of interleave_half: vector 2 j is of the even elements, the next one of the odd ones.
template <class Q, size_t M, bool half>
inline void accumulate_half(const QuantisedRow* rows, const ByteWeights* weights, size_t b, size_t blocks,
                            float* const* sums) {
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
    for (size_t r = 0; r < 4; ++r) bytes[r] = load_blocks<Q>(rows[4 * q + r].data, b, blocks);
    interleave_half<half>(bytes, mixed);
    const __m512i parts[4] = {low_halves(mixed[0]), high_halves(mixed[0]), low_halves(mixed[1]), high_halves(mixed[1])};
#pragma GCC unroll 4
    for (size_t t = 0; t < M; ++t) {
      const __m512i quad = _mm512_maskz_permutexvar_epi32(0xffff, lanes, weights[t].quads[q]);
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) totals[t][i] = _mm512_dpbusd_epi32(totals[t][i], parts[i], quad);
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

// Adds all groups of rows to kScaled blocks, from block `first` on, of M tokens.
template <class Q, size_t M>
inline void accumulate_columns(const Rows& rows, Picks picks, const float* const* h, size_t stride, size_t first,
                               size_t blocks, float* const* y) {
  constexpr size_t floats = 2 * kBytesBlock;
  const size_t end = first + kScaled < blocks ? first + kScaled : blocks;
  alignas(64) float sums[M][kScaled / 2 * floats];
  memset(sums, 0, sizeof sums);
  for (size_t i = 0; i < picks.count; i += kGroup) {
    const RowGroup<Q, M> group(rows, picks, h, stride, i);
    ByteWeights weights[M];
    for (size_t t = 0; t < M; ++t) weights[t] = round_to_weights(group.now, group.factors[t], first, blocks);
    for (size_t b = first; b < end; b += 2) {
      fetch_blocks<Q, kGroup>(group.follows ? group.next : nullptr, b, blocks);
      float* of[M];
      for (size_t t = 0; t < M; ++t) of[t] = sums[t] + (b - first) / 2 * floats;
      accumulate_half<Q, M, false>(group.now, weights, b, blocks, of);
      for (size_t t = 0; t < M; ++t) of[t] += floats / 2;
      accumulate_half<Q, M, true>(group.now, weights, b, blocks, of);
    }
  }
  for (size_t t = 0; t < M; ++t)
    for (size_t b = first; b < end; b += 2)
      add_in_order(sums[t] + (b - first) / 2 * floats, b + 1 < blocks ? floats : floats / 2, y[t] + b * kBytesBlock);
}

// y[t] += sum over i of h[t][i * stride] times row i
template <class Q>
void accumulate_bytes(const Rows& rows, Picks picks, const float* const* h, size_t stride, size_t tokens,
                      float* const* y) {
  const size_t blocks = rows.width / kBytesBlock;
  cover_tokens<kByteTokens>(tokens, [&](size_t, size_t, size_t first, auto m) {
    for (size_t b = 0; b < blocks; b += kScaled)
      accumulate_columns<Q, m.value>(rows, picks, h + first, stride, b, blocks, y + first);
  });
}
