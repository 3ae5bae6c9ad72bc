// The cache of one head and sequence: writing to it, and attention over its visible part.
#pragma once

#include <cmath>

#include "attention_call.hpp"

namespace shadowllm {
namespace {

// A row of one head and token, from products by (row, token): with bias and rotary embedding (half-split).
inline void load_row(const Kernels& kernels, const Call& call, const Bias& bias, size_t head, bool rotated,
                     size_t token, const float* products, float* row) noexcept {
  const size_t d = call.head_dim, half = d / 2;
  bias.read(kernels, head * d, row, d);
  for (size_t j = 0; j < d; ++j) row[j] += products[j * call.tokens() + token];
  if (!rotated || call.cos == nullptr) return;
  const float *cos = call.cos + token * half, *sin = call.sin + token * half;
  for (size_t j = 0; j < half; ++j) {
    const float one = row[j], two = row[half + j];
    row[j] = one * cos[j] - two * sin[j];
    row[half + j] = two * cos[j] + one * sin[j];
  }
}

// Writes the keys and values of one cached head to the cache, for all tokens.
inline void write_cache(const Kernels& kernels, const Call& call, size_t head, const float* products) noexcept {
  const size_t d = call.head_dim, values = call.kv_heads;  // the first head of the values
  for (size_t token = 0; token < call.tokens(); ++token) {
    const size_t b = token / call.seqlen, past = static_cast<size_t>(call.lengths[b]) - call.seqlen;
    const size_t place = (b * call.kv_heads + head) * call.capacity + past + token % call.seqlen;
    const float* key = products + head * d * call.tokens();
    const float* value = products + (values + head) * d * call.tokens();
    load_row(kernels, call, call.b_kv, head, true, token, key, call.new_keys + place * d);
    load_row(kernels, call, call.b_kv, values + head, false, token, value, call.new_values + place * d);
  }
}

// Replaces the queries of one head and sequence by its contexts. Only visible positions of the cache are read.
inline void attend_head(const Kernels& kernels, const Call& call, size_t head, size_t b, float* queries,
                        float* work) noexcept {
  const size_t d = call.head_dim, tokens = call.tokens();
  const size_t past = static_cast<size_t>(call.lengths[b]) - call.seqlen;
  const size_t first = (b * call.kv_heads + head / call.group) * call.capacity;
  const Rows keys = call.key.from(first), values = call.value.from(first);
  const float scale = 1 / std::sqrt(static_cast<float>(d));
  float *query = work, *context = work + d, *scores = work + 2 * d;
  for (size_t s = 0; s < call.seqlen; ++s) {
    const size_t token = b * call.seqlen + s, visible = past + s + 1;
    load_row(kernels, call, call.b_q, head, true, token, queries, query);
    for (size_t j = 0; j < d; ++j) query[j] *= scale;
    kernels.project(keys, {nullptr, visible}, query, 1, scores, {});
    const float total = kernels.exponentials(scores, visible);
    std::fill(context, context + d, 0.0f);
    kernels.accumulate(values, {nullptr, visible}, scores, 1, context, {});
    for (size_t j = 0; j < d; ++j) queries[j * tokens + token] = context[j] / total;
  }
}

}  // namespace
}  // namespace shadowllm
