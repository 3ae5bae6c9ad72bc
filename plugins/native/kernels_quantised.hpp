// Kernels for quantised rows, part of kernels.hpp. Integers are converted to floats when they are loaded, and products
// are multiplied by the scale of their block.
#pragma once

namespace shadowllm {
namespace {

struct QuantisedRow {
  const uint8_t *data, *residual;
  const char* scales;
  bool short_scales;  // see Rows

  float scale(size_t b) const { return short_scales ? widened(shorts()[b]) : floats()[b]; }
  const float* floats() const { return reinterpret_cast<const float*>(scales); }
  const uint16_t* shorts() const { return reinterpret_cast<const uint16_t*>(scales); }

  static float widened(uint16_t scale) {
    const uint32_t bits = static_cast<uint32_t>(scale) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
};

// Loads `step` (at most 32) consecutive elements of a row as two vectors. Vector j has the same elements that `split`
// puts into vector j of x or y, which is split once for all rows of a tile. `middle` is the stored integer of a weight
// of zero, and `unit` the weight of the next one, without its scale.
struct Bits8 {
  static constexpr size_t bits = 8, residual_bits = 0, step = 2 * W;

  static inline void load(const QuantisedRow& row, size_t k, V out[2]) {
    typedef int8_t VB __attribute__((vector_size(W)));
    for (size_t j = 0; j < 2; ++j) {
      VB bytes;
      memcpy(&bytes, row.data + k + j * W, sizeof bytes);
      bytes ^= (int8_t)-128;  // moves the middle from 128 to 0
      out[j] = __builtin_convertvector(__builtin_convertvector(bytes, VI), V);
    }
  }
  static inline void split(const float* x, V out[2]) {
    out[0] = shadowllm::load(x);
    out[1] = shadowllm::load(x + W);
  }
  static inline void join(const V in[2], float* y) {
    store(y, in[0]);
    store(y + W, in[1]);
  }
};

// A byte holds an even element and the next odd one. One vector has the even elements, the other the odd ones.
struct Bits4 {
  static constexpr size_t bits = 4, residual_bits = 0, step = 2 * W;
  static constexpr float middle = 8, unit = 1;

  static inline void load(const QuantisedRow& row, size_t k, V out[2]) {
#if defined(__AVX512F__)
    // The table lookup ignores the bits above the lowest four.
    const __m512 values = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.data + k / 2));
    const __m512i pairs = _mm512_maskz_cvtepu8_epi32(0xffff, bytes);
    out[0] = (V)_mm512_maskz_permutexvar_ps(0xffff, pairs, values);
    out[1] = (V)_mm512_maskz_permutexvar_ps(0xffff, _mm512_maskz_srli_epi32(0xffff, pairs, 4), values);
#else
    typedef uint8_t VB __attribute__((vector_size(W)));
    VB bytes;
    memcpy(&bytes, row.data + k / 2, sizeof bytes);
    const VU pairs = __builtin_convertvector(bytes, VU);
    out[0] = __builtin_convertvector((VI)(pairs & 15), V) - 8.0f;
    out[1] = __builtin_convertvector((VI)(pairs >> 4), V) - 8.0f;
#endif
  }
  static inline void split(const float* x, V out[2]) {
    const V first = shadowllm::load(x), second = shadowllm::load(x + W);
    VI even;
    for (size_t i = 0; i < W; ++i) even[i] = 2 * i;
    out[0] = __builtin_shuffle(first, second, even);
    out[1] = __builtin_shuffle(first, second, even + 1);
  }
  static inline void join(const V in[2], float* y) {
    VI front;
    for (size_t i = 0; i < W; ++i) front[i] = i / 2 + (i % 2) * W;
    store(y, __builtin_shuffle(in[0], in[1], front));
    store(y + W, __builtin_shuffle(in[0], in[1], front + (int32_t)(W / 2)));
  }
};

// Four bits hold an even element and the next odd one.
struct Bits2 : Bits4 {
  static constexpr size_t bits = 2;
  static constexpr float middle = 2;

  static inline void load(const QuantisedRow& row, size_t k, V out[2]) {
    uint32_t words[(W + 7) / 8] = {};  // of eight pairs each
    memcpy(words, row.data + k / 4, W / 2);
    VU pairs, places;
    for (size_t i = 0; i < W; ++i) {
      pairs[i] = words[i / 8];
      places[i] = i % 8 * 4;
    }
    pairs >>= places;
    out[0] = __builtin_convertvector((VI)(pairs & 3), V) - 2.0f;
    out[1] = __builtin_convertvector((VI)(pairs >> 2 & 3), V) - 2.0f;
  }
};

// Both parts of nested integers; R is the type of the residual.
template <class R>
struct Nested : Bits4 {
  static constexpr size_t bits = 4 + R::bits, residual_bits = R::bits;
  static constexpr float unit = 1.0f / (1 << R::bits), middle = Bits4::middle / unit + R::middle;

