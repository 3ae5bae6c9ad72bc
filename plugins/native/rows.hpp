// What the ops compute with: matrices of which single rows are read, and the kernels over them, one set per instruction
// set. A new weight format is a RowType, its decoding in kernels.hpp, and nothing in the ops.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace shadowllm {

enum class RowType { f32, bf16, f16, i8, i4 };
enum class Activation { relu, silu, gelu };

// Quantised rows (i8, i4) are unsigned integers around a middle of 128 or 8, two of four bits to a byte with the lower
// half first, and a scale for every `block` of them: the layout of ONNX Runtime's MatMulNBits.
struct Rows {
  const void* data;
  size_t stride;  // bytes from one row to the next
  size_t width;   // elements of a row
  RowType type;
  const float* scales = nullptr;  // width / block to a row
  size_t scales_stride = 0;       // bytes
  size_t block = 0;

  // What a row costs, in bytes that could be read meanwhile: integers take as long to compute with as to read.
  size_t cost() const {
    const size_t bytes = width * bits(type) / 8;
    return scales == nullptr ? bytes : 2 * (bytes + width / block * sizeof(float));
  }

  static size_t bits(RowType type) {
    return type == RowType::f32 ? 32 : type == RowType::i8 ? 8 : type == RowType::i4 ? 4 : 16;
  }
};

// In whole steps of the longest integer kernels, which take 128 elements.
inline size_t input_floats(size_t width) { return (width + 127) / 128 * 128; }

constexpr size_t kLeastQuantBlock = 32;  // blocks are multiples of it: of two of the longest vectors

// The rows to visit: ids[0..count), or 0..count where ids is null.
struct Picks {
  const int32_t* ids;
  size_t count;
};

// Rows that will be read next, at least kLeastAhead of them or null: the last rows of a pass fetch the first of the
// next pass.
constexpr size_t kLeastAhead = 16;
struct Ahead {
  const Rows* rows;
  const int32_t* ids;
};

struct Kernels {
  const char* name;
  // x as `project` reads it with rows of this kind: x itself, or what is made of it in `room`, input_floats(width) of
  // them at the start of a cache line.
  const float* (*prepare)(const Rows&, const float* x, size_t tokens, float* room);
  // out[i * tokens + t] = sum over k of rows[pick i][k] * x[t * width + k], where `input` is x prepared
  void (*project)(const Rows&, Picks, const float* input, size_t tokens, float* out, Ahead);
  // y[t * width + k] += sum over i of h[i * tokens + t] * rows[pick i][k]
  void (*accumulate)(const Rows&, Picks, const float* h, size_t tokens, float* y, Ahead);
  // h[i] = act(h[i]), times up[i] where up is not null
  void (*activate)(Activation, float* h, const float* up, size_t size);
  // h[i] = exp(h[i] - max h); returns the sum
  float (*exponentials)(float* h, size_t size);
  // y[i] = sum of parts[p * stride + i] in the order of p, on top of start[i] where start is not null
  void (*reduce)(const float* parts, size_t count, size_t stride, const float* start, float* y, size_t size);
  // out[i] = data[i] as float; not of quantised types
  void (*widen)(const void* data, RowType, float* out, size_t size);
  // How many of the keys are greater than bound; fewer than 2^31
  size_t (*count_above)(const int32_t* keys, size_t size, int32_t bound);
};

inline size_t element_size(RowType type) { return Rows::bits(type) / 8; }  // not of quantised types

// The best kernels of this CPU, or those named by the environment variable SHADOWLLM_NATIVE_ISA.
// Throws Error where that names none, or one that this CPU cannot run.
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
