// Kernels for the rows of a low-bit copy, part of kernels.hpp. For one token, the factor of the rows is rounded to 8
// bits with a scale per block, and the products are integer products.
#pragma once

namespace shadowllm {
namespace {

#if defined(__AVX2__)
#include "kernels_bytes.hpp"
#endif

const float* prepare_copy(const Rows& rows, const float* x, size_t tokens, float* room) {
#if defined(__AVX2__)
  if (in_bytes(rows, tokens)) return round_to_bytes(x, rows.width, room);
#endif
  (void)rows, (void)tokens, (void)room;
  return x;
}

void project_copy(const Rows& rows, Picks picks, const float* x, size_t tokens, float* out, Ahead ahead) {
#if defined(__AVX2__)
  if (in_bytes(rows, tokens)) return project_bytes(rows, picks, x, out, ahead);
#endif
  project_floats<Bits4>(rows, picks, x, tokens, out, ahead);
}

void accumulate_copy(const Rows& rows, Picks picks, const float* h, size_t tokens, float* y, Ahead ahead) {
#if defined(__AVX2__)
  if (in_bytes(rows, tokens)) return accumulate_bytes(rows, picks, h, y);
#endif
  accumulate_floats<Bits4>(rows, picks, h, tokens, y, ahead);
}

}  // namespace
}  // namespace shadowllm
