// The steps of one run of SparseMLP, for all of its calls together: the scores of all neurons from the copy, the
// choice, and the products of a chunk of neurons.
#pragma once

#include <cmath>
#include <numeric>

#include "gate_first.hpp"
#include "largest.hpp"
#include "mlp_products.hpp"

namespace shadowllm {
namespace {

class MlpSteps {
 public:
  // Calls have the same number of tokens.
  MlpSteps(const Kernels& kernels, Activation activation, std::vector<Call>& calls, const Memory& memory)
      : kernels_(kernels), activation_(activation), calls_(calls), memory_(memory), passes_(blocks_of(calls, memory)) {}

  void run(const Pool& pool) {
    Steps steps;
    bool scoring = false;
    for (size_t i = 0; i < calls_.size(); ++i) {
      begin(calls_[i], memory_.choices[i]);
      scoring |= calls_[i].scoring();
    }
    add_norm(steps);
    if (scoring)
      for (std::vector<Block>& blocks : passes_) add_scores(steps, blocks);
    steps.add(calls_.size(), [this](size_t i) { choose(calls_[i], memory_.choices[i]); });
    for (std::vector<Block>& blocks : passes_) add_results(steps, blocks);
    steps.run(pool);
    for (size_t i = 0; i < calls_.size(); ++i)
      if (calls_[i].listed != nullptr && calls_[i].gate_first)
        list_marked(memory_.choices[i].marks, calls_[i].neurons, calls_[i].listed);
  }

 private:
  Inputs prepare(const Matrices& of, const float* x, size_t tokens, float* room) const {
    const float* up = kernels_.prepare(of.up, x, tokens, room);
    if (of.gate.type == of.up.type && of.gate.block == of.up.block) return {up, up};
    return {kernels_.prepare(of.gate, x, tokens, room + input_floats(of.up.width)), up};
  }

  // Inputs for the copy: x, with zeros up to a whole number of blocks.
  Inputs prepare_low(const Call& call, const BlockRoom& room, const float* x) const {
    if (call.padded()) {
      const size_t wide = call.low.up.width;
      std::fill(room.low_x, room.low_x + room.tokens * wide, 0.0f);
      for (size_t t = 0; t < room.tokens; ++t)
        std::copy(x + t * call.width, x + (t + 1) * call.width, room.low_x + t * wide);
      x = room.low_x;
    }
    return prepare(call.low, x, room.tokens, room.low_inputs);
  }

  // h[i * tokens + t] = act(gate + b_gate) * (up + b_up) of the picked neurons. `after`: the rows that are read next.
  void products(const Call& call, const Matrices& of, Picks picks, Inputs inputs, size_t tokens, const Rows* after,
                float* h, float* u) const {
    const bool enough = picks.count >= kLeastAhead;
    if (of.gated) {
      kernels_.project(of.gate, picks, inputs.gate, tokens, h, {enough ? &of.up : nullptr, picks.ids});
      call.b_gate.add(kernels_, picks, tokens, h);
    } else {
      u = h;
    }
    kernels_.project(of.up, picks, inputs.up, tokens, u, {enough ? after : nullptr, picks.ids});
    call.b_up.add(kernels_, picks, tokens, u);
    kernels_.activate(activation_, h, of.gated ? u : nullptr, picks.count * tokens);
  }

  // Adds a chunk of a block to the scores of all neurons: norm * sum over the tokens of |product|.
  void score(const Block& block, Chunk chunk) const {
    const Call& call = block.call;
    const BlockRoom& room = block.room;
    low_products(kernels_, activation_, call, room, {block.choice.all + chunk.begin, chunk.size()}, chunk.begin,
                 block.low_inputs);
    for (size_t i = chunk.begin; i < chunk.end; ++i) {
      const float* h = room.low_hidden + i * room.tokens;
      float total = 0;
      for (size_t t = 0; t < room.tokens; ++t) total += std::fabs(h[t]);
      block.choice.scores[i] += call.norms[i] * total;
    }
  }

  // Chooses the active neurons from the scores, if they are not given, and lists and marks them.
  void choose(Call& call, const ChoiceRoom& choice) const {
    if (call.scoring())
      select_largest(kernels_, choice.scores, call.neurons, call.full_count, choice.keys, choice.chosen);
    if (call.choosing) call.picks.ids = call.scoring() ? choice.chosen : choice.all;
    if (call.gate_first) return void(std::fill_n(choice.marks, call.neurons, 0));
    if (call.listed != nullptr) {
      const size_t count = std::min(call.picks.count, call.neurons);
      std::fill(std::copy_n(call.picks.ids, count, call.listed), call.listed + call.neurons, -1);
    }
    if (call.copied && !call.nested()) mark(call, call.picks, choice.marks);
  }

  static void mark(const Call& call, Picks picks, int32_t* marks) {
    std::fill(marks, marks + call.neurons, 0);
    for (size_t i = 0; i < picks.count; ++i) marks[picks.ids[i]] = 1;
  }

  // Adds the neurons of a chunk that are not marked, from the copy, to `sum` (tokens, width).
  void add_rest(const Call& call, const ChoiceRoom& choice, const BlockRoom& room, Chunk chunk, float* padded,
                float* sum) const {
    const size_t tokens = room.tokens;
    float* h = room.low_hidden + chunk.begin * tokens;
    for (size_t i = chunk.begin; i < chunk.end; ++i)
      if (choice.marks[i] != 0) std::fill_n(h + (i - chunk.begin) * tokens, tokens, 0.0f);
    Picks left{choice.all + chunk.begin, chunk.size()};
    if (activation_.zeroes()) {
      int32_t* kept = room.low_kept + chunk.begin;
      left = {kept, drop_zeros(left, tokens, h, kept)};
    }
    with_padding(call, tokens, padded, sum,
                 [&](float* to) { kernels_.accumulate(call.low.down, left, h, tokens, to, {}); });
  }

