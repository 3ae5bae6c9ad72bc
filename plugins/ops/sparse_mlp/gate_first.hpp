// SparseMLP without indices and without a low-bit copy: the gates of all neurons are computed first, and up and down
// are read only where the gate is not zero. A neuron with a gate of zero adds exactly nothing.
#pragma once

#include "mlp_call.hpp"

namespace shadowllm {
namespace {  // other ops have types with the same names

// Adds a chunk of neurons to `sum` (tokens, width), and marks those that fired for any token.
inline void add_gate_first(const Kernels& kernels, Activation activation, const Call& call, Picks mine, Inputs inputs,
                           const BlockRoom& room, size_t begin, int32_t* marks, float* sum) {
  const Matrices& of = call.full;
  const size_t tokens = room.tokens;
  float *h = room.hidden + begin * tokens, *u = room.ups + begin * tokens;
  int32_t* ids = room.kept + begin;
  kernels.project(of.gate, mine, inputs.gate, tokens, h, {});  // without a gate, this is up
  (of.gated ? call.b_gate : call.b_up).add(kernels, mine, tokens, h);
  kernels.activate(activation, h, nullptr, mine.count * tokens);
  Picks fired{ids, drop_zeros(mine, tokens, h, ids)};
  for (size_t i = 0; i < fired.count; ++i) marks[ids[i]] = 1;
  if (of.gated) {
    kernels.project(of.up, fired, inputs.up, tokens, u, Ahead::of(&of.down, fired));
    call.b_up.add(kernels, fired, tokens, u);
    const bool both = activation.kind == Activation::drelu;
    for (size_t i = 0; i < fired.count * tokens; ++i) h[i] *= both && u[i] < 0 ? 0 : u[i];
    if (both) fired.count = drop_zeros(fired, tokens, h, ids);
  }
  kernels.accumulate(of.down, fired, h, tokens, sum, {});
}

// Writes the marked neurons in ascending order, and -1 past their number.
inline void list_marked(const int32_t* marks, size_t neurons, int32_t* out) {
  int32_t* const end = out + neurons;
  for (size_t i = 0; i < neurons; ++i)
    if (marks[i] != 0) *out++ = static_cast<int32_t>(i);
  std::fill(out, end, -1);
}

}  // namespace
}  // namespace shadowllm
