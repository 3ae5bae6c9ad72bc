// Products with AVX-512 VNNI, part of kernels_bytes.hpp: each lane of a vector belongs to one of sixteen rows. The
// rows are transposed when they are loaded. In return no sum goes across lanes, one vector has a scale of each row, and
// an odd number of blocks needs no more than its share.
#pragma once

// Whether rows of this kind are multiplied so. To spread 2 bits and transpose them too takes longer for one token.
template <class Q>
constexpr bool kInLanes = Q::bits % 4 == 0 && Q::residual_bits % 4 == 0;
template <class Q>
constexpr bool kInLanes<Unpacked<Q>> = kInLanes<Q>;

constexpr size_t kAheadBytes = 1 << 13;  // a group with fewer bytes is prefetched two groups ahead, and not one

// Four consecutive bytes of an input, read from an array of bytes.
typedef int32_t Quad __attribute__((may_alias));

// Loads 32 bytes of each of sixteen rows into eight vectors: rows 0 to 3 and 8 to 11 into the lower halves, and rows 4
// to 7 and 12 to 15 into the upper ones.
template <class Load>
inline void load_pairs(const QuantisedRow* rows, Load load, __m512i out[8]) {
#pragma GCC unroll 8
  for (size_t i = 0; i < 8; ++i) {
    const size_t r = i < 4 ? i : i + 4;
    out[i] = together(load(rows[r]), load(rows[r + 4]));
  }
}

