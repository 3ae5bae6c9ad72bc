// The steps of one run of SparseAttention, for all of its calls together: rows of w_q and w_kv, the cache, one task per
// head and sequence, then rows of w_o.
#pragma once

#include "attend.hpp"

namespace shadowllm {
namespace {

class AttentionSteps {
 public:
  // Calls have the same number of sequences and tokens.
  AttentionSteps(const Kernels& kernels, const std::vector<Call>& calls, const std::vector<Memory>& memory,
                 const std::vector<Heads>& heads)
      : kernels_(kernels) {
    for (size_t i = 0; i < calls.size(); ++i) {
      const Call& call = calls[i];
      const Memory& own = memory[i];
      const float* low = call.nested() || heads[i].count > heads[i].full_count ? prepare_low(call, own) : nullptr;
      queries_.push_back(
          {call, own, heads[i], call.chunks(call.w_q, call.c_q), prepare(call, call.w_q, own.inputs), low});
      cached_.push_back({call, own, heads[i], call.kv_chunks(), prepare(call, call.w_kv, own.kv_inputs), low});
      outputs_.push_back({call, own, heads[i], call.chunks(call.w_o, call.c_o)});
      call.b_o.read(kernels_, 0, own.start, call.width);
      for (size_t place = 0; place < heads[i].count; ++place) attending_.emplace_back(i, place);
    }
  }

  void run(const Pool& pool) const {
    const Call& one = cached_.front().call;
    const size_t tokens = one.tokens(), kv_heads = one.kv_rows() == 0 ? 0 : one.kv_heads;
    Steps steps;
    add_projections(steps);
    steps.add(cached_.size() * kv_heads, [&, kv_heads](size_t task) {
      const Part& part = cached_[task / kv_heads];
      write_cache(kernels_, part.call, task % kv_heads, part.memory.kv);
    });
    steps.add(attending_.size() * one.batch, [&](size_t task) { attend(task / one.batch, task % one.batch); });
    add_chunks(steps, outputs_, [this](const Part& part, size_t c) { add_chunk(part, c); });
    steps.add(outputs_.size() * tokens, [&, tokens](size_t task) { finish(outputs_[task / tokens], task % tokens); });
    steps.run(pool);
  }

 private:
  // The queries of all heads, and keys and values, in one step.
  void add_projections(Steps& steps) const {
    size_t first = 0, second = 0;
    for (const Part& part : queries_) first = std::max(first, part.chunks.count());
    for (const Part& part : cached_) second = std::max(second, part.call.kv_rows() == 0 ? 0 : part.chunks.count());
    steps.add(first + second, [this, first](size_t task) {
      const bool is_query = task < first;
      const size_t c = is_query ? task : task - first;
      for (const Part& part : is_query ? queries_ : cached_)
        if (c < part.chunks.count()) is_query ? project(part, c) : project_cached(part, c);
    });
  }

  // The queries of a chunk, without bias.
  void project(const Part& part, size_t c) const {
    const Call& call = part.call;
    const Memory& own = part.memory;
    const size_t tokens = call.tokens(), full_rows = part.heads.full_count * call.head_dim;
    if (call.nested()) return project_nested(part, part.all(c));
    const Chunk full = part.full(c), low = part.low(c);
    kernels_.project(call.w_q, {part.heads.rows + full.begin, full.size()}, part.input, tokens,
                     own.queries + full.begin * tokens, {});
    if (low.size() > 0)
      kernels_.project(call.c_q, {part.heads.rows + full_rows + low.begin, low.size()}, part.low_input, tokens,
                       own.queries + (full_rows + low.begin) * tokens, {});
  }

  // The queries of a chunk of rows: from the copy, plus the residuals of the full heads, which come first.
  void project_nested(const Part& part, Chunk chunk) const {
    const Call& call = part.call;
    const size_t tokens = call.tokens(), first = chunk.begin * tokens;
    const Picks full = full_rows(call, part.heads, chunk);
    float *queries = part.memory.queries + first, *more = part.memory.residuals + first;
    kernels_.project(call.c_q, {part.heads.rows + chunk.begin, chunk.size()}, part.low_input, tokens, queries, {});
    kernels_.project(call.w_q, full, part.low_input, tokens, more, {});
    for (size_t i = 0; i < full.count * tokens; ++i) queries[i] += call.w_q.step * more[i];
  }