  static inline void load(const QuantisedRow& row, size_t k, V out[2]) {
    V low[2];
    Bits4::load(row, k, out);
    R::load({row.residual, nullptr, nullptr, false}, k, low);
    for (size_t j = 0; j < 2; ++j) out[j] += low[j] * unit;
  }
};

constexpr size_t kScales = 16;  // blocks whose products of input and scale are computed together

inline QuantisedRow quantised_row(const Rows& rows, const int32_t* ids, size_t i) {
  const size_t id = ids == nullptr ? i : static_cast<size_t>(ids[i]);
  const uint8_t* residual = static_cast<const uint8_t*>(rows.residual);
  return {static_cast<const uint8_t*>(rows.data) + id * rows.stride,
          residual == nullptr ? residual : residual + id * rows.residual_stride, rows.scales + id * rows.scales_stride,
          rows.short_scales};
}

// Functions that prefetch must be inlined: GCC removes calls of a function that does nothing else.
// `kLocality`: 2 for the second-level cache, 3 for the first-level one.
template <int kLocality = 2>
__attribute__((always_inline)) inline void fetch_bytes(const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, kLocality);
}

// Prefetches block b of a row, whose blocks have so many bytes, unless its line was fetched for the last block.
__attribute__((always_inline)) inline void fetch_part(const uint8_t* row, size_t b, size_t bytes) {
  const size_t at = b * bytes;
  if (b == 0 || at / 64 != (at - bytes) / 64) fetch_bytes(row + at, bytes);
}

// Prefetches for R rows at block b: the same block of the next rows and, at the first block, all of their scales.
template <class Q, size_t R>
__attribute__((always_inline)) inline void fetch_block(const QuantisedRow* next, size_t b, size_t blocks,
                                                       size_t block) {
  for (size_t r = 0; next != nullptr && r < R; ++r) {
    fetch_part(next[r].data, b, block * (Q::bits - Q::residual_bits) / 8);
    if (Q::residual_bits != 0) fetch_part(next[r].residual, b, block * Q::residual_bits / 8);
    if (b == 0) fetch_bytes(next[r].scales, blocks * (next[r].short_scales ? sizeof(uint16_t) : sizeof(float)));
  }
}

template <class Q, size_t R, size_t M>
inline void project_quantised_tile(const QuantisedRow* rows, const QuantisedRow* next, size_t count, const float* x,
                                   size_t width, size_t block, float* out, size_t tokens) {
  V acc[R][M] = {};
  const size_t blocks = width / block;
  for (size_t b = 0; b < blocks; ++b) {
    fetch_block<Q, R>(next, b, blocks, block);
    // Scaled in every step, not once per block: sums that live across the inner loop would not stay in registers.
    for (size_t k = b * block; k < (b + 1) * block; k += Q::step) {
      V in[M][2];
      for (size_t t = 0; t < M; ++t) Q::split(x + t * width + k, in[t]);
      for (size_t r = 0; r < R; ++r) {
        V w[2];
        Q::load(rows[r], k, w);
        for (size_t t = 0; t < M; ++t) {
          V part = w[0] * in[t][0];
          part += w[1] * in[t][1];
          acc[r][t] += part * rows[r].scale(b);
        }
      }
    }
  }
  for (size_t r = 0; r < R; ++r)
    for (size_t t = 0; t < M; ++t) {
      const float total = sum(acc[r][t]);
      if (r < count) out[r * tokens + t] = total;
    }
}

template <class Q, size_t R, size_t M>
inline void accumulate_quantised_tile(const QuantisedRow* rows, const QuantisedRow* next, size_t row_count,
                                      const float* h, size_t tokens, size_t width, size_t block, float* y) {
  const size_t blocks = width / block;
  for (size_t first = 0; first < blocks; first += kScales) {
    const size_t count = blocks - first < kScales ? blocks - first : kScales;
    float weights[R][M][kScales] = {};
    for (size_t r = 0; r < row_count; ++r)
      for (size_t t = 0; t < M; ++t)
        for (size_t i = 0; i < count; ++i) weights[r][t][i] = h[r * tokens + t] * rows[r].scale(first + i);
    for (size_t i = 0; i < count; ++i) {
      const size_t b = first + i;
      fetch_block<Q, R>(next, b, blocks, block);
      for (size_t k = b * block; k < (b + 1) * block; k += Q::step) {
        V total[M][2];
        for (size_t t = 0; t < M; ++t) Q::split(y + t * width + k, total[t]);
        for (size_t r = 0; r < R; ++r) {
          V w[2];
          Q::load(rows[r], k, w);
          for (size_t t = 0; t < M; ++t)
            for (size_t j = 0; j < 2; ++j) total[t][j] += splat(weights[r][t][i]) * w[j];
        }
        for (size_t t = 0; t < M; ++t) Q::join(total[t], y + t * width + k);
      }
    }
  }
}

