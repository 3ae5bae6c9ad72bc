// Integer kernels for the rows of a low-bit copy, its residuals or both, part of kernels_bytes.hpp: AVX2.
#pragma once

// The input of a block: its even and its odd elements.
struct alignas(64) ByteBlock {
  int8_t even[32], odd[32];
};

// Where the parts of an input as bytes are, in floats from its start. Its blocks come first. What is needed once per
// block lies side by side, padded to whole vectors.
struct ByteLayout {
  explicit ByteLayout(size_t blocks)
      : scales(blocks * sizeof(ByteBlock) / sizeof(float)), sums(scales + (blocks + 7) / 8 * 8) {}

  size_t scales, sums;  // for each block: its scale, and the sum of its elements
};

inline __m256 magnitude(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

inline float largest_of(__m256 v) {
  float lanes[8], most = 0;
  _mm256_storeu_ps(lanes, v);
  for (size_t i = 0; i < 8; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

inline const float* round_to_bytes(const float* x, size_t width, float* room) {
  const size_t blocks = width / kBytesBlock;
  const ByteLayout layout(blocks);
  float *scales = room + layout.scales, *sums = room + layout.sums;
  for (size_t b = 0; b < blocks; ++b) {
    const float* from = x + b * kBytesBlock;
    ByteBlock& block = reinterpret_cast<ByteBlock*>(room)[b];
    __m256 most = _mm256_setzero_ps(), unordered = most;
    for (size_t i = 0; i < kBytesBlock; i += 8) {
      const __m256 v = _mm256_loadu_ps(from + i);
      most = _mm256_max_ps(most, magnitude(v));
      unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    }
    // Rounding would turn a NaN into a number.
    const float peak = _mm256_movemask_ps(unordered) == 0 ? largest_of(most) : NAN;
    const __m256 inverse = _mm256_set1_ps(peak > 1e-30f ? kByteMost / peak : 0);
    alignas(32) int32_t integers[kBytesBlock];
    int32_t total = 0;
    for (size_t i = 0; i < kBytesBlock; i += 8)
      _mm256_store_si256(reinterpret_cast<__m256i*>(integers + i),
                         _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + i), inverse)));
    for (size_t i = 0; i < 32; ++i) block.even[i] = static_cast<int8_t>(integers[2 * i]);
    for (size_t i = 0; i < 32; ++i) block.odd[i] = static_cast<int8_t>(integers[2 * i + 1]);
    for (size_t i = 0; i < 32; ++i) total += block.even[i] + block.odd[i];
    scales[b] = peak / kByteMost;
    sums[b] = scales[b] * static_cast<float>(total);
  }
  for (size_t b = blocks; b < layout.sums - layout.scales; ++b) scales[b] = sums[b] = 0;
  return room;
}

inline __m256i load_of(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }

// The integers of a block, in 4 bits each.
template <class Q>
inline __m256i load_block(const uint8_t* row, size_t b) {
  if (Q::bits == 4) return load_of(row + b * 32);
  const __m256i fours = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + b * 16)));
  const __m256i twos = _mm256_and_si256(_mm256_or_si256(fours, _mm256_slli_epi16(fours, 4)), _mm256_set1_epi8(0x0f));
  return _mm256_and_si256(_mm256_or_si256(twos, _mm256_slli_epi16(twos, 2)), _mm256_set1_epi8(0x33));
}

inline __m256i low_halves(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
inline __m256i high_halves(__m256i bytes) { return low_halves(_mm256_srli_epi16(bytes, 4)); }

// The integers of a block of a row, in the order of ByteBlock, and their products with an input. They are `middle`
// larger than the weights.
template <class Q>
struct ByteRow {
  ByteRow(const QuantisedRow& row, size_t b) : ByteRow(load_block<Q>(row.data, b)) {}
  explicit ByteRow(__m256i bytes) : even(low_halves(bytes)), odd(high_halves(bytes)) {}
  explicit ByteRow(const uint8_t* unpacked) : even(load_of(unpacked)), odd(load_of(unpacked + 32)) {}

  __m256i times(const ByteBlock& input) const {
    const __m256i first = load_of(input.even), second = load_of(input.odd);
    const __m256i pairs =
        _mm256_add_epi16(_mm256_maddubs_epi16(even, first), _mm256_maddubs_epi16(odd, second));  // at most 4 * 63 * 127
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }

  void unpack(uint8_t* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), even);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), odd);
  }

  static constexpr size_t unpacked_bytes = 64;
  __m256i even, odd;
};

