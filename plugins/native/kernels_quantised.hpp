// Kernels over quantised rows, part of kernels.hpp: integers are turned into floats on the way into the registers, and
// the sum over a block is scaled once.
#pragma once

namespace shadowllm {
namespace {

struct Bits8 {
  static constexpr size_t bits = 8;
  static inline V load(const uint8_t* row, size_t k) {
    typedef int8_t VB __attribute__((vector_size(W)));
    VB bytes;
    memcpy(&bytes, row + k, sizeof bytes);
    bytes ^= (int8_t)-128;  // from around 128 to around 0
    return __builtin_convertvector(__builtin_convertvector(bytes, VI), V);
  }
};

struct Bits4 {
  static constexpr size_t bits = 4;
  static inline V load(const uint8_t* row, size_t k) {
#if defined(__AVX512F__)
    // Lane i takes half-byte i % 8 of its word; the table ignores the bits above.
    const __m512i half = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i shift = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512 values = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    const __m128i words = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + k / 2));
    const __m512i spread = _mm512_maskz_permutexvar_epi32(0xffff, half, _mm512_zextsi128_si512(words));
    const __m512i index = _mm512_maskz_srlv_epi32(0xffff, spread, shift);
    return (V)_mm512_maskz_permutexvar_ps(0xffff, index, values);
#else
    uint32_t word = 0;
    memcpy(&word, row + k / 2, W / 2);
    VU shift;
    for (size_t i = 0; i < W; ++i) shift[i] = 4 * i;
    const VU index = ((VU{} + word) >> shift) & 15;
    return __builtin_convertvector((VI)index, V) - 8.0f;
#endif
  }
};

struct QuantisedRow {
  const uint8_t* data;
  const float* scales;
};

inline QuantisedRow quantised_row(const Rows& rows, const int32_t* ids, size_t i) {
  const size_t id = ids == nullptr ? i : static_cast<size_t>(ids[i]);
  return {static_cast<const uint8_t*>(rows.data) + id * rows.stride, rows.scales + id * (rows.width / rows.block)};
}

