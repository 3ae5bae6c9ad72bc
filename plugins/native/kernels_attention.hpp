// Kernels for the attention of several queries to positions of a cache that lie one after the other, part of
// kernels.hpp. All sums of a tile stay in registers.
#pragma once

namespace shadowllm {
namespace {

constexpr size_t kFar = 2 * W;    // how many positions ahead keys are prefetched
constexpr size_t kStrip = 4 * W;  // elements of a value that are added up together
constexpr size_t kCached = 256;   // values that stay in the cache while all queries read them

// In lane i, the sum of v[i], of N vectors: the sums of pairs of lanes, then of pairs of these, and so on.
template <size_t N>
inline V sums_of_all(V* v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    VI even, odd;
    for (size_t i = 0; i < W; ++i) even[i] = static_cast<int32_t>(2 * i), odd[i] = static_cast<int32_t>(2 * i + 1);
#pragma GCC unroll 8
    for (size_t i = 0; i < N; i += 2)
      v[i / 2] = __builtin_shuffle(v[i], v[i + 1], even) + __builtin_shuffle(v[i], v[i + 1], odd);
    return sums_of_all<N / 2>(v);
  }
}

// Prefetches part `i` of `parts` of `count` rows.
__attribute__((always_inline)) inline void fetch_part(const char* rows, size_t count, size_t stride, size_t i,
                                                      size_t parts) {
  const size_t lines = (count * stride + 63) / 64;
  for (size_t line = lines * i / parts; line < lines * (i + 1) / parts; ++line)
    __builtin_prefetch(rows + line * 64, 0, 2);
}

// out[i] = the product of row i and x, for W rows. If there are only `count`, the last one is repeated, so that a
// product does not depend on the number of rows.
template <class T>
__attribute__((always_inline)) inline void score_rows(const T* rows, size_t stride, size_t count, const float* x,
                                                      size_t width, float* out) {
  V acc[W] = {};
  size_t k = 0;
  for (; k + W <= width; k += W) {
    const V in = load(x + k);
    const T* row = rows + k;
#pragma GCC unroll 16
    for (size_t r = 0; r < W; ++r) {
      acc[r] += load(row) * in;
      if (r + 1 < count) row += stride;
    }
  }
  store(out, sums_of_all<W>(acc));
  for (; k < width; ++k)
    for (size_t r = 0; r < W; ++r) out[r] += load_one(rows + (r < count ? r : count - 1) * stride + k) * x[k];
}

template <class T>
void attention_scores_as(const Rows& keys, const Rows& values, size_t count, const float* x, size_t tokens, float* out,
                         size_t stride) {
  const T* rows = static_cast<const T*>(keys.data);
  const char *bytes = static_cast<const char*>(keys.data), *then = static_cast<const char*>(values.data);
  const size_t width = keys.width, step = keys.stride / sizeof(T);
  for (size_t i = 0; i < count; i += W) {
    const size_t left = count - i, now = left < W ? left : W, after = left > kFar ? left - kFar : 0;
    for (size_t t = 0; t < tokens; ++t) {
      fetch_part(bytes + (i + kFar) * keys.stride, after < W ? after : W, keys.stride, t, tokens);
      if (i < kCached) fetch_part(then + i * values.stride, now, values.stride, t, tokens);
      const float* in = x + t * width;
      float* to = out + t * stride + i;
      if (now == W)  // with a constant, no row is chosen
        score_rows(rows + i * step, step, W, in, width, to);
      else
        score_rows(rows + i * step, step, now, in, width, to);
    }
  }
}

// y[t * width + k] += sum over i of weights[t * stride + i] * rows[i][k], for M tokens and N vectors.
template <class T, size_t M, size_t N>
inline void add_columns(const T* rows, size_t step, size_t count, const float* weights, size_t stride, float* y,
                        size_t width) {
  V acc[M][N];
  for (size_t t = 0; t < M; ++t)
    for (size_t n = 0; n < N; ++n) acc[t][n] = load(y + t * width + n * W);
  for (size_t i = 0; i < count; ++i, rows += step)
#pragma GCC unroll 4
    for (size_t n = 0; n < N; ++n) {
      const V value = load(rows + n * W);
#pragma GCC unroll 4
      for (size_t t = 0; t < M; ++t) acc[t][n] += splat(weights[t * stride + i]) * value;
    }
  for (size_t t = 0; t < M; ++t)
    for (size_t n = 0; n < N; ++n) store(y + t * width + n * W, acc[t][n]);
}

// Adds some values to the sums of all tokens.
template <class T>
inline void add_values(const T* rows, size_t step, size_t count, const float* weights, size_t tokens, size_t stride,
                       float* y, size_t width) {
  cover_tokens<kTile>(tokens, [&](size_t, size_t, size_t first, auto m) {
    constexpr size_t M = m.value;
    const float* of = weights + first * stride;
    float* to = y + first * width;
    size_t k = 0;
    for (; k + kStrip <= width; k += kStrip)
      add_columns<T, M, kStrip / W>(rows + k, step, count, of, stride, to + k, width);
    for (; k + W <= width; k += W) add_columns<T, M, 1>(rows + k, step, count, of, stride, to + k, width);
    for (; k < width; ++k)
      for (size_t t = 0; t < M; ++t)
        for (size_t i = 0; i < count; ++i) to[t * width + k] += of[t * stride + i] * load_one(rows + i * step + k);
  });
}

template <class T>
void attention_sum_as(const Rows& values, size_t count, const float* weights, size_t tokens, size_t stride, float* y) {
  const T* rows = static_cast<const T*>(values.data);
  const size_t width = values.width, step = values.stride / sizeof(T);
  memset(y, 0, tokens * width * sizeof(float));
  for (size_t i = 0; i < count; i += kCached) {
    const size_t now = count - i < kCached ? count - i : kCached;
    add_values(rows + i * step, step, now, weights + i, tokens, stride, y, width);
  }
}

void attention_scores(const Rows& keys, const Rows& values, size_t count, const float* x, size_t tokens, float* out,
                      size_t stride) {
  switch (keys.type) {
    case RowType::bf16: return attention_scores_as<Bf16>(keys, values, count, x, tokens, out, stride);
    case RowType::f16: return attention_scores_as<F16>(keys, values, count, x, tokens, out, stride);
    default: return attention_scores_as<float>(keys, values, count, x, tokens, out, stride);
  }
}

void attention_sum(const Rows& values, size_t count, const float* weights, size_t tokens, size_t stride, float* y) {
  switch (values.type) {
    case RowType::bf16: return attention_sum_as<Bf16>(values, count, weights, tokens, stride, y);
    case RowType::f16: return attention_sum_as<F16>(values, count, weights, tokens, stride, y);
    default: return attention_sum_as<float>(values, count, weights, tokens, stride, y);
  }
}

}  // namespace
}  // namespace shadowllm
