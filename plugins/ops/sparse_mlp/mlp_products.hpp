// The products of SparseMLP from a low-bit copy, and how residuals complete them.
#pragma once

#include "mlp_call.hpp"

namespace shadowllm {
namespace {  // other ops have types with the same names

// Gate and up of the picked neurons from the copy, and the products of both, from place `at` of their memory on.
inline void low_products(const Kernels& kernels, Activation activation, const Batch& batch, Picks picks, size_t at) {
  const Matrices& low = batch.front().call.low;
  const size_t tokens = batch.front().room.tokens, first = at * tokens, count = picks.count * tokens;
  batch.project(
      kernels, low.up, picks, low.gated ? &low.gate : nullptr, [](const Block& block) { return block.low_inputs.up; },
      [&](const Block& block) { return block.room.low_ups + first; });
  if (low.gated)
    batch.project(
        kernels, low.gate, picks, nullptr, [](const Block& block) { return block.low_inputs.gate; },
        [&](const Block& block) { return block.room.low_gates + first; });
  for (const Block* block : batch) {
    const BlockRoom& room = block->room;
    float *h = room.low_hidden + first, *u = room.low_ups + first, *g = low.gated ? room.low_gates + first : u;
    block->call.b_up.add(kernels, picks, tokens, u);
    if (low.gated) block->call.b_gate.add(kernels, picks, tokens, g);
    std::copy(g, g + count, h);
    kernels.activate(activation, h, low.gated ? u : nullptr, count);
  }
}

// The neurons of a chunk whose full rows are the copy plus residuals.
class NestedChunk {
 public:
  NestedChunk(const Kernels& kernels, Activation activation, const Block& block, size_t c)
      : kernels_(kernels), activation_(activation), block_(block), call_(block.call), room_(block.room),
        chunk_(block.chunks[c]) {
    const Picks picks = call_.picks;
    const int32_t *end = picks.ids + picks.count,
                  *from = std::lower_bound(picks.ids, end, static_cast<int32_t>(chunk_.begin));
    const int32_t* to = std::lower_bound(from, end, static_cast<int32_t>(chunk_.end));
    active_ = {from, static_cast<size_t>(to - from)};
    at_ = static_cast<size_t>(from - picks.ids);
    every_ = {block.choice.all + chunk_.begin, chunk_.size()};
  }

  // Completes the products of the active neurons, and adds the residuals of down to `sum` (tokens, low.down.width).
  // `has_products`: those of the copy were computed for all neurons.
  void add_residuals(bool has_products, float* sum) const {
    const bool by_neuron = has_products || call_.rest;  // where the products of the copy are: by neuron, or by pick
    if (!has_products) {
      const Picks picks = by_neuron ? every_ : active_;
      low_products(kernels_, activation_, Batch(block_), picks, by_neuron ? chunk_.begin : at_);
    }
    complete(by_neuron, sum);
  }

  // Then adds the rows of the copy.
  void add_copy(float* sum) const {
    const size_t tokens = room_.tokens;
    float* h = call_.rest ? room_.low_hidden + chunk_.begin * tokens : room_.hidden + at_ * tokens;
    int32_t* kept = call_.rest ? room_.low_kept + chunk_.begin : room_.kept + at_;
    kernels_.accumulate(call_.low.down, nonzero(call_.rest ? every_ : active_, h, kept), h, tokens, sum, {});
  }

 private:
  // Adds the residuals of gate and up to the products of the copy, and that of down to the sum.
  void complete(bool by_neuron, float* sum) const {
    const size_t tokens = room_.tokens, count = active_.count * tokens;
    float *h = room_.hidden + at_ * tokens, *u = room_.ups + at_ * tokens;
    const auto add_copy = [&](const Rows& rows, const float* low, float* to) {
      for (size_t i = 0; i < active_.count; ++i) {
        const float* from = low + (by_neuron ? static_cast<size_t>(active_.ids[i]) : at_ + i) * tokens;
        for (size_t t = 0; t < tokens; ++t) to[i * tokens + t] = from[t] + rows.step * to[i * tokens + t];
      }
    };
    const Matrices& full = call_.full;
    const Inputs inputs = block_.low_inputs;
    if (full.gated) {
      kernels_.project(full.gate, active_, inputs.gate, tokens, h, Ahead::of(&full.up, active_));
      add_copy(full.gate, room_.low_gates, h);
    } else {
      u = h;
    }
    kernels_.project(full.up, active_, inputs.up, tokens, u, Ahead::of(&full.down, active_));
    add_copy(full.up, room_.low_ups, u);
    kernels_.activate(activation_, h, full.gated ? u : nullptr, count);
    for (size_t i = 0; call_.rest && i < active_.count; ++i)
      std::copy_n(h + i * tokens, tokens, room_.low_hidden + static_cast<size_t>(active_.ids[i]) * tokens);
    float* scaled = room_.ups + at_ * tokens;
    for (size_t i = 0; i < count; ++i) scaled[i] = full.down.step * h[i];
    kernels_.accumulate(full.down, nonzero(active_, scaled, room_.kept + at_), scaled, tokens, sum, {});
  }

  Picks nonzero(Picks picks, float* h, int32_t* kept) const {
    if (!activation_.zeroes()) return picks;
    return {kept, drop_zeros(picks, room_.tokens, h, kept)};
  }

  const Kernels& kernels_;
  const Activation activation_;
  const Block& block_;
  const Call& call_;
  const BlockRoom& room_;
  const Chunk chunk_;
  Picks active_, every_;
  size_t at_;  // the first active neuron of the chunk, among all active ones
};

}  // namespace
}  // namespace shadowllm
