// What one call of SparseMLP works on: matrices, biases, selections, and their memory.
#pragma once

#include <algorithm>

#include "op.hpp"
#include "room.hpp"

namespace shadowllm {
namespace {  // other ops have types with the same names

constexpr size_t kTokenBlock = 64;  // tokens per pass over the weights

struct Bias {
  const void* data = nullptr;
  RowType type = RowType::f32;

  // h[i * tokens + t] += bias[ids[i]]
  void add(const Kernels& kernels, Picks picks, size_t tokens, float* h) const {
    if (data == nullptr) return;
    for (size_t i = 0; i < picks.count; ++i) {
      float value;
      kernels.widen(static_cast<const char*>(data) + picks.ids[i] * element_size(type), type, &value, 1);
      for (size_t t = 0; t < tokens; ++t) h[i * tokens + t] += value;
    }
  }
};

// The three matrices, in one precision. Without a gate, `gate` is `up`.
struct Matrices {
  Rows gate, up, down;
  bool gated;

  size_t cost() const { return up.cost() + down.cost() + (gated ? gate.cost() : 0); }
};

// Vectors x in the form that `project` reads with the rows of gate and of up.
struct Inputs {
  const float *gate = nullptr, *up = nullptr;
};

// One selection, and the tokens that share it.
struct Call {
  Matrices full, low;  // low only if copied
  Bias b_gate, b_up, b_down;
  size_t width, neurons, tokens;
  bool choosing, copied, rest;  // copied: the low-bit copy is read
  bool gate_first;              // the neurons whose gate is not zero are active
  size_t full_count;            // neurons computed from their full rows
  const float* norms;           // only if choosing
  Picks picks;                  // the active neurons; ids is null until they are chosen
  const float* x;
  float* y;
  int32_t* listed;  // where the active neurons are listed; null if they are not

  // Whether the full rows are the copy plus residuals.
  bool nested() const { return full.up.step != 0; }
  // Whether neurons are chosen by their products from the copy.
  bool scoring() const { return choosing && full_count < neurons; }
  // Whether the products with which they are chosen are still there when the result is computed.
  bool kept() const { return scoring() && tokens <= kTokenBlock; }
  bool padded() const { return copied && low.up.width != width; }

  // Chunks of all neurons if there is a copy, or of the full ones. Either is a function of sizes and of the count.
  Chunks chunks(size_t tokens_now) const {
    if (!copied) return Chunks(full_count, full.cost(), tokens_now);
    const size_t bytes = neurons * low.cost() + full_count * full.cost();
    return Chunks(neurons, neurons == 0 ? 0 : bytes / neurons, tokens_now);
  }
};

// Moves the neurons with a nonzero output to the front and returns their number. After ReLU most outputs are zero, and
// the rows of w_down for zeros need not be read. `kept_ids` may be picks.ids.
inline size_t drop_zeros(Picks picks, size_t tokens, float* h, int32_t* kept_ids) {
  size_t kept = 0;
  for (size_t i = 0; i < picks.count; ++i) {
    const float* from = h + i * tokens;
    if (std::all_of(from, from + tokens, [](float value) { return value == 0; })) continue;
    if (kept != i) std::copy(from, from + tokens, h + kept * tokens);
    kept_ids[kept++] = picks.ids[i];
  }
  return kept;
}

// Memory for the choice, which is the same for all tokens. A mark is 1 if the neuron is active.
struct ChoiceRoom {
  float* scores = nullptr;
  int32_t *keys = nullptr, *all = nullptr, *chosen = nullptr, *marks = nullptr;

  ChoiceRoom() = default;
  ChoiceRoom(Room& room, const Call& call) {
    const size_t if_copied = call.copied ? call.neurons : 0, if_choosing = call.choosing ? call.neurons : 0;
    scores = room.floats(if_copied);
    keys = room.integers(if_copied);
    marks = room.integers(std::max(if_copied, if_choosing));
    chosen = room.integers(if_copied);
    all = room.integers(std::max(if_copied, if_choosing));
  }
};

// Memory for one block of tokens. Everything that starts with low belongs to the copy.
struct BlockRoom {
  float *inputs, *hidden, *ups, *parts, *start;
  float *low_x, *low_inputs, *low_hidden, *low_gates, *low_ups, *low_parts;
  int32_t *kept, *low_kept;
  size_t tokens;

  BlockRoom(Room& room, const Call& call, size_t tokens) : tokens(tokens) {
    const size_t count = call.chunks(tokens).count(), low_width = call.copied ? call.low.up.width : 0;
    const size_t low_neurons = call.copied ? call.neurons : 0, padded = call.padded() ? tokens * low_width : 0;
    inputs = room.floats(2 * tokens * input_floats(call.width));
    hidden = room.floats(call.full_count * tokens);
    ups = room.floats(call.full_count * tokens);
    parts = room.floats(count * tokens * call.width);
    start = room.floats(call.width);
    low_x = room.floats(padded);
    low_inputs = room.floats(2 * tokens * input_floats(low_width));
    low_hidden = room.floats(low_neurons * tokens);
    low_gates = room.floats(call.low.gated ? low_neurons * tokens : 0);
    low_ups = room.floats(low_neurons * tokens);
    low_parts = room.floats(count * padded);
    kept = room.integers(call.full_count);
    low_kept = room.integers(low_neurons);
  }
};

// A block of tokens that share a selection.
struct Block {
  const Call& call;
  const ChoiceRoom& choice;
  BlockRoom room;
  Chunks chunks;
  Inputs inputs, low_inputs;
  const float* x;
  float* y;