// The bits of the copy above those of the residual.
template <>
struct ByteRow<Nested<Bits2>> : ByteRow<Bits4> {
  using ByteRow<Bits4>::ByteRow;
  ByteRow(const QuantisedRow& row, size_t b) : ByteRow<Bits4>(load_block<Bits4>(row.data, b)) {
    const ByteRow<Bits2> low(load_block<Bits2>(row.residual, b));
    even = _mm256_or_si256(_mm256_slli_epi16(even, 2), low.even);
    odd = _mm256_or_si256(_mm256_slli_epi16(odd, 2), low.odd);
  }
};

// The sum of two products of 8 bits would be too large, so each part has products of its own.
template <>
struct ByteRow<Nested<Bits4>> {
  ByteRow(const QuantisedRow& row, size_t b)
      : copy(load_block<Bits4>(row.data, b)), low(load_block<Bits4>(row.residual, b)) {}
  explicit ByteRow(const uint8_t* unpacked) : copy(unpacked), low(unpacked + ByteRow<Bits4>::unpacked_bytes) {}

  __m256i times(const ByteBlock& input) const {
    return _mm256_add_epi32(_mm256_slli_epi32(copy.times(input), 4), low.times(input));
  }

  void unpack(uint8_t* to) const { copy.unpack(to), low.unpack(to + ByteRow<Bits4>::unpacked_bytes); }

  static constexpr size_t unpacked_bytes = 2 * ByteRow<Bits4>::unpacked_bytes;
  ByteRow<Bits4> copy, low;
};

template <class Q>
struct ByteRow<Unpacked<Q>> : ByteRow<Q> {
  ByteRow(const QuantisedRow& row, size_t b) : ByteRow<Q>(row.data + b * ByteRow<Q>::unpacked_bytes) {}
};

template <class Q>
inline size_t unpacked_bytes(size_t blocks) {
  return blocks * ByteRow<Q>::unpacked_bytes;
}

// The sums of four vectors.
inline __m128 sums_of(const __m256 v[4]) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// The lanes of eight blocks that a row has from block b on.
inline __m256i lanes_left(size_t blocks, size_t b) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(blocks - b)), lanes);
}

// The scales of the blocks of a row from block `first` on that `there` has. There is memory for eight.
inline __m256 scales_of(const QuantisedRow& row, size_t first, __m256i there) {
  const __m128i shorts = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.shorts() + first));
  const __m256i words = _mm256_slli_epi32(_mm256_cvtepu16_epi32(shorts), 16);
  return _mm256_castsi256_ps(_mm256_and_si256(words, there));
}

constexpr size_t kProductTokens = 4;  // tokens of a tile of products

template <size_t M>
constexpr size_t kRowsOfTile = M == 1   ? 4
                               : M == 2 ? 2
                                        : 1;

// Products of R rows with the inputs of M tokens, at most four: out[r * M + t].
template <class Q, size_t R, size_t M>
inline void project_bytes_tile(const QuantisedRow* rows, const QuantisedRow* next, const float* const* inputs,
                               size_t blocks, float out[4]) {
  const ByteLayout layout(blocks);
  __m256 acc[4];
  for (size_t i = 0; i < 4; ++i) acc[i] = _mm256_setzero_ps();
  for (size_t first = 0; first < blocks; first += 8) {
    // Both scales of eight blocks, and the middle of the integers times the sums of the input
    alignas(32) float scale[4][8];
    const __m256i there = lanes_left(blocks, first);
    for (size_t r = 0; r < R; ++r) {
      const __m256 scales = scales_of(rows[r], first, there);
      for (size_t t = 0; t < M; ++t) {
        const float *of = inputs[t] + first, *sums = of + layout.sums;
        _mm256_store_ps(scale[r * M + t], _mm256_mul_ps(scales, _mm256_loadu_ps(of + layout.scales)));
        acc[r * M + t] =
            _mm256_fnmadd_ps(_mm256_mul_ps(scales, _mm256_set1_ps(Q::middle)), _mm256_loadu_ps(sums), acc[r * M + t]);
      }
    }
    for (size_t b = first; b < blocks && b < first + 8; ++b) {
      fetch_block<Q, R>(next, b, blocks, kBytesBlock);
      for (size_t r = 0; r < R; ++r) {
        const ByteRow<Q> row(rows[r], b);
        for (size_t t = 0; t < M; ++t) {
          const __m256 total = _mm256_cvtepi32_ps(row.times(reinterpret_cast<const ByteBlock*>(inputs[t])[b]));
          acc[r * M + t] = _mm256_fmadd_ps(total, _mm256_set1_ps(scale[r * M + t][b - first]), acc[r * M + t]);
        }
      }
    }
  }
  _mm_storeu_ps(out, sums_of(acc));
}