inline void fetch_bytes(const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

// What R rows fetch ahead of block b: the same block of the following rows, and all of their scales at first.
template <class Q, size_t R>
inline void fetch_block(const QuantisedRow* next, size_t b, size_t blocks, size_t block) {
  if (next == nullptr) return;
  const size_t bytes = block * Q::bits / 8, at = b * bytes;
  if (b != 0 && at / 64 == (at - bytes) / 64) return;  // the line is on its way
  for (size_t r = 0; r < R; ++r) {
    fetch_bytes(next[r].data + at, bytes);
    if (b == 0) fetch_bytes(next[r].scales, blocks * sizeof(float));
  }
}

template <class Q, size_t R, size_t M>
inline void project_quantised_tile(const QuantisedRow* rows, const QuantisedRow* next, const float* x, size_t width,
                                   size_t block, float* out, size_t tokens) {
  V acc[R][M] = {};
  const size_t blocks = width / block;
  for (size_t b = 0; b < blocks; ++b) {
    fetch_block<Q, R>(next, b, blocks, block);
    V part[R][M] = {};
    for (size_t k = b * block; k < (b + 1) * block; k += W) {
      V in[M];
      for (size_t t = 0; t < M; ++t) in[t] = load(x + t * width + k);
      for (size_t r = 0; r < R; ++r) {
        const V w = Q::load(rows[r].data, k);
        for (size_t t = 0; t < M; ++t) part[r][t] += w * in[t];
      }
    }
    for (size_t r = 0; r < R; ++r)
      for (size_t t = 0; t < M; ++t) acc[r][t] += part[r][t] * rows[r].scales[b];
  }
  for (size_t r = 0; r < R; ++r)
    for (size_t t = 0; t < M; ++t) out[r * tokens + t] = sum(acc[r][t]);
}

template <class Q, size_t R, size_t M>
inline void accumulate_quantised_tile(const QuantisedRow* rows, const QuantisedRow* next, const float* h, size_t tokens,
                                      size_t width, size_t block, float* y) {
  const size_t blocks = width / block;
  for (size_t b = 0; b < blocks; ++b) {
    fetch_block<Q, R>(next, b, blocks, block);
    V weight[R][M];
    for (size_t r = 0; r < R; ++r)
      for (size_t t = 0; t < M; ++t) weight[r][t] = splat(h[r * tokens + t] * rows[r].scales[b]);
    for (size_t k = b * block; k < (b + 1) * block; k += W) {
      V total[M];
      for (size_t t = 0; t < M; ++t) total[t] = load(y + t * width + k);
      for (size_t r = 0; r < R; ++r) {
        const V w = Q::load(rows[r].data, k);
        for (size_t t = 0; t < M; ++t) total[t] += weight[r][t] * w;
      }
      for (size_t t = 0; t < M; ++t) store(y + t * width + k, total[t]);
    }
  }
}

// As walk: tile(rows, next rows or null, first row, count as a type) with kBlock rows at a time, then one by one.
template <class Tile>
inline void walk_quantised(const Rows& rows, Picks picks, Ahead ahead, Tile tile) {
  QuantisedRow now[kBlock], next[kBlock];
  size_t i = 0;
  for (; i + kBlock <= picks.count; i += kBlock) {
    for (size_t r = 0; r < kBlock; ++r) now[r] = quantised_row(rows, picks.ids, i + r);
    const QuantisedRow* to_fetch = next;
    if (i + 2 * kBlock <= picks.count)
      for (size_t r = 0; r < kBlock; ++r) next[r] = quantised_row(rows, picks.ids, i + kBlock + r);
    else if (ahead.rows != nullptr && ahead.rows->type == rows.type)
      for (size_t r = 0; r < kBlock; ++r) next[r] = quantised_row(*ahead.rows, ahead.ids, r);
    else
      to_fetch = nullptr;
    tile(now, to_fetch, i, Count<kBlock>());
  }
  for (; i < picks.count; ++i) {
    now[0] = quantised_row(rows, picks.ids, i);
    tile(now, static_cast<const QuantisedRow*>(nullptr), i, Count<1>());
  }
}

// Calls tile(rows, next rows, first row, first token, row count and token count as types): four rows a tile where
// there is more than one token, as in `cover`.
template <class Tile>
inline void for_tiles(const Rows& rows, Picks picks, size_t tokens, Ahead ahead, Tile tile) {
  walk_quantised(rows, picks, ahead, [&](const QuantisedRow* now, const QuantisedRow* next, size_t i, auto count) {
    if (tokens == 1) return tile(now, next, i, size_t{0}, count, Count<1>());
    constexpr size_t step = count.value < 4 ? count.value : 4;
    for (size_t r = 0; r < count.value; r += step) {
      const QuantisedRow* ahead_of = next == nullptr ? nullptr : next + r;
      size_t t = 0;
      for (; t + kTile <= tokens; t += kTile, ahead_of = nullptr)
        tile(now + r, ahead_of, i + r, t, Count<step>(), Count<kTile>());
      for (; t < tokens; ++t, ahead_of = nullptr) tile(now + r, ahead_of, i + r, t, Count<step>(), Count<1>());
    }
  });
}

template <class Q>
void project_quantised(const Rows& rows, Picks picks, const float* x, size_t tokens, float* out, Ahead ahead) {
  const size_t width = rows.width;
  for_tiles(rows, picks, tokens, ahead,
            [&](const QuantisedRow* now, const QuantisedRow* next, size_t i, size_t t, auto r, auto m) {
              project_quantised_tile<Q, r.value, m.value>(now, next, x + t * width, width, rows.block,
                                                          out + i * tokens + t, tokens);
            });
}

template <class Q>
void accumulate_quantised(const Rows& rows, Picks picks, const float* h, size_t tokens, float* y, Ahead ahead) {
  const size_t width = rows.width;
  for_tiles(rows, picks, tokens, ahead,
            [&](const QuantisedRow* now, const QuantisedRow* next, size_t i, size_t t, auto r, auto m) {
              accumulate_quantised_tile<Q, r.value, m.value>(now, next, h + i * tokens + t, tokens, width, rows.block,
                                                             y + t * width);
            });
}

}  // namespace
}  // namespace shadowllm
