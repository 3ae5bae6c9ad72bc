// Kernels for the rows of a low-bit copy, for its residuals and for both together, part of kernels.hpp. The factor of
// the rows is rounded to 8 bits with a scale per block, and the products are integer products. Each token is computed
// as it would be alone.
#pragma once

namespace shadowllm {
namespace {

#if defined(__AVX2__)
#include "kernels_bytes.hpp"
#endif

inline const float* prepare_copy(const Rows& rows, const float* x, size_t tokens, float* room) {
#if defined(__AVX2__)
  for (size_t t = 0; in_bytes(rows) && t < tokens; ++t)
    round_to_bytes(x + t * rows.width, rows.width, room + t * input_floats(rows.width));
  if (in_bytes(rows)) return room;
#endif
  (void)rows, (void)tokens, (void)room;
  return x;
}

// out[t][i] is the product of row i and inputs[t].
template <class Q>
void project_copy_each(const Rows& rows, Picks picks, const float* const* inputs, size_t tokens, float* const* out) {
#if defined(__AVX2__)
  if (in_bytes(rows)) return project_bytes_each<Q>(rows, picks, inputs, tokens, out);
#endif
  for (size_t t = 0; t < tokens; ++t) project_floats<Q>(rows, picks, inputs[t], 1, out[t], {});
}

template <class Q>
void accumulate_copy_each(const Rows& rows, Picks picks, const float* const* h, size_t tokens, float* const* y) {
#if defined(__AVX2__)
  if (in_bytes(rows)) return accumulate_bytes<Q>(rows, picks, h, 1, tokens, y);
#endif
  for (size_t t = 0; t < tokens; ++t) accumulate_floats<Q>(rows, picks, h[t], 1, y[t], {});
}

template <class Q>
void project_copy(const Rows& rows, Picks picks, const float* x, size_t tokens, float* out, Ahead ahead) {
#if defined(__AVX2__)
  if (in_bytes(rows)) return project_bytes_of_all<Q>(rows, picks, x, tokens, out, ahead);
#endif
  project_floats<Q>(rows, picks, x, tokens, out, ahead);
}

template <class Q>
void accumulate_copy(const Rows& rows, Picks picks, const float* h, size_t tokens, float* y) {
#if defined(__AVX2__)
  if (in_bytes(rows)) return accumulate_bytes_of_all<Q>(rows, picks, h, tokens, y);
#endif
  accumulate_floats<Q>(rows, picks, h, tokens, y, {});
}

size_t tile_bytes(const Rows& rows) {
#if defined(__AVX512VNNI__)
  if (!in_bytes(rows) || rows.width == 0) return 0;
  switch (rows.type) {
    case RowType::c4: return tile_bytes_of<Bits4>(rows);
    case RowType::n8: return tile_bytes_of<Nested<Bits4>>(rows);
    case RowType::n6: return tile_bytes_of<Nested<Bits2>>(rows);
    default: return 0;
  }
#else
  (void)rows;
  return 0;
#endif
}

void write_tiles(const Rows& rows, size_t count, char* to) {
#if defined(__AVX512VNNI__)
  switch (rows.type) {
    case RowType::c4: return write_tiles_of<Bits4>(rows, count, to);
    case RowType::n8: return write_tiles_of<Nested<Bits4>>(rows, count, to);
    case RowType::n6: return write_tiles_of<Nested<Bits2>>(rows, count, to);
    default: return;
  }
#else
  (void)rows, (void)count, (void)to;
#endif
}

}  // namespace
}  // namespace shadowllm