// out[t][i * stride] is the product of row i and inputs[t]. One token has four rows in parallel. Several tokens share
// what is done once for a row.
template <class Q>
void project_bytes(const Rows& rows, Picks picks, const float* const* inputs, size_t tokens, float* const* out,
                   size_t stride, Ahead ahead) {
  const size_t blocks = rows.width / kBytesBlock;
  walk_quantised(rows, picks, ahead, [&](const QuantisedRow* now, const QuantisedRow* next, size_t i, size_t left) {
    cover_tokens<kProductTokens>(tokens, [&](size_t tile, size_t, size_t first, auto m) {
      constexpr size_t M = m.value, R = kRowsOfTile<M>;
      const QuantisedRow* fetched = tile == 0 ? next : nullptr;
      float sums[kBlock * M + 8];
      for (size_t r = 0; r < kBlock; r += R)
        project_bytes_tile<Q, R, M>(now + r, fetched == nullptr ? nullptr : fetched + r, inputs + first, blocks,
                                    sums + r * M);
      for (size_t t = 0; t < M; ++t)
        for (size_t r = 0; r < left; ++r) out[first + t][(i + r) * stride] = sums[r * M + t] * Q::unit;
    });
  });
}

// Unpacks `count` rows of a matrix, from row `first` on, for project_bytes with Unpacked<Q>.
template <class Q>
void unpack_rows(const Rows& rows, size_t first, size_t count, uint8_t* to, size_t stride) {
  for (size_t r = 0; r < count; ++r) {
    const QuantisedRow row = quantised_row(rows, nullptr, first + r);
    for (size_t b = 0; b < rows.width / kBytesBlock; ++b)
      ByteRow<Q>(row, b).unpack(to + r * stride + b * ByteRow<Q>::unpacked_bytes);
  }
}

static_assert(kGroup * 15 * 127 < 1 << 15, "the products of a group are added in 16 bits");

// The weights of a group for eight blocks: h times the scale of the block, rounded to 8 bits relative to the largest.
struct ByteWeights {
  alignas(32) int32_t pairs[kGroup / 2][8];  // the bytes of two rows, twice
  alignas(32) int32_t start[8];              // minus the middle of 4-bit integers times the weights
  alignas(32) float scale[8];
};

inline void round_to_weights(const QuantisedRow* rows, const float* h, size_t first, size_t blocks,
                             ByteWeights& weights) {
  __m256 exact[kGroup], most = _mm256_setzero_ps(), unordered = most;
  const __m256i there = lanes_left(blocks, first);
  for (size_t r = 0; r < kGroup; ++r) {
    exact[r] = _mm256_mul_ps(_mm256_set1_ps(h[r]), scales_of(rows[r], first, there));
    most = _mm256_max_ps(most, magnitude(exact[r]));
    unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(exact[r], exact[r], _CMP_UNORD_Q));
  }
  most = _mm256_blendv_ps(most, _mm256_set1_ps(NAN), unordered);  // rounding would turn a NaN into a number
  const __m256 some = _mm256_cmp_ps(most, _mm256_set1_ps(1e-30f), _CMP_GT_OQ);
  const __m256 inverse = _mm256_and_ps(some, _mm256_div_ps(_mm256_set1_ps(kByteMost), most));
  __m256i total = _mm256_setzero_si256();
  for (size_t r = 0; r < kGroup; r += 2) {
    const __m256i one = _mm256_cvtps_epi32(_mm256_mul_ps(exact[r], inverse));
    const __m256i two = _mm256_cvtps_epi32(_mm256_mul_ps(exact[r + 1], inverse));
    total = _mm256_add_epi32(total, _mm256_add_epi32(one, two));
    const __m256i high = _mm256_and_si256(_mm256_slli_epi32(two, 8), _mm256_set1_epi32(0xff00));
    const __m256i pair = _mm256_or_si256(_mm256_and_si256(one, _mm256_set1_epi32(0xff)), high);
    const __m256i twice = _mm256_or_si256(pair, _mm256_slli_epi32(pair, 16));
    _mm256_store_si256(reinterpret_cast<__m256i*>(weights.pairs[r / 2]), twice);
  }
  _mm256_store_si256(reinterpret_cast<__m256i*>(weights.start), _mm256_mullo_epi32(total, _mm256_set1_epi32(-8)));
  _mm256_store_ps(weights.scale, _mm256_mul_ps(most, _mm256_set1_ps(1 / kByteMost)));
}