  // Keys and values of a chunk of rows, without bias.
  void project_cached(const Part& part, size_t c) const {
    const Call& call = part.call;
    const Chunk chunk = part.chunks[c];
    const Picks picks{nullptr, chunk.size()};
    const size_t tokens = call.tokens(), first = chunk.begin * tokens;
    const Rows rows = call.w_kv.from(chunk.begin);
    float *products = part.memory.kv + first, *more = part.memory.kv_residuals + first;
    if (!call.nested()) return kernels_.project(rows, picks, part.input, tokens, products, {});
    kernels_.project(call.c_kv.from(chunk.begin), picks, part.low_input, tokens, products, {});
    kernels_.project(rows, picks, part.low_input, tokens, more, {});
    for (size_t i = 0; i < chunk.size() * tokens; ++i) products[i] += rows.step * more[i];
  }

  // Replaces the queries of one head and sequence by contexts.
  void attend(size_t which, size_t sequence) const {
    const auto [i, place] = attending_[which];
    const Part& part = queries_[i];
    const Memory& own = part.memory;
    attend_head(kernels_, part.call, static_cast<size_t>(part.heads.ids[place]), sequence,
                own.queries + place * part.call.head_dim * part.call.tokens(),
                own.work + (place * part.call.batch + sequence) * own.task_size);
  }

  // Adds up the output projection of a chunk of rows, into its part of the memory.
  void add_chunk(const Part& part, size_t c) const {
    const Call& call = part.call;
    const Memory& memory = part.memory;
    const Heads& heads = part.heads;
    const size_t tokens = call.tokens(), size = tokens * call.width, first_low = heads.full_count * call.head_dim;
    const Chunk full = part.full(c), low = part.low(c);
    float *sum = memory.parts + c * size, *padded = memory.low_parts + c * tokens * call.padded(call.c_o);
    std::fill(sum, sum + size, 0.0f);
    if (call.nested()) return add_nested(part, part.all(c), padded, sum);
    kernels_.accumulate(call.w_o, {heads.rows + full.begin, full.size()}, memory.queries + full.begin * tokens, tokens,
                        sum, {});
    if (low.size() > 0)
      with_padding(call, padded, sum, [&](float* to) {
        kernels_.accumulate(call.c_o, {heads.rows + first_low + low.begin, low.size()},
                            memory.queries + (first_low + low.begin) * tokens, tokens, to, {});
      });
  }

  // The same with rows of the copy, plus the residuals of the full heads.
  void add_nested(const Part& part, Chunk chunk, float* padded, float* sum) const {
    const Call& call = part.call;
    const size_t tokens = call.tokens(), first = chunk.begin * tokens;
    const Picks full = full_rows(call, part.heads, chunk);
    const float* contexts = part.memory.queries + first;
    float* scaled = part.memory.residuals + first;
    for (size_t i = 0; i < full.count * tokens; ++i) scaled[i] = call.w_o.step * contexts[i];
    with_padding(call, padded, sum, [&](float* to) {
      kernels_.accumulate(call.c_o, {part.heads.rows + chunk.begin, chunk.size()}, contexts, tokens, to, {});
      kernels_.accumulate(call.w_o, full, scaled, tokens, to, {});
    });
  }

  // The rows of a chunk that belong to full heads.
  static Picks full_rows(const Call& call, const Heads& heads, Chunk chunk) {
    const size_t end = std::min(chunk.end, heads.full_count * call.head_dim);
    return {heads.rows + chunk.begin, end > chunk.begin ? end - chunk.begin : 0};
  }

  // The result of one token of a call: its parts in order, the bias, and the residual.
  void finish(const Part& part, size_t token) const {
    const Call& call = part.call;
    const size_t width = call.width, at = token * width;
    float* y = call.y + at;
    kernels_.reduce(part.memory.parts + at, part.chunks.count(), call.tokens() * width,
                    call.b_o.data != nullptr ? part.memory.start : nullptr, y, width);
    for (size_t k = 0; call.residual != nullptr && k < width; ++k) y[k] += call.residual[at + k];
  }

  // The input for rows of a matrix that are no residuals.
  const float* prepare(const Call& call, const Rows& rows, float* room) const {
    if (rows.data == nullptr || call.nested()) return nullptr;
    return kernels_.prepare(rows, call.x, call.tokens(), room);
  }

  // The input for the copy: x, with zeros up to a whole number of blocks.
  const float* prepare_low(const Call& call, const Memory& memory) const {
    const size_t wide = call.padded(call.c_q), tokens = call.tokens();
    const float* x = call.x;
    if (wide != 0) {
      std::fill(memory.low_x, memory.low_x + tokens * wide, 0.0f);
      for (size_t t = 0; t < tokens; ++t) std::copy_n(x + t * call.width, call.width, memory.low_x + t * wide);
      x = memory.low_x;
    }
    return kernels_.prepare(call.c_q, x, tokens, memory.low_inputs);
  }

  const Kernels& kernels_;
  std::vector<Part> queries_, cached_, outputs_;
  std::vector<std::pair<size_t, size_t>> attending_;  // a call, and the place of one of its heads
};

}  // namespace
}  // namespace shadowllm
