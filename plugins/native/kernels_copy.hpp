// Kernels for the rows of a low-bit copy and for its residuals, part of kernels.hpp. For one token, the factor of the
// rows is rounded to 8 bits with a scale per block, and the products are integer products.
#pragma once

namespace shadowllm {
namespace {

#if defined(__AVX2__)
#include "kernels_bytes.hpp"
#endif

// The result serves rows of 4 and of 2 bits.
const float* prepare_copy(const Rows& rows, const float* x, size_t tokens, float* room) {
#if defined(__AVX2__)
  if (in_bytes(rows, tokens)) return round_to_bytes(x, rows.width, room);
#endif
  (void)rows, (void)tokens, (void)room;
  return x;
}

// For each of several tokens: out[t][i] is the product of row i with inputs[t].
template <class Q>
void project_copy_each(const Rows& rows, Picks picks, const float* const* inputs, size_t tokens, float* const* out,
                       Ahead ahead) {
#if defined(__AVX2__)
  if (in_bytes(rows, 1)) return project_bytes<Q>(rows, picks, inputs, tokens, out, ahead);
#endif
  for (size_t t = 0; t < tokens; ++t) project_floats<Q>(rows, picks, inputs[t], 1, out[t], ahead);
}

template <class Q>
void accumulate_copy_each(const Rows& rows, Picks picks, const float* const* h, size_t tokens, float* const* y,
                          Ahead ahead) {
#if defined(__AVX2__)
  if (in_bytes(rows, 1)) return accumulate_bytes<Q>(rows, picks, h, tokens, y);
#endif
  for (size_t t = 0; t < tokens; ++t) accumulate_floats<Q>(rows, picks, h[t], 1, y[t], ahead);
}

template <class Q>
void project_copy(const Rows& rows, Picks picks, const float* x, size_t tokens, float* out, Ahead ahead) {
  if (tokens == 1) return project_copy_each<Q>(rows, picks, &x, 1, &out, ahead);
  project_floats<Q>(rows, picks, x, tokens, out, ahead);
}

template <class Q>
void accumulate_copy(const Rows& rows, Picks picks, const float* h, size_t tokens, float* y, Ahead ahead) {
  if (tokens == 1) return accumulate_copy_each<Q>(rows, picks, &h, 1, &y, ahead);
  accumulate_floats<Q>(rows, picks, h, tokens, y, ahead);
}

}  // namespace
}  // namespace shadowllm
