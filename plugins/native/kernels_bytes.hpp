// Integer kernels for the rows of a low-bit copy, its residuals or both, part of kernels_copy.hpp. What depends on the
// instruction set is in kernels_bytes_avx2.hpp and kernels_bytes_vnni.hpp. Rows of 2 bits are spread to 4 bits when
// they are loaded.
#pragma once

constexpr size_t kBytesBlock = 64;  // elements of a block; at 4 bits they are 32 bytes
constexpr float kByteMost = 127;
constexpr size_t kByteTokens = 4;        // tokens that are added to, or whose products lie side by side, at a time
constexpr size_t kTokenGroup = 8;        // tokens whose inputs are read together
constexpr size_t kGroup = 16;            // rows that are added, or with VNNI multiplied, together
constexpr size_t kStripBytes = 1 << 17;  // of rows that are unpacked at a time, a part of a second-level cache

inline bool in_bytes(const Rows& rows) { return rows.block == kBytesBlock && rows.short_scales; }

// A group of rows, the group after it, and the factors of the rows for M tokens. A group at the end is filled up with
// its first row and factors of 0.
template <class Q, size_t M>
struct RowGroup {
  RowGroup(const Rows& rows, Picks picks, const float* const* h, size_t stride, size_t i)
      : follows(i + kGroup < picks.count) {
    const size_t count = picks.count - i < kGroup ? picks.count - i : kGroup;
    for (size_t t = 0; t < M; ++t)
      for (size_t r = 0; r < count; ++r) factors[t][r] = h[t][(i + r) * stride];
    for (size_t r = 0; r < kGroup; ++r) now[r] = quantised_row(rows, picks.ids, i + (r < count ? r : 0));
    for (size_t r = 0, then = i + kGroup; follows && r < kGroup; ++r)
      next[r] = quantised_row(rows, picks.ids, then + r < picks.count ? then + r : then);
  }

  QuantisedRow now[kGroup], next[kGroup];
  float factors[M][kGroup] = {};
  bool follows;  // whether there is a group after it
};

// Rows of a strip, as `unpack_rows` writes them.
template <class Q>
struct Unpacked : Q {
  static constexpr size_t bits = 0, residual_bits = 0;  // nothing to prefetch
};

#if defined(__AVX512VNNI__)
#include "kernels_bytes_vnni.hpp"
#else
#include "kernels_bytes_avx2.hpp"
#endif

// out[t][at + i] is the product of row i and inputs[t], in groups of tokens whose inputs stay in the first-level cache.
template <class Q>
void project_groups(const Rows& rows, Picks picks, const float* const* inputs, size_t tokens, float* const* out,
                    size_t at) {
  for (size_t first = 0; first < tokens; first += kTokenGroup) {
    const size_t count = tokens - first < kTokenGroup ? tokens - first : kTokenGroup;
    float* to[kTokenGroup];
    for (size_t t = 0; t < count; ++t) to[t] = out[first + t] + at;
    project_bytes<Q>(rows, picks, inputs + first, count, to, 1, {});
  }
}

// The same for many tokens and all rows. A strip of rows is unpacked once for all groups of tokens.
template <class Q>
void project_strips(const Rows& rows, size_t size, const float* const* inputs, size_t tokens, float* const* out) {
  alignas(64) uint8_t room[kStripBytes];
  Rows unpacked = rows;
  unpacked.data = room, unpacked.stride = unpacked_bytes<Q>(rows.width / kBytesBlock), unpacked.residual = nullptr;
  const size_t strip = kStripBytes / unpacked.stride / kGroup * kGroup;
  for (size_t first = 0; first < size; first += strip) {
    const size_t count = size - first < strip ? size - first : strip;
    unpack_rows<Q>(rows, first, count, room, unpacked.stride);
    unpacked.scales = rows.scales + first * rows.scales_stride;
    project_groups<Unpacked<Q>>(unpacked, {nullptr, count}, inputs, tokens, out, first);
  }
}

template <class Q>
void project_bytes_each(const Rows& rows, Picks picks, const float* const* inputs, size_t tokens, float* const* out) {
  const bool fits = rows.width != 0 && kGroup * unpacked_bytes<Q>(rows.width / kBytesBlock) <= kStripBytes;
  if constexpr (Q::residual_bits != 0)
    if (tokens > kTokenGroup && picks.ids == nullptr && fits)
      return project_strips<Q>(rows, picks.count, inputs, tokens, out);
  project_groups<Q>(rows, picks, inputs, tokens, out, 0);
}

// The same for tokens side by side: out[i * tokens + t].
template <class Q>
void project_bytes_of_all(const Rows& rows, Picks picks, const float* input, size_t tokens, float* out, Ahead ahead) {
  const float* inputs[kByteTokens];
  float* outs[kByteTokens];
  for (size_t first = 0; first < tokens; first += kByteTokens) {
    const size_t count = tokens - first < kByteTokens ? tokens - first : kByteTokens;
    for (size_t t = 0; t < count; ++t)
      inputs[t] = input + (first + t) * input_floats(rows.width), outs[t] = out + first + t;
    project_bytes<Q>(rows, picks, inputs, count, outs, tokens, ahead);
  }
}

// y[t] += sum over i of h[t][i * stride] times row i
template <class Q>
void accumulate_bytes(const Rows& rows, Picks picks, const float* const* h, size_t stride, size_t tokens,
                      float* const* y) {
  cover_tokens<kByteTokens>(tokens, [&](size_t, size_t, size_t first, auto m) {
    accumulate_tile_of_bytes<Q, m.value>(rows, picks, h + first, stride, y + first);
  });
}

// The same for tokens side by side: h[i * tokens + t], y[t * width + k].
template <class Q>
void accumulate_bytes_of_all(const Rows& rows, Picks picks, const float* h, size_t tokens, float* y) {
  const float* factors[kByteTokens];
  float* sums[kByteTokens];
  for (size_t first = 0; first < tokens; first += kByteTokens) {
    const size_t count = tokens - first < kByteTokens ? tokens - first : kByteTokens;
    for (size_t t = 0; t < count; ++t) factors[t] = h + first + t, sums[t] = y + (first + t) * rows.width;
    accumulate_bytes<Q>(rows, picks, factors, tokens, count, sums);
  }
}
