// What one call of SparseAttention works on: its inputs in the form that the tasks read, its selections, and their
// memory.
#pragma once

#include <algorithm>

#include "op.hpp"
#include "room.hpp"

namespace shadowllm {
namespace {  // other ops have types with the same names

// Sizes are as in schema.py: hidden size D, H query heads of dimension d over n_kv cached ones. A head is full if its
// rows are those of w_q and w_o; the rest of the heads have their rows in the low-bit copy. If w_q and w_o are
// residuals of the copy, the rows of a full head are those of the copy plus the residuals.
// A call has the sequences that share one selection.
struct Call {
  size_t batch, seqlen, width, n_heads, group, kv_heads, capacity, head_dim, longest;
  size_t full_count, rest_count;  // the number of heads of each kind; if indices repeat, there may be fewer of the rest
  size_t window;                  // how many of the last positions a query sees; 0 means all
  size_t score_groups;            // 0 unless the op chooses the heads
  const int32_t* indices;         // null if the op chooses the heads
  int32_t* listed;                // where the active heads are listed; null if they are not
  Rows w_q, w_o, c_q, c_o, key, value;  // c_q and c_o only if they are read
  const float *x, *cos, *sin, *score_weight, *score_bias;
  float* y;
  const int32_t* lengths;
  Tensor b_q, b_o;
  RowType b_q_type, b_o_type;

  size_t tokens() const { return batch * seqlen; }
  // The first position that is visible to a query that sees positions up to `end`, without it.
  size_t first_visible(size_t end) const { return window != 0 && end > window ? end - window : 0; }
  size_t most_heads() const { return full_count + rest_count; }
  // Floats to attend with one head of one sequence: a query, a context, the scores of the cache, and their sum.
  size_t head_room() const { return 2 * head_dim + whole_lines(longest) + 1; }
  bool nested() const { return w_q.step != 0; }
  // Floats that rows of the copy need for each token, if they have more elements than x; otherwise 0.
  size_t padded(const Rows& low) const { return low.data != nullptr && low.width != width ? low.width : 0; }

  // Chunks of all rows, which depend on sizes and on the count only.
  Chunks chunks(const Rows& full, const Rows& low) const {
    const size_t heads = most_heads(), of_copy = nested() ? heads : rest_count;
    const size_t bytes = full_count * full.cost() + (of_copy > 0 ? of_copy * low.cost() : 0);
    return Chunks(heads * head_dim, heads == 0 ? 0 : bytes / heads, tokens());
  }
};

// The heads to attend to: the full ones, then the rest. `rows` has their rows in the same order.
struct Heads {
  int32_t *ids, *rows;
  size_t full_count, count;
};

// Everything that starts with low belongs to the copy.
struct Memory {
  float *inputs, *low_x, *low_inputs, *work, *parts, *low_parts, *start, *scores, *products;
  float* queries;    // by (row, token); later the contexts
  float* residuals;  // if nested: what residuals add to the queries of the full heads; later the contexts for them
  int32_t *keys, *groups, *heads, *rows;

  Memory(Room& room, const Call& call) {
    const size_t tokens = call.tokens(), heads_now = call.most_heads();
    const size_t out_chunks = call.chunks(call.w_o, call.c_o).count();
    inputs = room.floats(tokens * input_floats(call.width));
    low_x = room.floats(tokens * call.padded(call.c_q));
    low_inputs = room.floats(call.c_q.data != nullptr ? tokens * input_floats(call.c_q.width) : 0);
    queries = room.floats(heads_now * call.head_dim * tokens);
    residuals = room.floats(call.nested() ? call.full_count * call.head_dim * tokens : 0);
    work = room.floats(heads_now * call.batch * call.head_room());
    parts = room.floats(out_chunks * tokens * call.width);
    low_parts = room.floats(out_chunks * tokens * call.padded(call.c_o));
    start = room.floats(call.width);
    scores = room.floats(call.score_groups);
    products = room.floats(call.score_groups);
    keys = room.integers(call.score_groups);
    groups = room.integers(call.score_groups);
    heads = room.integers(std::max(heads_now, call.n_heads));
    rows = room.integers(heads_now * call.head_dim);
  }
};

// The rows of a matrix that a selection needs, in chunks. Those of all selections are visited in the same pass over the
// matrix, each in the order that it would have alone.
struct Part {
  const Call& call;
  const Memory& memory;
  const Heads& heads;
  Chunks chunks;
  const float *input = nullptr, *low_input = nullptr;

  // The chunks c of the rows of full heads, of the rest, and of both.
  Chunk full(size_t c) const { return chunks.of(heads.full_count * call.head_dim)[c]; }
  Chunk low(size_t c) const { return chunks.of((heads.count - heads.full_count) * call.head_dim)[c]; }
  Chunk all(size_t c) const { return chunks.of(heads.count * call.head_dim)[c]; }
};

// Calls add(to) with `sum`, or with zeros of padded rows, which are then added to it.
template <class Add>
inline void with_padding(const Call& call, float* padded, float* sum, Add add) {
  const size_t wide = call.padded(call.c_o), tokens = call.tokens();
  if (wide == 0) return add(sum);
  std::fill(padded, padded + tokens * wide, 0.0f);
  add(padded);
  for (size_t t = 0; t < tokens; ++t)
    for (size_t k = 0; k < call.width; ++k) sum[t * call.width + k] += padded[t * wide + k];
}

}  // namespace
}  // namespace shadowllm
