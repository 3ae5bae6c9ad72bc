// Products with AVX-512 VNNI, part of kernels_bytes_vnni.hpp: each lane of a vector belongs to one of sixteen rows. The
// rows are transposed when they are loaded, so that no sum goes across lanes, one vector has a scale of each row, and
// an odd number of blocks needs no padding.
#pragma once

constexpr size_t kProductTokens = 8;     // tokens of a tile of products
constexpr size_t kSmallGroup = 1 << 13;  // bytes of rows without their residuals; see LanesAhead

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

// Two of the four bytes of each lane, from byte `first` on, whose eight elements of 2 bits are spread to 4 bits.
inline __m512i spread_twos(__m512i bytes, int first) {
  const int pair = first * 0x01010101 + 0x01010000;  // each of the two bytes twice
  const __m512i places =
      _mm512_add_epi8(_mm512_set1_epi32(pair),
                      _mm512_maskz_broadcast_i32x4(0xffff, _mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0)));
  const __m512i twice = _mm512_shuffle_epi8(bytes, places);
  const __m512i fours = select_bits(_mm512_set1_epi16(0x00ff), twice, _mm512_srli_epi16(twice, 4));
  return _mm512_and_si512(select_bits(_mm512_set1_epi8(0x0f), fours, _mm512_slli_epi16(fours, 2)),
                          _mm512_set1_epi8(0x33));
}

// A block of sixteen rows of 4 bits, or of 2 bits spread to 4: lane r of vector k has elements 8 k to 8 k + 7 of row r.
template <class Q>
inline void load_lanes(const QuantisedRow* rows, const uint8_t* QuantisedRow::* bytes, size_t b, __m512i out[8]) {
  if constexpr (Q::bits == 4) {
    load_pairs(rows, [=](const QuantisedRow& row) { return half_of(row.*bytes + b * 32); }, out);
    transpose(out);
  } else {
    __m512i twos[4];
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) {
      const auto two = [&](size_t r) {
        return _mm256_set_m128i(quarter_of(rows[r + 4].*bytes + b * 16), quarter_of(rows[r].*bytes + b * 16));
      };
      twos[i] = together(two(i), two(i + 8));
    }
    const __m512i pairs[4] = {_mm512_unpacklo_epi32(twos[0], twos[1]), _mm512_unpackhi_epi32(twos[0], twos[1]),
                              _mm512_unpacklo_epi32(twos[2], twos[3]), _mm512_unpackhi_epi32(twos[2], twos[3])};
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) {  // sixteen elements of each row
      const __m512i some = i % 2 == 0 ? _mm512_unpacklo_epi64(pairs[i / 2], pairs[i / 2 + 2])
                                      : _mm512_unpackhi_epi64(pairs[i / 2], pairs[i / 2 + 2]);
      out[2 * i] = spread_twos(some, 0), out[2 * i + 1] = spread_twos(some, 2);
    }
  }
}

// The integers of a block of sixteen rows: in lane r of halves[0][k], four even elements of row r, from 8 k on, and in
// that of halves[1][k], the odd ones.
template <class Q>
struct LaneBlock {
  LaneBlock(const QuantisedRow* rows, size_t b) {
    __m512i bytes[8];
    load_lanes<Q>(rows, &QuantisedRow::data, b, bytes);
#pragma GCC unroll 8
    for (size_t k = 0; k < 8; ++k) halves[0][k] = low_halves(bytes[k]), halves[1][k] = high_halves(bytes[k]);
  }
  __m512i halves[2][8];
};