  // Adds a chunk of neurons whose full rows are the copy plus residuals to `sum` (tokens, width).
  void add_nested(const Call& call, Picks picks, const ChoiceRoom& choice, const BlockRoom& room, Chunk chunk,
                  Inputs inputs, bool has_products, float* padded, float* sum) const {
    const NestedChunk nested(kernels_, activation_, call, room, picks, choice.all, chunk);
    with_padding(call, room.tokens, padded, sum, [&](float* to) { nested.add(inputs, has_products, to); });
  }

  // Adds a chunk of the active neurons, from their full rows, to `sum` (tokens, width).
  void add_full(const Call& call, Picks picks, const BlockRoom& room, Chunk chunk, Inputs inputs, float* sum) const {
    const Picks mine{picks.ids + chunk.begin, chunk.size()};
    const size_t at = chunk.begin * room.tokens;
    const bool dense = !activation_.zeroes();
    float* h = room.hidden + at;
    products(call, call.full, mine, inputs, room.tokens, dense ? &call.full.down : nullptr, h, room.ups + at);
    Picks left = mine;
    if (!dense) left = {room.kept + chunk.begin, drop_zeros(mine, room.tokens, h, room.kept + chunk.begin)};
    kernels_.accumulate(call.full.down, left, h, room.tokens, sum, {});
  }

  // Adds up a chunk of the neurons of a block, into its part of the block's memory.
  void add_chunk(const Block& block, size_t c, bool has_products) const {
    const Call& call = block.call;
    const ChoiceRoom& choice = block.choice;
    const BlockRoom& room = block.room;
    const size_t part = room.tokens * call.width, low_part = call.padded() ? room.tokens * call.low.down.width : 0;
    const Chunk chunk = block.chunks[c], full = block.chunks.of(call.picks.count)[c];
    float *sum = room.parts + c * part, *padded = room.low_parts + c * low_part;
    std::fill(sum, sum + part, 0.0f);
    if (call.gate_first)
      return add_gate_first(kernels_, activation_, call, {call.picks.ids + full.begin, full.size()}, block.inputs, room,
                            full.begin, choice.marks, sum);
    if (call.nested())
      return add_nested(call, call.picks, choice, room, chunk, block.low_inputs, has_products, padded, sum);
    if (call.rest && !has_products)
      low_products(kernels_, activation_, call, room, {choice.all + chunk.begin, chunk.size()}, chunk.begin,
                   block.low_inputs);
    if (call.rest) add_rest(call, choice, room, chunk, padded, sum);
    add_full(call, call.picks, room, full, block.inputs, sum);
  }

  // The result of one token of a block: its parts in order, the bias, and the residual.
  void finish(const Block& block, size_t token) const {
    const BlockRoom& room = block.room;
    const size_t width = block.call.width, at = token * width;
    float* y = block.y + at;
    const float* start = block.call.b_down.data != nullptr ? room.start : nullptr;
    kernels_.reduce(room.parts + at, block.chunks.count(), room.tokens * width, start, y, width);
    for (size_t k = 0; block.residual != nullptr && k < width; ++k) y[k] += block.residual[at + k];
  }

  static void begin(const Call& call, const ChoiceRoom& choice) {
    if (call.copied || call.choosing) std::iota(choice.all, choice.all + call.neurons, 0);
    if (call.copied) std::fill_n(choice.scores, call.neurons, 0.0f);
  }

  // Norms the hidden states of all tokens, if the op does that.
  void add_norm(Steps& steps) const {
    if (calls_.empty() || calls_.front().residual == nullptr) return;
    const size_t tokens = calls_.front().tokens;
    steps.add(calls_.size() * tokens, [this, tokens](size_t task) {
      const Call& call = calls_[task / tokens];
      const size_t at = task % tokens * call.width;
      kernels_.normalise(call.norm, call.residual + at, memory_.choices[task / tokens].normed + at, call.width);
    });
  }

  // Scores all neurons with the copy, for the tokens of some blocks.
  void add_scores(Steps& steps, std::vector<Block>& blocks) const {
    steps.add(1, [&](size_t) {
      for (Block& block : blocks)
        if (block.call.scoring()) block.low_inputs = prepare_low(block.call, block.room, block.x);
    });
    add_chunks(steps, blocks, [this](const Block& block, size_t c) {
      if (block.call.scoring()) score(block, block.chunks[c]);
    });
  }

  void add_results(Steps& steps, std::vector<Block>& blocks) const {
    steps.add(1, [&](size_t) {
      for (Block& block : blocks) {
        const Call& call = block.call;
        if (!call.nested()) block.inputs = prepare(call.full, block.x, block.room.tokens, block.room.inputs);
        if (!call.kept() && (call.nested() || call.rest)) block.low_inputs = prepare_low(call, block.room, block.x);
        if (call.b_down.data != nullptr)
          kernels_.widen(call.b_down.data, call.b_down.type, block.room.start, call.width);
      }
    });
    add_chunks(steps, blocks, [this](const Block& block, size_t c) { add_chunk(block, c, block.call.kept()); });
    steps.add(blocks.size() * blocks.front().room.tokens, [&](size_t task) {
      const size_t tokens = blocks.front().room.tokens;
      finish(blocks[task / tokens], task % tokens);
    });
  }

  const Kernels& kernels_;
  const Activation activation_;
  std::vector<Call>& calls_;
  const Memory& memory_;
  std::deque<std::vector<Block>> passes_;
};

}  // namespace
}  // namespace shadowllm