  // Where chunk c is added up, (tokens, width).
  float* sum(size_t c) const { return room.parts + c * room.tokens * call.width; }
  // Where its rows of the copy are added up: the same place, or another one if they are wider than the result.
  float* low_sum(size_t c) const {
    return call.padded() ? room.low_parts + c * room.tokens * call.low.down.width : sum(c);
  }
  void clear(size_t c) const {
    std::fill_n(sum(c), room.tokens * call.width, 0.0f);
    if (call.padded()) std::fill_n(low_sum(c), room.tokens * call.low.down.width, 0.0f);
  }
  void add_padded(size_t c) const {
    for (size_t t = 0; call.padded() && t < room.tokens; ++t)
      for (size_t k = 0; k < call.width; ++k) sum(c)[t * call.width + k] += low_sum(c)[t * call.low.down.width + k];
  }
};

// Blocks with the same chunks and one token each, or a single block. The rows of the copy are read once for all of
// them. Each is computed in the order that it would have alone.
struct Batch {
  static constexpr size_t kMost = 8;
  const Block* blocks[kMost];
  size_t count;
  Chunks chunks;

  explicit Batch(const Block& block) : blocks{&block}, count(1), chunks(block.chunks) {}

  const Block& front() const { return *blocks[0]; }
  const Block* const* begin() const { return blocks; }
  const Block* const* end() const { return blocks + count; }

  // Adds the block if it fits in.
  bool take(const Block& block) {
    const Call &one = front().call, &other = block.call;
    if (count == kMost || one.tokens != 1 || other.tokens != 1 || !one.copied || !other.copied ||
        one.full_count != other.full_count || one.rest != other.rest)
      return false;
    blocks[count++] = &block;
    return true;
  }

  // The products of rows with input(block), written to out(block). `next`: the rows of another matrix that are read
  // then; null if there are none.
  template <class Input, class Out>
  void project(const Kernels& kernels, const Rows& rows, Picks picks, const Rows* next, Input input, Out out) const {
    const float* inputs[kMost];
    float* outs[kMost];
    const Block& first = front();
    if (count == 1)
      return kernels.project(rows, picks, input(first), first.room.tokens, out(first), Ahead::of(next, picks));
    for (size_t i = 0; i < count; ++i) inputs[i] = input(*blocks[i]), outs[i] = out(*blocks[i]);
    kernels.project_each(rows, picks, inputs, count, outs);
  }

  // Adds rows times h(block) to to(block).
  template <class Factors, class To>
  void accumulate(const Kernels& kernels, const Rows& rows, Picks picks, Factors h, To to) const {
    const float* factors[kMost];
    float* sums[kMost];
    if (count == 1) return kernels.accumulate(rows, picks, h(front()), front().room.tokens, to(front()), {});
    for (size_t i = 0; i < count; ++i) factors[i] = h(*blocks[i]), sums[i] = to(*blocks[i]);
    kernels.accumulate_each(rows, picks, factors, count, sums);
  }
};

inline std::vector<Batch> in_batches(const std::vector<Block>& blocks) {
  std::vector<Batch> batches;
  for (const Block& block : blocks)
    if (std::none_of(batches.begin(), batches.end(), [&](Batch& batch) { return batch.take(block); }))
      batches.emplace_back(block);
  return batches;
}

// Memory for all selections: for the choice of each, and for a block of its tokens.
struct Memory {
  std::vector<ChoiceRoom> choices;
  std::vector<float*> blocks;

  Memory(Room& room, const std::vector<Call>& calls) {
    for (const Call& call : calls) {
      const size_t last = call.tokens % kTokenBlock, most = std::min(kTokenBlock, call.tokens);
      Room longest(nullptr), rest(nullptr);
      (void)BlockRoom(longest, call, most), (void)BlockRoom(rest, call, last);
      choices.emplace_back(room, call);
      blocks.push_back(room.floats(std::max(longest.used(), rest.used())));
    }
  }
};

// Calls pass(blocks) for each block of tokens, with those of all selections.
template <class Pass>
inline void for_blocks(const std::vector<Call>& calls, const Memory& memory, Pass pass) {
  for (size_t first = 0; !calls.empty() && first < calls.front().tokens; first += kTokenBlock) {
    std::vector<Block> blocks;
    for (size_t i = 0; i < calls.size(); ++i) {
      const Call& call = calls[i];
      Room room(memory.blocks[i]);
      const BlockRoom own(room, call, std::min(kTokenBlock, call.tokens - first));
      const size_t at = first * call.width;
      blocks.push_back({call, memory.choices[i], own, call.chunks(own.tokens), {}, {}, call.x + at, call.y + at});
    }
    pass(blocks);
  }
}

}  // namespace
}  // namespace shadowllm