// The bits of the copy above those of the residual. Residuals of 4 bits are joined with the copy before they are
// transposed, which needs fewer registers.
template <class R>
struct LaneBlock<Nested<R>> {
  LaneBlock(const QuantisedRow* rows, size_t b) {
    __m512i copy[8], low[8];
    constexpr bool first = R::bits == 4;
    if constexpr (first) {
      load_pairs(rows, [=](const QuantisedRow& row) { return half_of(row.data + b * 32); }, copy);
      load_pairs(rows, [=](const QuantisedRow& row) { return half_of(row.residual + b * 32); }, low);
    } else {
      load_lanes<Bits4>(rows, &QuantisedRow::data, b, copy);
      load_lanes<R>(rows, &QuantisedRow::residual, b, low);
    }
    const __m512i upper = _mm512_set1_epi8(static_cast<char>(15 << R::bits));
#pragma GCC unroll 8
    for (size_t k = 0; k < 8; ++k) {
      halves[0][k] = select_bits(upper, _mm512_slli_epi16(copy[k], R::bits), low[k]);
      halves[1][k] = select_bits(upper, _mm512_srli_epi16(copy[k], 4 - R::bits), _mm512_srli_epi16(low[k], 4));
    }
    for (size_t half = 0; first && half < 2; ++half) transpose(halves[half]);
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

// The scales of sixteen rows for one block after the other.
template <class Q>
struct LaneScales {
  LaneScales(const QuantisedRow* rows, size_t blocks) : rows(rows), blocks(blocks) {}
  __m512 of(size_t b) {
    if (b % kScaled == 0) scales_in_lanes(rows, b, blocks, some);
    return some[b % kScaled];
  }
  const QuantisedRow* rows;
  size_t blocks;
  __m512 some[kScaled];
};

// Bytes of a block of a row, and of its residual.
template <class Q>
constexpr size_t kBlockBytes = kBytesBlock * (Q::bits - Q::residual_bits) / 8;
template <class Q>
constexpr size_t kBesideBytes = kBytesBlock * Q::residual_bits / 8;

// A group of rows to prefetch; null if there is none. `consecutive`: they lie one after the other in memory. A small
// group without residuals is the next one, and goes into the first-level cache. All others go into the second-level
// cache: a small group with residuals two groups ahead, and a large one as the next one.
struct LanesAhead {
  const QuantisedRow* rows;
  bool consecutive, small;

  // Prefetches block b of each row, or, of consecutive rows, as many bytes in the order of memory.
  template <class Q>
  __attribute__((always_inline)) void fetch(size_t b, size_t blocks) const {
    if (rows == nullptr) return;
    if (!consecutive) return fetch_block<Q, kGroup>(rows, b, blocks, kBytesBlock);
    constexpr size_t bytes = kBlockBytes<Q> * kGroup, beside = kBesideBytes<Q> * kGroup;
    if (small && beside == 0)
      fetch_bytes<3>(rows[0].data + b * bytes, bytes);
    else
      fetch_bytes(rows[0].data + b * bytes, bytes);
    if (beside != 0) fetch_bytes(rows[0].residual + b * beside, beside);
    if (b == 0) fetch_bytes(rows[0].scales, blocks * sizeof(uint16_t) * kGroup);
  }
};

#include "kernels_bytes_vnni_tiles.hpp"

// out[t * kGroup + r]
template <class Q, size_t M, class Prefetch>
inline void project_lanes(const QuantisedRow* rows, Prefetch ahead, const float* const* inputs, size_t blocks,
                          float* out) {
  constexpr size_t chains = M == 1 ? 4 : 2;  // sums that do not wait for each other
  ByteInput in[M];
  __m512 acc[M];
  LaneScales<Q> scales(rows, blocks);
  for (size_t t = 0; t < M; ++t) in[t] = ByteInput(inputs[t], blocks), acc[t] = _mm512_setzero_ps();
  for (size_t b = 0; b < blocks; ++b) {
    ahead.template fetch<Q>(b, blocks);
    const LaneBlock<Q> block(rows, b);
    const __m512 scale = scales.of(b), middle = _mm512_mul_ps(scale, _mm512_set1_ps(Q::middle));
#pragma GCC unroll 8
    for (size_t t = 0; t < M; ++t) {
      __m512i totals[chains];
#pragma GCC unroll 4
      for (__m512i& total : totals) total = _mm512_setzero_si512();
#pragma GCC unroll 16
      for (size_t i = 0; i < 16; ++i) {
        const Quad* quads = reinterpret_cast<const Quad*>(in[t].blocks[b].halves[i % 2]);
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

// The products of a group of `count` rows, from place i on; see project_bytes. `ahead`: what is prefetched meanwhile.
template <class Q, class Prefetch>
inline void project_group(const QuantisedRow* rows, Prefetch ahead, size_t blocks, const float* const* inputs,
                          size_t tokens, float* const* out, size_t stride, size_t i, size_t count) {
  cover_tokens<kProductTokens>(tokens, [&](size_t tile, size_t, size_t first, auto m) {
    constexpr size_t M = m.value;
    float sums[M * kGroup];
    project_lanes<Q, M>(rows, tile == 0 ? ahead : Prefetch{}, inputs + first, blocks, sums);
    for (size_t t = 0; t < M; ++t)
      for (size_t r = 0; r < count; ++r) out[first + t][(i + r) * stride] = sums[t * kGroup + r];
  });
}

// out[t][i * stride] is the product of row i and inputs[t]. Several tokens share what is done once for a row.
template <class Q>
void project_bytes(const Rows& rows, Picks picks, const float* const* inputs, size_t tokens, float* const* out,
                   size_t stride, Ahead later) {
  const size_t blocks = rows.width / kBytesBlock, bytes = blocks * kBlockBytes<Q>;
  const bool small = bytes * kGroup < kSmallGroup;
  const size_t ahead = small && Q::residual_bits != 0 ? 2 * kGroup : kGroup;
  QuantisedRow now[kGroup], next[kGroup];
  const TilesOfPass tiles(rows, picks, later);
  // Prefetches the first groups as a whole. Otherwise the kernel would wait for each of their blocks.
  for (size_t i = 0; bytes != 0 && tiles.first == nullptr && i < ahead && i < picks.count; ++i) {
    const QuantisedRow row = quantised_row(rows, picks.ids, i);
    fetch_bytes(row.data, bytes);
    if (Q::residual_bits != 0) fetch_bytes(row.residual, blocks * kBesideBytes<Q>);
  }
  for (size_t i = 0; i < picks.count; i += kGroup) {
    const size_t count = picks.count - i < kGroup ? picks.count - i : kGroup, then = i + ahead;
    if constexpr (kTiled<Q>) {
      if (const char* tile = tile_of(rows, picks, i)) {
        const QuantisedRow whole = Tiled<Q>::at(tile, blocks);
        project_group<Tiled<Q>>(&whole, TilesAhead{tile, tiles.end, tiles.next}, blocks, inputs, tokens, out, stride, i,
                                count);
        continue;
      }
    }
    const bool last = bytes != 0 && then >= picks.count && later.rows != nullptr && later.rows->tiles == nullptr;
    const bool follows = bytes != 0 && (then < picks.count || last);
    for (size_t r = 0; r < kGroup; ++r) now[r] = quantised_row(rows, picks.ids, i + (r < count ? r : count - 1));
    for (size_t r = 0; last && r < kGroup; ++r) next[r] = quantised_row(*later.rows, later.ids, r);
    for (size_t r = 0; follows && !last && r < kGroup; ++r)
      next[r] = quantised_row(rows, picks.ids, then + r < picks.count ? then + r : picks.count - 1);
    const bool consecutive = follows && next[kGroup - 1].data == next[0].data + (kGroup - 1) * bytes;
    project_group<Q>(now, LanesAhead{follows ? next : nullptr, consecutive, small}, blocks, inputs, tokens, out, stride,
                     i, count);
  }
}

template <class Q>
inline size_t unpacked_bytes(size_t blocks) {
  return blocks * kBytesBlock;
}

// Unpacks `count` rows of a matrix, from row `first` on, for project_bytes with Unpacked<Q>: the vectors of a LaneBlock
// for each block of a group of rows.
template <class Q>
void unpack_rows(const Rows& rows, size_t first, size_t count, uint8_t* to, size_t stride) {
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
