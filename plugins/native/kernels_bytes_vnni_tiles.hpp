// Tiles for products with AVX-512 VNNI, part of kernels_bytes_vnni.hpp: the vectors of LaneBlock for each block of a
// group of rows, so that nothing has to be transposed, and then the scales of the rows for each block.
#pragma once

static_assert(kTileRows == kGroup, "a tile is a group");

// A row of this type points to a whole tile.
template <class Q>
struct Tiled : Q {
  static constexpr size_t block_bytes = kGroup * kBytesBlock * Q::bits / 8;
  static constexpr size_t scales_bytes = kGroup * sizeof(uint16_t);  // of a block

  static constexpr size_t bytes(size_t blocks) { return blocks * block_bytes + (blocks * scales_bytes + 63) / 64 * 64; }
  static QuantisedRow at(const char* tile, size_t blocks) {
    return {reinterpret_cast<const uint8_t*>(tile), nullptr, tile + blocks * block_bytes, true};
  }
};

inline void write_vector(char*& to, __m512i vector) {
  _mm512_store_si512(to, vector);
  to += sizeof vector;
}

// The integers of a block in fewer vectors than those of LaneBlock<Q>.
inline void write_block(const QuantisedRow* rows, size_t b, char* to, Bits4) {
  __m512i bytes[8];
  load_lanes<Bits4>(rows, &QuantisedRow::data, b, bytes);
  for (const __m512i& vector : bytes) write_vector(to, vector);
}

template <>
struct LaneBlock<Tiled<Bits4>> {
  LaneBlock(const QuantisedRow* tile, size_t b) {
    const uint8_t* from = tile->data + b * Tiled<Bits4>::block_bytes;
#pragma GCC unroll 8
    for (size_t k = 0; k < 8; ++k) {
      const __m512i bytes = bytes_of(from + k * sizeof(__m512i));
      halves[0][k] = low_halves(bytes), halves[1][k] = high_halves(bytes);
    }
  }
  __m512i halves[2][8];
};

inline void write_block(const QuantisedRow* rows, size_t b, char* to, Nested<Bits4>) {
  const LaneBlock<Nested<Bits4>> block(rows, b);
  for (const auto& half : block.halves)
    for (const __m512i& vector : half) write_vector(to, vector);
}

template <>
struct LaneBlock<Tiled<Nested<Bits4>>> : LaneBlock<Unpacked<Nested<Bits4>>> {
  using LaneBlock<Unpacked<Nested<Bits4>>>::LaneBlock;
};

// The residuals of two vectors share a vector.
inline void write_block(const QuantisedRow* rows, size_t b, char* to, Nested<Bits2>) {
  write_block(rows, b, to, Bits4());
  to += Tiled<Bits4>::block_bytes;
  __m512i low[8];
  load_lanes<Bits2>(rows, &QuantisedRow::residual, b, low);
  for (size_t k = 0; k < 8; k += 2) write_vector(to, _mm512_or_si512(low[k], _mm512_slli_epi16(low[k + 1], 2)));
}

template <>
struct LaneBlock<Tiled<Nested<Bits2>>> {
  LaneBlock(const QuantisedRow* tile, size_t b) {
    const uint8_t *from = tile->data + b * Tiled<Nested<Bits2>>::block_bytes, *low = from + Tiled<Bits4>::block_bytes;
    const __m512i upper = _mm512_set1_epi8(15 << 2), lower = _mm512_set1_epi8(3);
#pragma GCC unroll 8
    for (size_t k = 0; k < 8; ++k) {
      const __m512i copy = bytes_of(from + k * sizeof(__m512i)), pairs = bytes_of(low + k / 2 * sizeof(__m512i));
      const int shift = k % 2 * 2;
      const auto join = [=](__m512i above, __m512i below) {
        return _mm512_or_si512(_mm512_and_si512(above, upper), _mm512_and_si512(below, lower));
      };
      halves[0][k] = join(_mm512_slli_epi16(copy, 2), _mm512_srli_epi16(pairs, shift));
      halves[1][k] = join(_mm512_srli_epi16(copy, 2), _mm512_srli_epi16(pairs, shift + 4));
    }
  }
  __m512i halves[2][8];
};

