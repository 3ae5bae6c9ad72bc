// Matrices whose rows are read one by one, and the kernels for them, one set per instruction set. A new weight format
// needs a RowType and its decoding in kernels.hpp, but no change in the ops.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace shadowllm {

enum class RowType { f32, bf16, f16, i8, i4, i2, c4, c2, n8, n6 };

// The activation of an MLP; see models/activations.py.
struct Activation {
  enum Kind { relu, relu2, fatrelu, drelu, silu, gelu, gelu_tanh, quick_gelu } kind;
  float threshold = 0;  // of fatrelu

  // Whether it is exactly zero for many inputs.
  bool zeroes() const { return kind <= drelu; }
};

constexpr size_t kTileRows = 16;  // see Kernels::write_tiles

// Quantised rows (i8, i4, i2, c4, c2) have the layout of ONNX Runtime's MatMulNBits: unsigned integers around a
// middle of 128, 8 or 2, and a scale for every `block` of them. Two 4-bit or four 2-bit integers share a byte, and the
// first has the lowest bits. Rows c4 are like i4, but belong to a low-bit copy, whose own rounding to 4 bits is far
// larger than a rounding of their factor to 8 bits, which kernels may do. So may they with residuals of a copy (c4 and
// c2), because the factor of nested integers is then rounded as ONNX Runtime rounds it for 8-bit integers. Rows c4 and
// c2 have short scales. Rows n8 and n6 are both parts of nested integers: 4 bits of the copy, and 4 or 2 of its
// residual. They are only projected.
struct Rows {
  const void* data;
  size_t stride;  // bytes from one row to the next
  size_t width;   // elements of a row
  RowType type;
  const char* scales = nullptr;  // width / block per row
  size_t scales_stride = 0;      // bytes
  size_t block = 0;
  float step = 0;  // of residuals: the full row is that of the copy plus `step` times this one; 0 for whole rows
  const void* residual = nullptr;  // of both parts of nested integers, whose `data` is the copy
  size_t residual_stride = 0;      // bytes
  const char* tiles = nullptr;     // the same rows as `Kernels::write_tiles` writes them; null if there are none
  size_t tile_stride = 0;          // bytes
  bool exact = false;              // kernels do not round the factor, not even to 16 bits
  bool short_scales = false;       // scales are bfloat16 and not float32

  // The cost of a row, in bytes read in the same time. Integers count twice: computing takes as long as reading.
  size_t cost() const {
    const size_t bytes = width * bits(type) / 8;
    return scales == nullptr ? bytes : 2 * (bytes + width / block * scale_size());
  }

  // The rows from row `first` on.
  Rows from(size_t first) const {
    Rows rest = *this;
    rest.data = static_cast<const char*>(data) + first * stride;
    if (residual != nullptr) rest.residual = static_cast<const char*>(residual) + first * residual_stride;
    if (scales != nullptr) rest.scales += first * scales_stride;
    if (tiles != nullptr) rest.tiles = first % kTileRows == 0 ? tiles + first / kTileRows * tile_stride : nullptr;
    return rest;
  }

  size_t scale_size() const { return short_scales ? sizeof(uint16_t) : sizeof(float); }

  static size_t bits(RowType type) {
    switch (type) {
      case RowType::f32: return 32;
      case RowType::i8:
      case RowType::n8: return 8;
      case RowType::n6: return 6;
      case RowType::i4:
      case RowType::c4: return 4;
      case RowType::i2:
      case RowType::c2: return 2;
      default: return 16;
    }
  }
};

// Size of a prepared input: `width` rounded up to 128 elements, the longest step of the integer kernels.
static inline size_t input_floats(size_t width) { return (width + 127) / 128 * 128; }

constexpr size_t kLeastQuantBlock = 32;  // block sizes are multiples of it: two of the longest vectors

// The rows to visit: ids[0..count), or 0..count if ids is null.
struct Picks {
  const int32_t* ids;
  size_t count;
};

// Rows that the next pass reads: at least kLeastAhead of them, or null. The end of a pass may prefetch them.
constexpr size_t kLeastAhead = 16;
struct Ahead {
  const Rows* rows;
  const int32_t* ids;

  // The same picks of other rows, if they are enough. `next` may be null.
  static Ahead of(const Rows* next, Picks picks) { return {picks.count >= kLeastAhead ? next : nullptr, picks.ids}; }
};