// Rows of integers are processed so fast that the block after the next one is prefetched.
constexpr size_t kFetched = 2 * kBlock;
static_assert(kFetched <= kLeastAhead, "the next pass must have enough rows to prefetch");

// Like walk, but always kBlock rows at a time: tile(rows, rows to fetch or null, first row, number of valid rows). The
// last tile is padded with copies of the last row, whose sums are ignored.
template <class Tile>
inline void walk_quantised(const Rows& rows, Picks picks, Ahead ahead, Tile tile) {
  QuantisedRow now[kBlock], next[kBlock];
  const bool follows = ahead.rows != nullptr && ahead.rows->type == rows.type;
  const size_t padded = (picks.count + kBlock - 1) / kBlock * kBlock;
  const auto take = [&](size_t first, QuantisedRow* block) {
    for (size_t r = 0; r < kBlock; ++r)
      block[r] = quantised_row(rows, picks.ids, first + r < picks.count ? first + r : picks.count - 1);
  };
  for (size_t i = 0; i < picks.count; i += kBlock) {
    const size_t then = i + kFetched;
    take(i, now);
    if (then < picks.count)
      take(then, next);
    else if (follows)
      for (size_t r = 0; r < kBlock; ++r) next[r] = quantised_row(*ahead.rows, ahead.ids, then - padded + r);
    tile(now, then < picks.count || follows ? next : static_cast<const QuantisedRow*>(nullptr), i,
         picks.count - i < kBlock ? picks.count - i : kBlock);
  }
}

constexpr size_t kQuantisedTile = W >= 16 ? 4 : 2;  // tokens of a tile, as kTile; one needs more registers

// Calls tile(rows, next rows, first row, first token, number of valid rows, row count and token count as types). With
// more than one token, a tile has four rows, as in `cover`.
template <class Tile>
inline void for_tiles(const Rows& rows, Picks picks, size_t tokens, Ahead ahead, Tile tile) {
  walk_quantised(rows, picks, ahead, [&](const QuantisedRow* now, const QuantisedRow* next, size_t i, size_t count) {
    if (tokens == 1) return tile(now, next, i, size_t{0}, count, Count<kBlock>(), Count<1>());
    for (size_t r = 0; r < count; r += 4) {
      const QuantisedRow* ahead_of = next == nullptr ? nullptr : next + r;
      const size_t left = count - r < 4 ? count - r : 4;
      cover_tokens<kQuantisedTile>(tokens, [&](size_t, size_t, size_t t, auto m) {
        tile(now + r, t > 0 ? nullptr : ahead_of, i + r, t, left, Count<4>(), m);
      });
    }
  });
}

#if defined(__AVX512VNNI__)
#include "kernels_vnni.hpp"
#endif

template <class Q>
const float* prepare_quantised(const Rows& rows, const float* x, size_t tokens, float* room) {
#if defined(__AVX512VNNI__)
  if (in_integers(rows, tokens)) return round_input<Q>(x, rows.width, room);
#endif
  (void)rows, (void)tokens, (void)room;
  return x;
}

// With floats, on any instruction set.
template <class Q>
void project_floats(const Rows& rows, Picks picks, const float* x, size_t tokens, float* out, Ahead ahead) {
  const size_t width = rows.width;
  for_tiles(rows, picks, tokens, ahead,
            [&](const QuantisedRow* now, const QuantisedRow* next, size_t i, size_t t, size_t count, auto r, auto m) {
              project_quantised_tile<Q, r.value, m.value>(now, next, count, x + t * width, width, rows.block,
                                                          out + i * tokens + t, tokens);
            });
}

template <class Q>
void accumulate_floats(const Rows& rows, Picks picks, const float* h, size_t tokens, float* y, Ahead ahead) {
  const size_t width = rows.width;
  for_tiles(rows, picks, tokens, ahead,
            [&](const QuantisedRow* now, const QuantisedRow* next, size_t i, size_t t, size_t count, auto r, auto m) {
              accumulate_quantised_tile<Q, r.value, m.value>(now, next, count, h + i * tokens + t, tokens, width,
                                                             rows.block, y + t * width);
            });
}

template <class Q>
void project_quantised(const Rows& rows, Picks picks, const float* x, size_t tokens, float* out, Ahead ahead) {
#if defined(__AVX512VNNI__)
  if (in_integers(rows, tokens)) return project_integers<Q>(rows, picks, x, out, ahead);
#endif
  project_floats<Q>(rows, picks, x, tokens, out, ahead);
}

template <class Q>
void accumulate_quantised(const Rows& rows, Picks picks, const float* h, size_t tokens, float* y, Ahead ahead) {
#if defined(__AVX512VNNI__)
  if (in_integers(rows, tokens)) return accumulate_integers<Q>(rows, picks, h, y, ahead);
#endif
  accumulate_floats<Q>(rows, picks, h, tokens, y, ahead);
}

}  // namespace
}  // namespace shadowllm
