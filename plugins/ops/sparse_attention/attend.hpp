// The attention of one head and sequence over the visible cache.
#pragma once

#include <cmath>

#include "attention_call.hpp"

namespace shadowllm {
namespace {

// One token's query: bias, rotary embedding (half-split), and the scale 1 / sqrt(d) of the scores.
inline void load_query(const Kernels& kernels, const Call& call, size_t head, size_t token, const float* queries,
                       float* query) noexcept {
  const size_t d = call.head_dim, half = d / 2;
  std::fill(query, query + d, 0.0f);
  if (call.b_q.present())
    kernels.widen(call.b_q.as<char>() + head * d * element_size(call.b_q_type), call.b_q_type, query, d);
  for (size_t j = 0; j < d; ++j) query[j] += queries[j * call.tokens() + token];
  if (call.cos != nullptr) {
    const float *cos = call.cos + token * half, *sin = call.sin + token * half;
    for (size_t j = 0; j < half; ++j) {
      const float one = query[j], two = query[half + j];
      query[j] = one * cos[j] - two * sin[j];
      query[half + j] = two * cos[j] + one * sin[j];
    }
  }
  const float scale = 1 / std::sqrt(static_cast<float>(d));
  for (size_t j = 0; j < d; ++j) query[j] *= scale;
}

// Replaces the queries of one head and sequence by its contexts. Only visible positions of the cache are read.
inline void attend_head(const Kernels& kernels, const Call& call, size_t head, size_t b, float* queries,
                        float* work) noexcept {
  const size_t d = call.head_dim, tokens = call.tokens();
  const size_t past = static_cast<size_t>(call.lengths[b]) - call.seqlen;
  const size_t first = (b * call.kv_heads + head / call.group) * call.capacity;
  const auto from = [](Rows rows, size_t row) {
    rows.data = static_cast<const char*>(rows.data) + row * rows.stride;
    return rows;
  };
  float *query = work, *context = work + d, *scores = work + 2 * d;
  for (size_t s = 0; s < call.seqlen; ++s) {
    const size_t token = b * call.seqlen + s, end = past + s + 1, start = call.first_visible(end), count = end - start;
    load_query(kernels, call, head, token, queries, query);
    kernels.project(from(call.key, first + start), {nullptr, count}, query, 1, scores, {});
    const float total = kernels.exponentials(scores, count);
    std::fill(context, context + d, 0.0f);
    kernels.accumulate(from(call.value, first + start), {nullptr, count}, scores, 1, context, {});
    for (size_t j = 0; j < d; ++j) queries[j * tokens + token] = context[j] / total;
  }
}

}  // namespace
}  // namespace shadowllm