template <class Q>
struct LaneScales<Tiled<Q>> {
  LaneScales(const QuantisedRow* tile, size_t) : scales(tile->scales) {}
  __m512 of(size_t b) const {
    const __m512i shorts = _mm512_maskz_cvtepu16_epi32(0xffff, half_of(scales + b * Tiled<Q>::scales_bytes));
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, shorts, 16));
  }
  const char* scales;
};

// What is prefetched during a tile: bytes of the tiles after it, or then of those that the next pass reads.
struct TilesAhead {
  static constexpr size_t kDistance = 1 << 14;

  const char *tile, *end, *next;  // `end` of the pass; `next` may be null. Nothing is prefetched if the tile is null.

  template <class Q>
  __attribute__((always_inline)) void fetch(size_t b, size_t) const {
    if (tile == nullptr) return;
    const char* at = tile + b * Q::block_bytes + kDistance;
    if (at >= end && next == nullptr) return;
    fetch_bytes(at < end ? at : next + (at - end), Q::block_bytes);
  }
};

// The tile of the picked rows from place i on; null if there is none, or if they are not the rows of one.
inline const char* tile_of(const Rows& rows, Picks picks, size_t i) {
  if (rows.tiles == nullptr) return nullptr;
  const size_t first = picks.ids == nullptr ? i : static_cast<size_t>(picks.ids[i]);
  bool whole = first % kGroup == 0;
  for (size_t r = 1; picks.ids != nullptr && r < kGroup && i + r < picks.count; ++r)
    whole &= static_cast<size_t>(picks.ids[i + r]) == first + r;
  return whole ? rows.tiles + first / kGroup * rows.tile_stride : nullptr;
}

// The first tile of a pass over consecutive rows, the end of its last one, and the first tile of the next pass; null if
// there are none.
struct TilesOfPass {
  TilesOfPass(const Rows& rows, Picks picks, Ahead ahead) {
    if (rows.tiles == nullptr || picks.count == 0) return;
    first = tile_of(rows, picks, 0);
    const size_t last = picks.ids == nullptr ? picks.count - 1 : static_cast<size_t>(picks.ids[picks.count - 1]);
    end = rows.tiles + (last / kGroup + 1) * rows.tile_stride;
    if (ahead.rows != nullptr) next = tile_of(*ahead.rows, {ahead.ids, kLeastAhead}, 0);
  }
  const char *first = nullptr, *end = nullptr, *next = nullptr;
};

// Whether rows of this kind are read in tiles.
template <class Q>
constexpr bool kTiled = false;
template <>
inline constexpr bool kTiled<Bits4> = true;
template <class R>
constexpr bool kTiled<Nested<R>> = true;

// Tiles are a second copy in memory. For longer rows, whose copies are larger, they were not measured.
template <class Q>
size_t tile_bytes_of(const Rows& rows) {
  return rows.stride * kGroup < kSmallGroup ? Tiled<Q>::bytes(rows.width / kBytesBlock) : 0;
}

template <class Q>
void write_tiles_of(const Rows& rows, size_t count, char* to) {
  const size_t blocks = rows.width / kBytesBlock;
  for (size_t i = 0; i < count; i += kGroup, to += Tiled<Q>::bytes(blocks)) {
    QuantisedRow group[kGroup];
    for (size_t r = 0; r < kGroup; ++r) group[r] = quantised_row(rows, nullptr, i + r < count ? i + r : count - 1);
    uint16_t* scales = reinterpret_cast<uint16_t*>(to + blocks * Tiled<Q>::block_bytes);
    for (size_t b = 0; b < blocks; ++b) {
      write_block(group, b, to + b * Tiled<Q>::block_bytes, Q());
      for (size_t r = 0; r < kGroup; ++r) scales[b * kGroup + r] = group[r].shorts()[b];
    }
  }
}
