// Finds the largest of many scores. Ties go to the lower position, and a NaN is below everything.
#pragma once

#include <string.h>

#include "rows.hpp"

namespace shadowllm {
namespace {  // kernels are compiled for several instruction sets

// An integer with the same order as the score. Both zeros are equal, and a NaN is below everything.
inline int32_t sortable(float score) {
  const float positive_zero = score + 0.0f;
  int32_t bits;
  memcpy(&bits, &positive_zero, sizeof bits);
  return __builtin_isnan(score) ? INT32_MIN : bits ^ (bits >> 31 & INT32_MAX);
}

struct Threshold {
  int32_t key;  // the smallest selected key
  size_t ties;  // how many keys equal to it are selected
  bool all;     // whether these are all that equal it
};

// The k-th largest of n keys, k in 1..n. Finds its bits from the top; each bit needs one count, fast with vectors.
inline Threshold kth_largest(const Kernels& kernels, const int32_t* keys, size_t n, size_t k) {
  uint32_t found = 0;  // distance from the smallest int32
  bool all = false;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t higher = found | 1u << bit;
    const size_t count = kernels.count_above(keys, n, static_cast<int32_t>((higher - 1) ^ 0x80000000u));
    if (count >= k) found = higher;
    all = count == k;
    if (all) break;
  }
  const int32_t key = static_cast<int32_t>(found ^ 0x80000000u);
  return {key, k - kernels.count_above(keys, n, key), all};
}

// Writes the positions of the k largest of n keys to out, in ascending order; k in 0..n.
inline void write_largest(const Kernels& kernels, const int32_t* keys, size_t n, size_t k, int32_t* out) {
  if (k == 0) return;
  Threshold threshold = kth_largest(kernels, keys, n, k);
  if (threshold.all) return void(kernels.list_from(keys, n, threshold.key, k, out));
  size_t filled = 0;
  for (size_t i = 0; i < n && filled < k; ++i) {
    // No branch on the data, because the CPU cannot predict which unit is selected.
    const bool tie = (keys[i] == threshold.key) & (threshold.ties > 0);
    out[filled] = static_cast<int32_t>(i);
    filled += (keys[i] > threshold.key) | tie;
    threshold.ties -= tie;
  }
}

// The same for n scores; `keys` has room for n integers.
inline void select_largest(const Kernels& kernels, const float* scores, size_t n, size_t k, int32_t* keys,
                           int32_t* out) {
  kernels.order(scores, n, keys);
  write_largest(kernels, keys, n, k, out);
}

}  // namespace
}  // namespace shadowllm