constexpr size_t kKeyGroup = 8;  // scores of a group, see Kernels::group_maxima

struct Kernels {
  const char* name;
  // Returns x in the form that `project` reads with rows of this kind: x itself, or a converted copy in `room`, which
  // has input_floats(width) floats for each token and starts at a cache line. An element changes by at most 1/32768 of
  // the largest of its block, which the bound of ShortlistLogits relies on.
  const float* (*prepare)(const Rows&, const float* x, size_t tokens, float* room);
  // out[i * tokens + t] = sum over k of rows[pick i][k] * x[t * width + k], where `input` comes from `prepare`
  void (*project)(const Rows&, Picks, const float* input, size_t tokens, float* out, Ahead);
  // The bytes of a tile; 0 if rows of this kind are not read in tiles. A tile holds kTileRows rows: the integers of all
  // of them, in the order in which `project` multiplies. It reads a tile where the picks are the rows of one, and needs
  // no time to arrange them. The result is the same.
  size_t (*tile_bytes)(const Rows&);
  // Writes the tiles of the first `count` rows. `to` starts at a cache line.
  void (*write_tiles)(const Rows&, size_t count, char* to);
  // y[t * width + k] += sum over i of h[i * tokens + t] * rows[pick i][k]
  void (*accumulate)(const Rows&, Picks, const float* h, size_t tokens, float* y, Ahead);
  // The same for several tokens that do not lie side by side: out[t][i] and y[t][k], from inputs[t] or h[t][i]. The
  // results have the bits of a call with one token.
  void (*project_each)(const Rows&, Picks, const float* const* inputs, size_t tokens, float* const* out);
  void (*accumulate_each)(const Rows&, Picks, const float* const* h, size_t tokens, float* const* y);
  // h[i] = act(h[i]), times up[i] if up is not null; in dReLU, up[i] is replaced by relu(up[i])
  void (*activate)(Activation, float* h, const float* up, size_t size);
  // h[i] = exp(h[i] - largest), with the largest of h; returns the sum. Of nothing, the largest is -infinity; if it is,
  // h[i] = exp(h[i]).
  float (*exponentials)(float* h, size_t size, float* largest);
  // y[i] = sum of parts[p * stride + i] in the order of p, plus start[i] if start is not null
  void (*reduce)(const float* parts, size_t count, size_t stride, const float* start, float* y, size_t size);
  // out[i] = data[i] as float; not for quantised types
  void (*widen)(const void* data, RowType, float* out, size_t size);
  // The number of keys greater than bound; size must be less than 2^31
  size_t (*count_above)(const int32_t* keys, size_t size, int32_t bound);
  // keys[i] = sortable(scores[i]), see largest.hpp
  void (*order)(const float* scores, size_t size, int32_t* keys);
  // keys[g] = the largest key of the group g of kKeyGroup scores; the last group may be smaller
  void (*group_maxima)(const float* scores, size_t size, int32_t* keys);
  // Writes the positions of the first `most` keys that are not below `least` to out, and returns how many there are
  size_t (*list_from)(const int32_t* keys, size_t size, int32_t least, size_t most, int32_t* out);
  // out[t * stride + i] = sum over k of keys[i][k] * x[t * width + k], for the first `count` rows of keys, which are
  // one after the other and not quantised. `stride` is at least whole_lines(count), and the elements from `count` on
  // are undefined. The first rows of values are prefetched.
  void (*attention_scores)(const Rows& keys, const Rows& values, size_t count, const float* x, size_t tokens,
                           float* out, size_t stride);
  // y[t * width + k] = sum over i < count of weights[t * stride + i] * values[i][k]
  void (*attention_sum)(const Rows& values, size_t count, const float* weights, size_t tokens, size_t stride, float* y);
};

static inline size_t element_size(RowType type) { return Rows::bits(type) / 8; }  // not for quantised types

// The best kernels of this CPU, or those named by the environment variable SHADOWLLM_NATIVE_ISA.
// Throws Error if it names no kernels, or kernels that this CPU cannot run.
const Kernels& choose_kernels();

// Names of the kernels that this CPU can run, best first, separated by commas.
const char* supported_kernels();

#if defined(__x86_64__)
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
#endif
extern const Kernels kPortableKernels;

}  // namespace shadowllm
