// The program of a plugin node, read from its packed form. The fields are documented in ../../kernel_program.py.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace shadowllm {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int64_t kPtx = 0, kPtxSm = 80;
constexpr int64_t kPtxOnly = 10000;  // a GPU newer than all images, which only PTX serves
constexpr int64_t kInt32Type = 3, kAligned = 16;

struct Size {
  int64_t factor;
  bool batch, seqlen;
  int64_t divisor;

  // ceil(factor * batch * seqlen / divisor); the checks of a program ensure that it cannot overflow.
  int64_t operator()(int64_t batch_size, int64_t seqlen_size) const {
    return (factor * (batch ? batch_size : 1) * (seqlen ? seqlen_size : 1) + divisor - 1) / divisor;
  }
};

enum Kind : int64_t { kInput, kOutput, kWorkspace, kInt, kKinds };

struct Argument {
  Kind kind;
  int64_t value;
  Size size;
  int64_t offset;  // bytes, of an input
};

struct Image {
  int64_t sm, shared_bytes;
  std::string_view data;
  bool waits;
};

struct Kernel {
  std::string name;
  int64_t threads, hidden;
  std::vector<Image> images;

  // The image that a GPU runs, or null if it can run none.
  const Image* serving(int64_t sm) const;
};

struct Launch {
  int64_t kernel;
  std::array<Size, 3> grid;
  std::vector<Argument> arguments;
};

struct Plan {
  int64_t max_batch, max_seqlen, workspace_bytes;
  std::vector<Launch> launches;
};

// A dimension of an output: the constant `value` if `input` is -1, otherwise equal to axis `value` of that input.
struct Dimension {
  int64_t input, value;
};

struct Output {
  int64_t dtype;
  std::vector<Dimension> shape;
};

class Program {
 public:
  // Throws an Error unless the bytes are exactly one program with valid numbers and references.
  explicit Program(std::string packed);
  Program(const Program&) = delete;  // images point into the bytes
  Program& operator=(const Program&) = delete;

  const Plan& plan(int64_t batch, int64_t seqlen) const;  // throws an Error if none covers the call
  int64_t workspace_bytes() const;
  int64_t dtype(size_t position) const;  // positions of inputs, then of outputs
  const std::string& packed() const { return packed_; }

  std::vector<int64_t> inputs;  // types, as TensorRT's numbers
  std::vector<Output> outputs;
  std::vector<Kernel> kernels;
  std::vector<Plan> plans;

 private:
  void check() const;
  void check(const Plan& plan) const;

  std::string packed_;
};

}  // namespace shadowllm
