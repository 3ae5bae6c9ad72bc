// The kernels, written once over the compiler's vector types and compiled once per instruction set.
//
// Included by one source per instruction set, which defines SHADOWLLM_VECTOR_BYTES and is compiled with its flags.
// Everything is in an unnamed namespace and no C++ library function is used. Otherwise an inline function that is
// shared with the rest of the library could be compiled for AVX-512 here, and the linker could use it in the whole
// library.
#pragma once

#include "largest.hpp"
#include "vectors.hpp"

namespace shadowllm {
namespace {

template <class T>
inline const T* row(const Rows& rows, const int32_t* ids, size_t i) {
  const size_t id = ids == nullptr ? i : static_cast<size_t>(ids[i]);
  return reinterpret_cast<const T*>(static_cast<const char*>(rows.data) + id * rows.stride);
}

// Rows of a block. For one token, eight rows are read in parallel, as eight streams of loads. More tokens are compute
// bound and use tiles of four rows and up to kTile tokens, whose sums fit into the registers.
constexpr size_t kBlock = 8;
constexpr size_t kTile = W >= 16 ? 4 : 3;

// Prefetches into L2 the cache lines of `next` that hold `count` elements from k on. The hardware prefetcher cannot
// predict the next active row, so each block prefetches the next one.
template <class T>
__attribute__((always_inline)) inline void fetch(const T* next, size_t k, size_t count) {
  const char* from = reinterpret_cast<const char*>(next + k);
  for (size_t i = 0; i < count * sizeof(T); i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Elements of the inner step: a cache line, or a vector if that is longer.
template <class T>
constexpr size_t kStep = 64 / sizeof(T) > W ? 64 / sizeof(T) : W;

// Calls step(k) for every whole vector of a row, and ahead(k) for every kStep elements. Returns where the rest starts.
template <class T, class Step, class Ahead>
inline size_t for_row(size_t width, Step step, Ahead ahead) {
  size_t k = 0;
  for (; k + kStep<T> <= width;) {
    ahead(k);
    for (const size_t end = k + kStep<T>; k < end; k += W) step(k);
  }
  for (; k + W <= width; k += W) step(k);
  return k;
}

// Rows that a tile prefetches.
template <class T>
struct Next {
  const T* const* rows;
  size_t count;
};

template <class T, size_t R, size_t M>
inline void project_tile(const T* const* rows, Next<T> next, const float* x, size_t width, float* out, size_t tokens) {
  V acc[R][M];
#pragma GCC unroll 8
  for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (size_t t = 0; t < M; ++t) acc[r][t] = V{};
  const auto step = [&](size_t k) {
    V in[M];
    for (size_t t = 0; t < M; ++t) in[t] = load(x + t * width + k);
    for (size_t r = 0; r < R; ++r) {
      const V w = load(rows[r] + k);
      for (size_t t = 0; t < M; ++t) acc[r][t] += w * in[t];
    }
  };
  const auto ahead = [&](size_t k) {
    for (size_t r = 0; r < next.count; ++r) fetch(next.rows[r], k, kStep<T>);
  };
  const size_t rest = for_row<T>(width, step, ahead);
  static_assert(R % 4 == 0, "sums are of four vectors");
  float totals[M][R];
  for (size_t t = 0; t < M; ++t)
    for (size_t r = 0; r < R; r += 4)
      sums_of_four(acc[r][t], acc[r + 1][t], acc[r + 2][t], acc[r + 3][t], totals[t] + r);
  if (rest < width)
    for (size_t r = 0; r < R; ++r)
      for (size_t t = 0; t < M; ++t)
        for (size_t k = rest; k < width; ++k) totals[t][r] += load_one(rows[r] + k) * x[t * width + k];
#pragma GCC unroll 8
  for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (size_t t = 0; t < M; ++t) out[r * tokens + t] = totals[t][r];
}

// One row at a time. This is fastest for rows next to each other in memory, because the hardware prefetcher helps.
template <class T>
inline float project_row(const T* row, const T* next, const float* x, size_t width) {
  V acc[4] = {};
  size_t k = 0;
  for (; k + 4 * W <= width; k += 4 * W) {
    if (next != nullptr) fetch(next, k, 4 * W);
    for (size_t u = 0; u < 4; ++u) acc[u] += load(row + k + u * W) * load(x + k + u * W);
  }
  for (; k + W <= width; k += W) acc[0] += load(row + k) * load(x + k);
  float total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; k < width; ++k) total += load_one(row + k) * x[k];
  return total;
}

template <class T, size_t R, size_t M>
inline void accumulate_tile(const T* const* rows, Next<T> next, const float* h, size_t tokens, size_t width, float* y) {
  V weight[R][M];
  for (size_t r = 0; r < R; ++r)
    for (size_t t = 0; t < M; ++t) weight[r][t] = splat(h[r * tokens + t]);
  const auto step = [&](size_t k) {
    V total[M];
    for (size_t t = 0; t < M; ++t) total[t] = load(y + t * width + k);
    for (size_t r = 0; r < R; ++r) {
      const V w = load(rows[r] + k);
      for (size_t t = 0; t < M; ++t) total[t] += weight[r][t] * w;
    }
    for (size_t t = 0; t < M; ++t) store(y + t * width + k, total[t]);
  };
  const auto ahead = [&](size_t k) {
    for (size_t r = 0; r < next.count; ++r) fetch(next.rows[r], k, kStep<T>);
  };
  for (size_t k = for_row<T>(width, step, ahead); k < width; ++k)
    for (size_t r = 0; r < R; ++r)
      for (size_t t = 0; t < M; ++t) y[t * width + k] += h[r * tokens + t] * load_one(rows[r] + k);
}

// Calls block(row pointers, next row pointers or null, first row) for kBlock rows at a time, then single(pointer, row)
// for each of the rest.
template <class T, class Block, class Single>
inline void walk(const Rows& rows, Picks picks, Ahead ahead, Block block, Single single) {
  const T *now[kBlock], *next[kBlock];
  size_t i = 0;
  for (; i + kBlock <= picks.count; i += kBlock) {
    for (size_t r = 0; r < kBlock; ++r) now[r] = row<T>(rows, picks.ids, i + r);
    const T* const* to_fetch = next;
    if (i + 2 * kBlock <= picks.count)
      for (size_t r = 0; r < kBlock; ++r) next[r] = row<T>(rows, picks.ids, i + kBlock + r);
    else if (ahead.rows != nullptr && ahead.rows->type == rows.type)
      for (size_t r = 0; r < kBlock; ++r) next[r] = row<T>(*ahead.rows, ahead.ids, r);
    else
      to_fetch = nullptr;
    block(now, to_fetch, i);
  }
  for (; i < picks.count; ++i) single(row<T>(rows, picks.ids, i), i);
}

template <class T>
inline bool one_after_the_other(const T* const* rows, size_t stride) {
  return reinterpret_cast<const char*>(rows[kBlock - 1]) - reinterpret_cast<const char*>(rows[0]) ==
         static_cast<ptrdiff_t>((kBlock - 1) * stride);
}

// Calls f with a number of 1..Most as a type.
template <size_t Most, class F>
inline void with_count(size_t count, F f) {
  if (count == Most) return f(Count<Most>());
  if constexpr (Most > 1) with_count<Most - 1>(count, f);
}

// Calls tile(index of the tile, number of tiles, first token, token count as a type) to cover at least one token, in
// tiles of nearly the same size. A tile of one token is slow, because its few sums wait for each other.
template <size_t Most, class Tile>
inline void cover_tokens(size_t tokens, Tile tile) {
  const size_t tiles = (tokens + Most - 1) / Most;
  for (size_t i = 0, t = 0; i < tiles; ++i) {
    const size_t count = tokens / tiles + (i < tokens % tiles ? 1 : 0);
    with_count<Most>(count, [&](auto m) { tile(i, tiles, t, m); });
    t += count;
  }
}

// Calls tile(rows, next rows, first row of the block, first token, token count as a type) to cover a block. Every tile
// prefetches some of the next rows, so that memory is read all the time.
template <class T, class Tile>
inline void cover(const T* const* now, const T* const* next, size_t tokens, Tile tile) {
  for (size_t r = 0; r < kBlock; r += 4)
    cover_tokens<kTile>(tokens, [&](size_t i, size_t tiles, size_t t, auto m) {
      const size_t begin = i * 4 / tiles, end = (i + 1) * 4 / tiles;
      const Next<T> some = next == nullptr ? Next<T>{} : Next<T>{next + r + begin, end - begin};
      tile(now + r, some, r, t, m);
    });
}

template <class T>
inline Next<T> whole(const T* const* next) {
  return {next, next == nullptr ? 0 : kBlock};
}

template <class T>
void project_as(const Rows& rows, Picks picks, const float* x, size_t tokens, float* out, Ahead ahead) {
  const size_t width = rows.width;
  walk<T>(
      rows, picks, ahead,
      [&](const T* const* now, const T* const* next, size_t i) {
        if (tokens > 1) {
          cover(now, next, tokens, [&](const T* const* of, Next<T> then, size_t r, size_t t, auto m) {
            project_tile<T, 4, m.value>(of, then, x + t * width, width, out + (i + r) * tokens + t, tokens);
          });
        } else if (one_after_the_other(now, rows.stride)) {
          // The hardware prefetches a next block of consecutive rows.
          if (next != nullptr && one_after_the_other(next, rows.stride)) next = nullptr;
          for (size_t r = 0; r < kBlock; ++r)
            out[i + r] = project_row(now[r], next == nullptr ? nullptr : next[r], x, width);
        } else {
          project_tile<T, kBlock, 1>(now, whole(next), x, width, out + i, 1);
        }
      },
      [&](const T* now, size_t i) {
        for (size_t t = 0; t < tokens; ++t)
          out[i * tokens + t] = project_row(now, static_cast<const T*>(nullptr), x + t * width, width);
      });
}

template <class T>
void accumulate_as(const Rows& rows, Picks picks, const float* h, size_t tokens, float* y, Ahead ahead) {
  const size_t width = rows.width;
  walk<T>(
      rows, picks, ahead,
      [&](const T* const* now, const T* const* next, size_t i) {
        if (tokens == 1) return accumulate_tile<T, kBlock, 1>(now, whole(next), h + i, 1, width, y);
        cover(now, next, tokens, [&](const T* const* of, Next<T> then, size_t r, size_t t, auto m) {
          accumulate_tile<T, 4, m.value>(of, then, h + (i + r) * tokens + t, tokens, width, y + t * width);
        });
      },
      [&](const T* now, size_t i) {
        for (size_t t = 0; t < tokens; ++t)
          accumulate_tile<T, 1, 1>(&now, {}, h + i * tokens + t, tokens, width, y + t * width);
      });
}

}  // namespace
}  // namespace shadowllm

#include "kernels_quantised.hpp"
// After the kernels that it uses.
#include "kernels_attention.hpp"
#include "kernels_copy.hpp"

namespace shadowllm {
namespace {

const float* prepare(const Rows& rows, const float* x, size_t tokens, float* room) {
  switch (rows.type) {
    case RowType::i8: return prepare_quantised<Bits8>(rows, x, tokens, room);
    case RowType::i4: return prepare_quantised<Bits4>(rows, x, tokens, room);
    case RowType::c4:
    case RowType::c2:
    case RowType::n8:
    case RowType::n6: return prepare_copy(rows, x, tokens, room);
    default: return x;
  }
}

void project(const Rows& rows, Picks picks, const float* x, size_t tokens, float* out, Ahead ahead) {
  switch (rows.type) {
    case RowType::i8: return project_quantised<Bits8>(rows, picks, x, tokens, out, ahead);
    case RowType::i4: return project_quantised<Bits4>(rows, picks, x, tokens, out, ahead);
    case RowType::i2: return project_floats<Bits2>(rows, picks, x, tokens, out, ahead);
    case RowType::c4: return project_copy<Bits4>(rows, picks, x, tokens, out, ahead);
    case RowType::c2: return project_copy<Bits2>(rows, picks, x, tokens, out, ahead);
    case RowType::n8: return project_copy<Nested<Bits4>>(rows, picks, x, tokens, out, ahead);
    case RowType::n6: return project_copy<Nested<Bits2>>(rows, picks, x, tokens, out, ahead);
    case RowType::f32: return project_as<float>(rows, picks, x, tokens, out, ahead);
    case RowType::bf16: return project_as<Bf16>(rows, picks, x, tokens, out, ahead);
    case RowType::f16: return project_as<F16>(rows, picks, x, tokens, out, ahead);
  }
}

void accumulate(const Rows& rows, Picks picks, const float* h, size_t tokens, float* y, Ahead ahead) {
  switch (rows.type) {
    case RowType::i8: return accumulate_quantised<Bits8>(rows, picks, h, tokens, y, ahead);
    case RowType::i4: return accumulate_quantised<Bits4>(rows, picks, h, tokens, y, ahead);
    case RowType::i2: return accumulate_floats<Bits2>(rows, picks, h, tokens, y, ahead);
    case RowType::c4: return accumulate_copy<Bits4>(rows, picks, h, tokens, y);
    case RowType::c2: return accumulate_copy<Bits2>(rows, picks, h, tokens, y);
    case RowType::n8:
    case RowType::n6: return;  // no op adds such rows
    case RowType::f32: return accumulate_as<float>(rows, picks, h, tokens, y, ahead);
    case RowType::bf16: return accumulate_as<Bf16>(rows, picks, h, tokens, y, ahead);
    case RowType::f16: return accumulate_as<F16>(rows, picks, h, tokens, y, ahead);
  }
}

// Rows of a copy are loaded once for all tokens.
void project_each(const Rows& rows, Picks picks, const float* const* inputs, size_t tokens, float* const* out) {
  switch (rows.type) {
    case RowType::c4: return project_copy_each<Bits4>(rows, picks, inputs, tokens, out);
    case RowType::c2: return project_copy_each<Bits2>(rows, picks, inputs, tokens, out);
    case RowType::n8: return project_copy_each<Nested<Bits4>>(rows, picks, inputs, tokens, out);
    case RowType::n6: return project_copy_each<Nested<Bits2>>(rows, picks, inputs, tokens, out);
    default:
      for (size_t t = 0; t < tokens; ++t) project(rows, picks, inputs[t], 1, out[t], {});
  }
}

void accumulate_each(const Rows& rows, Picks picks, const float* const* h, size_t tokens, float* const* y) {
  switch (rows.type) {
    case RowType::c4: return accumulate_copy_each<Bits4>(rows, picks, h, tokens, y);
    case RowType::c2: return accumulate_copy_each<Bits2>(rows, picks, h, tokens, y);
    default:
      for (size_t t = 0; t < tokens; ++t) accumulate(rows, picks, h[t], 1, y[t], {});
  }
}

// Applies f to whole vectors, then to the rest in a padded one, so that a result does not depend on its position.
template <class F>
inline void for_vectors(float* h, size_t size, F f) {
  size_t i = 0;
  for (; i + W <= size; i += W) store(h + i, f(load(h + i), i));
  if (i == size) return;
  float rest[W] = {};
  memcpy(rest, h + i, (size - i) * sizeof(float));
  store(rest, f(load(rest), i));
  memcpy(h + i, rest, (size - i) * sizeof(float));
}

inline V relu(V x) { return x < 0.0f ? V{} : x; }  // keeps a NaN
inline V times_sigmoid(V x, V y) { return x / (exponential(-y) + 1.0f); }

void activate(Activation activation, float* h, const float* up, size_t size) {
  const float threshold = activation.threshold;
  switch (activation.kind) {
    case Activation::relu:
    case Activation::drelu: for_vectors(h, size, [](V x, size_t) { return relu(x); }); break;
    case Activation::relu2: for_vectors(h, size, [](V x, size_t) { return relu(x) * relu(x); }); break;
    case Activation::fatrelu: for_vectors(h, size, [=](V x, size_t) { return x <= threshold ? V{} : x; }); break;
    case Activation::silu: for_vectors(h, size, [](V x, size_t) { return times_sigmoid(x, x); }); break;
    case Activation::quick_gelu: for_vectors(h, size, [](V x, size_t) { return times_sigmoid(x, x * 1.702f); }); break;
    case Activation::gelu_tanh:  // (1 + tanh(u)) / 2 is the sigmoid of 2 u
      for_vectors(h, size, [](V x, size_t) { return times_sigmoid(x, (x + x * x * x * 0.044715f) * 1.59576912f); });
      break;
    case Activation::gelu:
      for (size_t i = 0; i < size; ++i) h[i] = 0.5f * h[i] * (1 + erff(h[i] * 0.70710678f));
      break;
  }
  if (up == nullptr) return;
  if (activation.kind == Activation::drelu)
    for (size_t i = 0; i < size; ++i) h[i] *= up[i] < 0 ? 0 : up[i];
  else
    for (size_t i = 0; i < size; ++i) h[i] *= up[i];
}

// NaNs are left out.
inline float largest_of(const float* h, size_t size) {
  V most = splat(-INFINITY);
  size_t i = 0;
  for (; i + W <= size; i += W) most = load(h + i) > most ? load(h + i) : most;
  float largest = -INFINITY;
  for (size_t lane = 0; lane < W; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  for (; i < size; ++i) largest = h[i] > largest ? h[i] : largest;
  return largest;
}

float exponentials(float* h, size_t size, float* largest) {
  *largest = largest_of(h, size);
  const float base = *largest == -INFINITY ? 0 : *largest;  // so that NaN stays
  for_vectors(h, size, [&](V x, size_t) { return exponential(x - base); });
  V total = {};
  size_t i = 0;
  for (; i + W <= size; i += W) total += load(h + i);
  float result = sum(total);
  for (; i < size; ++i) result += h[i];
  return result;
}

void reduce(const float* parts, size_t count, size_t stride, const float* start, float* y, size_t size) {
  if (start != nullptr)
    memcpy(y, start, size * sizeof(float));
  else
    memset(y, 0, size * sizeof(float));
  for (size_t p = 0; p < count; ++p) {
    const float* part = parts + p * stride;
    for_vectors(y, size, [&](V x, size_t i) {
      if (i + W <= size) return x + load(part + i);
      float rest[W] = {};
      memcpy(rest, part + i, (size - i) * sizeof(float));
      return x + load(rest);
    });
  }
}

template <class T>
void widen_as(const T* data, float* out, size_t size) {
  size_t i = 0;
  for (; i + W <= size; i += W) store(out + i, load(data + i));
  for (; i < size; ++i) out[i] = load_one(data + i);
}

void widen(const void* data, RowType type, float* out, size_t size) {
  switch (type) {
    case RowType::f32: return widen_as(static_cast<const float*>(data), out, size);
    case RowType::bf16: return widen_as(static_cast<const Bf16*>(data), out, size);
    case RowType::f16: return widen_as(static_cast<const F16*>(data), out, size);
    default: return;  // biases are never quantised
  }
}

size_t count_above(const int32_t* keys, size_t size, int32_t bound) {
  int32_t count = 0;
  for (size_t i = 0; i < size; ++i) count += keys[i] > bound;
  return static_cast<size_t>(count);
}

void order(const float* scores, size_t size, int32_t* keys) {
  for (size_t i = 0; i < size; ++i) keys[i] = sortable(scores[i]);
}

void group_maxima(const float* scores, size_t size, int32_t* keys) {
  for (size_t first = 0; first < size; first += kKeyGroup) {
    int32_t most = INT32_MIN;
    for (size_t i = first; i < (first + kKeyGroup < size ? first + kKeyGroup : size); ++i) {
      const int32_t key = sortable(scores[i]);
      most = key > most ? key : most;
    }
    keys[first / kKeyGroup] = most;
  }
}

size_t list_from(const int32_t* keys, size_t size, int32_t least, size_t most, int32_t* out) {
  size_t count = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i bound = _mm512_set1_epi32(least), step = _mm512_set1_epi32(16);
  __m512i places = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (; i + 16 <= size && count < most; i += 16) {
    const __mmask16 found = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys + i), bound);
    const size_t all = static_cast<size_t>(__builtin_popcount(found)), taken = all < most - count ? all : most - count;
    // Compressed in a register, because compressing to memory is slow on some CPUs.
    const __m512i listed = _mm512_maskz_compress_epi32(found, places);
    _mm512_mask_storeu_epi32(out + count, static_cast<__mmask16>((1u << taken) - 1), listed);
    count += taken;
    places = _mm512_add_epi32(places, step);
  }
#endif
  for (; i < size && count < most; ++i) {  // no branch on the data
    out[count] = static_cast<int32_t>(i);
    count += keys[i] >= least;
  }
  return count;
}

}  // namespace
}  // namespace shadowllm

#define SHADOWLLM_KERNELS(name)                                                             \
  {name,         prepare,         project,      tile_bytes,   write_tiles,      accumulate, \
   project_each, accumulate_each, activate,     exponentials, reduce,           widen,      \
   count_above,  order,           group_maxima, list_from,    attention_scores, attention_sum}