// Lane r of vector k gets bytes 4 k to 4 k + 3 of row r, from the vectors of load_pairs.
inline void transpose(__m512i v[8]) {
  __m512i pairs[8], fours[8];
#pragma GCC unroll 4
  for (size_t i = 0; i < 8; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (size_t i = 0; i < 8; i += 2) {
    const size_t from = i / 4 * 4 + i % 4 / 2;
    fours[i] = _mm512_unpacklo_epi64(pairs[from], pairs[from + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[from], pairs[from + 2]);
  }
#pragma GCC unroll 4
  for (size_t k = 0; k < 4; ++k) {
    v[k] = _mm512_shuffle_i32x4(fours[k], fours[k + 4], 0x88);
    v[k + 4] = _mm512_shuffle_i32x4(fours[k], fours[k + 4], 0xdd);
  }
}

// The integers of a block of sixteen rows: in lane r of halves[0][k], four even elements of row r, from 8 k on, and in
// that of halves[1][k], the odd ones.
template <class Q>
struct LaneBlock {
  LaneBlock(const QuantisedRow* rows, size_t b) {
    __m512i bytes[8];
    load_pairs(rows, [=](const QuantisedRow& row) { return half_of(row.data + b * 32); }, bytes);
    transpose(bytes);
#pragma GCC unroll 8
    for (size_t k = 0; k < 8; ++k) halves[0][k] = low_halves(bytes[k]), halves[1][k] = high_halves(bytes[k]);
  }
  __m512i halves[2][8];
};

template <class R>
struct LaneBlock<Nested<R>> {
  LaneBlock(const QuantisedRow* rows, size_t b) {
    __m512i copy[8], low[8];
    load_pairs(rows, [=](const QuantisedRow& row) { return half_of(row.data + b * 32); }, copy);
    load_pairs(rows, [=](const QuantisedRow& row) { return half_of(row.residual + b * 32); }, low);
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; ++i) {
      const NestedHalves<R> joined(copy[i], low[i]);
      halves[0][i] = joined.halves[0], halves[1][i] = joined.halves[1];
    }
    for (auto& half : halves) transpose(half);
  }
  __m512i halves[2][8];
};

// Blocks of a group of rows stand one after the other, from the first row on.
template <class Q>
struct LaneBlock<Unpacked<Q>> {
  LaneBlock(const QuantisedRow* rows, size_t b) {
    for (size_t i = 0; i < 16; ++i) halves[i / 8][i % 8] = bytes_of(rows[0].data + (b * 16 + i) * sizeof(__m512i));
  }
  __m512i halves[2][8];
};

// In vector b, the scales of block first + b of sixteen rows.
inline void scales_in_lanes(const QuantisedRow* rows, size_t first, size_t blocks, __m512 out[kScaled]) {
  const __mmask16 there = lanes_left(blocks, first);
  __m512i shorts[8];  // transposed, they have two blocks in each lane
  load_pairs(
      rows, [=](const QuantisedRow& row) { return _mm256_maskz_loadu_epi16(there, row.shorts() + first); }, shorts);
  transpose(shorts);
  for (size_t k = 0; k < 8; ++k) {
    out[2 * k] = _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, shorts[k], 16));
    out[2 * k + 1] = _mm512_castsi512_ps(_mm512_and_si512(shorts[k], _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
}

// Rows to prefetch: one after the other in memory, or none, if there is no first one; or each by itself.
struct LanesAhead {
  const QuantisedRow* rows;
  bool together;

  // Prefetches block b.
  template <class Q>
  __attribute__((always_inline)) void fetch(size_t b, size_t blocks) const {
    if (rows == nullptr) return;
    constexpr size_t bytes = kBytesBlock * (Q::bits - Q::residual_bits) / 8,
                     beside = kBytesBlock * Q::residual_bits / 8;
    if (together) {
      fetch_bytes(rows[0].data + b * bytes * kGroup, bytes * kGroup);
      if (beside != 0) fetch_bytes(rows[0].residual + b * beside * kGroup, beside * kGroup);
      if (b == 0) fetch_bytes(rows[0].scales, blocks * sizeof(uint16_t) * kGroup);
    } else {
      fetch_block<Q, kGroup>(rows, b, blocks, kBytesBlock);
    }
  }
};

// out[t * kGroup + r]
template <class Q, size_t M>
inline void project_lanes(const QuantisedRow* rows, LanesAhead ahead, const float* const* inputs, size_t blocks,
                          float* out) {
  constexpr size_t chains = M == 1 ? 4 : 2;  // sums that do not wait for each other
  ByteInput in[M];
  __m512 acc[M], scales[kScaled];
  for (size_t t = 0; t < M; ++t) in[t] = ByteInput(inputs[t], blocks), acc[t] = _mm512_setzero_ps();
  for (size_t b = 0; b < blocks; ++b) {
    if (b % kScaled == 0) scales_in_lanes(rows, b, blocks, scales);
    ahead.fetch<Q>(b, blocks);
    const LaneBlock<Q> block(rows, b);
    const __m512 scale = scales[b % kScaled], middle = _mm512_mul_ps(scale, _mm512_set1_ps(Q::middle));
#pragma GCC unroll 8
    for (size_t t = 0; t < M; ++t) {
      const ByteStep& step = in[t].steps[b / 2];
      __m512i totals[chains];
#pragma GCC unroll 4
      for (__m512i& total : totals) total = _mm512_setzero_si512();
#pragma GCC unroll 16
      for (size_t i = 0; i < 16; ++i) {
        const Quad* quads = reinterpret_cast<const Quad*>(step.halves[i % 2] + b % 2 * 32);
        __m512i& total = totals[i % chains];
        total = _mm512_dpbusd_epi32(total, block.halves[i % 2][i / 2], _mm512_set1_epi32(quads[i / 2]));
      }
      __m512i total = _mm512_add_epi32(totals[0], totals[1]);
      if constexpr (chains == 4) total = _mm512_add_epi32(total, _mm512_add_epi32(totals[2], totals[3]));
      acc[t] = _mm512_fnmadd_ps(middle, _mm512_set1_ps(in[t].sums[b]), acc[t]);
      acc[t] = _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(0xffff, total),
                               _mm512_mul_ps(scale, _mm512_set1_ps(in[t].scales[b])), acc[t]);
    }
  }
  for (size_t t = 0; t < M; ++t) _mm512_storeu_ps(out + t * kGroup, _mm512_mul_ps(acc[t], _mm512_set1_ps(Q::unit)));
}

template <class Q>
void project_in_lanes(const Rows& rows, Picks picks, const float* const* inputs, size_t tokens, float* const* out,
                      size_t stride) {
  const size_t blocks = rows.width / kBytesBlock, ahead = rows.stride * kGroup < kAheadBytes ? 2 * kGroup : kGroup;
  QuantisedRow now[kGroup], next[kGroup];
  // The first groups at once, because one would otherwise wait for each of its blocks.
  for (size_t i = 0; Q::bits != 0 && i < ahead && i < picks.count; ++i) {
    const QuantisedRow row = quantised_row(rows, picks.ids, i);
    fetch_bytes(row.data, rows.stride);
    if (Q::residual_bits != 0) fetch_bytes(row.residual, rows.residual_stride);
  }
  for (size_t i = 0; i < picks.count; i += kGroup) {
    const size_t count = picks.count - i < kGroup ? picks.count - i : kGroup, then = i + ahead;
    const bool follows = Q::bits != 0 && then < picks.count;
    for (size_t r = 0; r < kGroup; ++r) now[r] = quantised_row(rows, picks.ids, i + (r < count ? r : count - 1));
    for (size_t r = 0; follows && r < kGroup; ++r)
      next[r] = quantised_row(rows, picks.ids, then + r < picks.count ? then + r : picks.count - 1);
    const bool together = follows && next[kGroup - 1].data == next[0].data + (kGroup - 1) * rows.stride;
    cover_tokens<kProductTokens>(tokens, [&](size_t tile, size_t, size_t first, auto m) {
      constexpr size_t M = m.value;
      float sums[M * kGroup];
      project_lanes<Q, M>(now, {tile == 0 && follows ? next : nullptr, together}, inputs + first, blocks, sums);
      for (size_t t = 0; t < M; ++t)
        for (size_t r = 0; r < count; ++r) out[first + t][(i + r) * stride] = sums[t * kGroup + r];
    });
  }
}

// See project_by_rows.
template <class Q>
void project_bytes(const Rows& rows, Picks picks, const float* const* inputs, size_t tokens, float* const* out,
                   size_t stride) {
  if constexpr (kInLanes<Q>)
    project_in_lanes<Q>(rows, picks, inputs, tokens, out, stride);
  else
    project_by_rows<Q>(rows, picks, inputs, tokens, out, stride);
}

// Unpacks `count` rows of a matrix, from row `first` on, for project_bytes with Unpacked<Q>: in lanes, the vectors of a
// LaneBlock for each block of a group of rows.
template <class Q>
void unpack_rows(const Rows& rows, size_t first, size_t count, uint8_t* to, size_t stride) {
  if constexpr (!kInLanes<Q>) return unpack_by_rows<Q>(rows, first, count, to, stride);
  for (size_t i = 0; i < count; i += kGroup) {
    QuantisedRow group[kGroup];
    for (size_t r = 0; r < kGroup; ++r)
      group[r] = quantised_row(rows, nullptr, first + (i + r < count ? i + r : count - 1));
    uint8_t* out = to + i * stride;
    for (size_t b = 0; b < rows.width / kBytesBlock; ++b) {
      const LaneBlock<Q> block(group, b);
      for (const auto& half : block.halves)
        for (const __m512i& vector : half) _mm512_store_si512(out, vector), out += sizeof vector;
    }
  }
}