// y[0..8) += scale * eight integers
inline void add_scaled(__m128i integers, __m256 scale, float* y) {
  const __m256 exact = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(integers));
  _mm256_storeu_ps(y, _mm256_fmadd_ps(exact, scale, _mm256_loadu_ps(y)));
}

// Adds block b of a group of rows to the 64 floats of y, for each of M tokens. The first vector of `even` and of `odd`
// has the bytes 0..7 and 16..23 of the rows, the second one the others.
template <class Q, size_t M>
inline void accumulate_block(const QuantisedRow* rows, const ByteWeights* weights, size_t b, float* const* y) {
  const size_t at = b % 8;
  __m256i even[M][2], odd[M][2];
  for (size_t t = 0; t < M; ++t) {
    const int32_t start = weights[t].start[at];
    even[t][0] = even[t][1] = odd[t][0] = odd[t][1] =
        _mm256_set1_epi16(static_cast<int16_t>(Q::bits == 4 ? start : start / 4));
  }
  // Unrolled, GCC would form all products before it adds them, and the registers would not suffice.
#pragma GCC unroll 1
  for (size_t r = 0; r < kGroup; r += 2) {
    const __m256i first = load_block<Q>(rows[r].data, b), second = load_block<Q>(rows[r + 1].data, b);
    const __m256i mixed[2] = {_mm256_unpacklo_epi8(first, second), _mm256_unpackhi_epi8(first, second)};
    for (size_t j = 0; j < 2; ++j) {
      const __m256i low = low_halves(mixed[j]), high = high_halves(mixed[j]);
      for (size_t t = 0; t < M; ++t) {
        const __m256i pair = _mm256_set1_epi32(weights[t].pairs[r / 2][at]);
        even[t][j] = _mm256_add_epi16(even[t][j], _mm256_maddubs_epi16(low, pair));
        odd[t][j] = _mm256_add_epi16(odd[t][j], _mm256_maddubs_epi16(high, pair));
      }
    }
  }
  for (size_t t = 0; t < M; ++t) {
    const __m256 scale = _mm256_set1_ps(weights[t].scale[at]);
    for (size_t j = 0; j < 2; ++j) {
      float* to = y[t] + b * kBytesBlock + 16 * j;
      const __m256i front = _mm256_unpacklo_epi16(even[t][j], odd[t][j]);
      const __m256i back = _mm256_unpackhi_epi16(even[t][j], odd[t][j]);
      add_scaled(_mm256_castsi256_si128(front), scale, to);
      add_scaled(_mm256_castsi256_si128(back), scale, to + 8);
      add_scaled(_mm256_extracti128_si256(front, 1), scale, to + 32);
      add_scaled(_mm256_extracti128_si256(back, 1), scale, to + 40);
    }
  }
}

// y[t] += sum over i of h[t][i * stride] times row i, for M tokens
template <class Q, size_t M>
inline void accumulate_tile_of_bytes(const Rows& rows, Picks picks, const float* const* h, size_t stride,
                                     float* const* y) {
  const size_t blocks = rows.width / kBytesBlock;
  for (size_t i = 0; i < picks.count; i += kGroup) {
    const RowGroup<Q, M> group(rows, picks, h, stride, i);
    ByteWeights weights[M];
    for (size_t b = 0; b < blocks; ++b) {
      for (size_t t = 0; b % 8 == 0 && t < M; ++t) round_to_weights(group.now, group.factors[t], b, blocks, weights[t]);
      fetch_block<Q, kGroup>(group.follows ? group.next : nullptr, b, blocks, kBytesBlock);
      accumulate_block<Q, M>(group.now, weights, b, y);
    }
  }
}
