// DenseMLP: all neurons of an MLP with weights of nested integers. Its linear layers are NestedLinear.
#include <algorithm>

#include "activation.hpp"

namespace shadowllm {
namespace {

constexpr size_t kLinear = 5;    // inputs of a linear layer
constexpr size_t kPiece = 1024;  // neurons of a token that one thread activates at a time; whole vectors

class DenseMlp {
 public:
  static constexpr const char* kName = "DenseMLP";
  static constexpr Port kPorts[] = {
      {"x", kFloat, kRequired},         {"up_w", kUInt8, kRequired},      {"up_copy", kUInt8, kRequired},
      {"up_scales", kFloat, kRequired}, {"up_bias", kFloat, kOptional},   {"down_x", kFloat, kOptional},
      {"down_w", kUInt8, kRequired},    {"down_copy", kUInt8, kRequired}, {"down_scales", kFloat, kRequired},
      {"down_bias", kFloat, kOptional},
  };
  static constexpr Port kOutputs[] = {{"y", kFloat, kRequired}};

  DenseMlp(const Api& api, const OrtKernelInfo* info, size_t first = 0)
      : api_(api), node_(api, info, kName, kPorts, std::size(kPorts), false, first),
        up_(nested_linear_part(api, info, first, false)), down_(nested_linear_part(api, info, first + kLinear, false)),
        activation_(parse_activation(node_)), gated_(node_.integer("gated") != 0), kernels_(choose_kernels()) {}

  static void infer(const Api& api, OrtShapeInferContext* context) { infer_like_input(api, context, 0, 0); }

  Bytes first_bytes() const { return up_->first_bytes(); }
  std::vector<Tensor> inputs(const OrtKernelContext* context) const { return node_.inputs(context); }

  void compute(OrtKernelContext* context) const {
    compute(inputs(context), Outputs(node_, context), Pool(api_, context));
  }

  void compute(const std::vector<Tensor>& in, const Outputs& outputs, const Pool& pool) const {
    if (in[0].rank != 2) node_.fail("x has " + std::to_string(in[0].rank) + " dimensions, not 2");
    const std::vector<Tensor> up(in.begin(), in.begin() + kLinear);
    std::vector<Tensor> down(in.begin() + kLinear, in.end());
    const int64_t tokens = in[0].dims[0], rows = up[2].rank < 1 ? 0 : up[2].dims[0], parts = gated_ ? 2 : 1;
    if (rows % parts != 0)
      node_.fail("up_copy has " + std::to_string(rows) + " rows, which are not two for each neuron");
    const int64_t neurons = rows / parts;
    if (down[2].rank < 1 || down[2].dims[0] != in[0].dims[1])
      node_.fail("down_copy must have " + std::to_string(in[0].dims[1]) + " rows, as many as x has columns");
    const size_t all = static_cast<size_t>(tokens), width = static_cast<size_t>(neurons);
    Scratch scratch;
    float* projected = scratch.take(all * static_cast<size_t>(rows + neurons));
    float* hidden = projected + all * static_cast<size_t>(rows);
    pool.ahead(down_->first_bytes());
    up_->compute(up, Outputs(node_, projected), pool);
    const size_t pieces = (width + kPiece - 1) / kPiece;
    pool.run(all * pieces, [&](size_t task) {
      const size_t token = task / pieces, first = task % pieces * kPiece, count = std::min(kPiece, width - first);
      const float* from = projected + token * static_cast<size_t>(rows) + first;
      float* to = hidden + token * width + first;
      std::copy_n(from, count, to);
      kernels_.activate(activation_, to, gated_ ? from + width : nullptr, count);
    });
    down[0] = Tensor::matrix(hidden, tokens, neurons);
    down_->compute(down, outputs, pool);
  }

 private:
  const Api& api_;
  Node node_;
  std::unique_ptr<Part> up_, down_;
  Activation activation_;
  bool gated_;
  const Kernels& kernels_;
};

}  // namespace

const Entry kDenseMlp = entry_of<DenseMlp>();

std::unique_ptr<Part> dense_mlp_part(const Api& api, const OrtKernelInfo* info, size_t first) {
  return std::make_unique<PartOf<DenseMlp>>(api, info, first);
}

}  // namespace shadowllm
