// The attention of the heads that share a KV head.
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

// The active heads of a selection that share a KV head.
struct SharedHeads {
  const Call& call;
  const int32_t* ids;          // of all active heads
  std::vector<size_t> places;  // of these heads among them
  float* queries;              // of all active heads; later the contexts
  float* work;                 // room for these heads of every sequence

  size_t head(size_t i) const { return static_cast<size_t>(ids[places[i]]); }
  float* query(size_t i) const { return queries + places[i] * call.head_dim * call.tokens(); }
};

// Replaces the queries of one sequence by their contexts. Only visible positions of the cache are read, once for all
// heads.
inline void attend(const Kernels& kernels, const SharedHeads& heads, size_t b) noexcept {
  const Call& call = heads.call;
  const size_t d = call.head_dim, tokens = call.tokens(), n = heads.places.size();
  const size_t past = static_cast<size_t>(call.lengths[b]) - call.seqlen;
  const size_t first = (b * call.kv_heads + heads.head(0) / call.group) * call.capacity;
  const auto from = [](Rows rows, size_t row) {
    rows.data = static_cast<const char*>(rows.data) + row * rows.stride;
    return rows;
  };
  float *queries = heads.work + b * n * call.head_room(), *contexts = queries + n * d, *scores = contexts + n * d;
  const size_t stride = whole_lines(call.longest);
  float* totals = scores + n * stride;
  for (size_t s = 0; s < call.seqlen; ++s) {
    const size_t token = b * call.seqlen + s, end = past + s + 1, start = call.first_visible(end), count = end - start;
    for (size_t i = 0; i < n; ++i) load_query(kernels, call, heads.head(i), token, heads.query(i), queries + i * d);
    const Rows keys = from(call.key, first + start), values = from(call.value, first + start);
    kernels.attention_scores(keys, values, count, queries, n, scores, stride);
    for (size_t i = 0; i < n; ++i) {
      float largest;
      totals[i] = kernels.exponentials(scores + i * stride, count, &largest);
      if (largest == -INFINITY) totals[i] = NAN;  // scores that are all -infinity, or NaN, have no softmax
    }
    kernels.attention_sum(values, count, scores, n, stride, contexts);
    for (size_t i = 0; i < n; ++i)
      for (size_t j = 0; j < d; ++j) heads.query(i)[j * tokens + token] = contexts[i * d + j] / totals[i];
  }
}

}  // namespace
}  // namespace shadowllm
