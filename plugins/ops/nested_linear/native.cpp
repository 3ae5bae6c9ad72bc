// NestedLinear: a linear layer with weights of nested integers and inputs of 8 bits. Rows of x share what is done
// once for a row of weights.
#include <algorithm>

#include "op.hpp"

namespace shadowllm {
namespace {

enum Input { kX, kW, kCopy, kScales, kBias };

constexpr size_t kTogether = 8;  // rows of x that one thread rounds; more are rounded by all threads

class NestedLinear {
 public:
  static constexpr const char* kName = "NestedLinear";
  static constexpr Port kPorts[] = {
      {"x", kFloat, kRequired},      {"w", kUInt8, kRequired},    {"copy", kUInt8, kRequired},
      {"scales", kFloat, kRequired}, {"bias", kFloat, kOptional},
  };
  static constexpr Port kOutputs[] = {{"y", kFloat, kRequired}};

  // `tiled`: whether rows are kept as tiles too, if the kernels read them.
  NestedLinear(const Api& api, const OrtKernelInfo* info, size_t first = 0, bool tiled = false)
      : api_(api), node_(api, info, kName, kPorts, std::size(kPorts), false, first), kernels_(choose_kernels()) {
    node_.shorten({kScales});
    if (tiled) node_.tile(kernels_, kCopy, kScales, kW);
  }

  static void infer(const Api& api, OrtShapeInferContext* context) { infer_rows(api, context, {kX, kCopy}, 0, kFloat); }

  Bytes first_bytes() const { return node_.first_bytes(kCopy); }
  std::vector<Tensor> inputs(const OrtKernelContext* context) const { return node_.inputs(context); }

  void compute(OrtKernelContext* context) const {
    compute(inputs(context), Outputs(node_, context), Pool(api_, context));
  }

  void compute(const std::vector<Tensor>& in, const Outputs& outputs, const Pool& pool) const {
    const Tensor& x = in[kX];
    if (x.rank != 2) node_.fail("x has " + std::to_string(x.rank) + " dimensions, not 2");
    const int64_t rows = in[kCopy].rank < 1 ? 0 : in[kCopy].dims[0], width = x.dims[1];
    const Rows weights = node_.nested(in, kW, kCopy, kScales, rows, width);
    node_.expect(in, kBias, {rows});
    const size_t tokens = static_cast<size_t>(x.dims[0]), size = static_cast<size_t>(rows);
    float* y = static_cast<float*>(outputs.get(0, {x.dims[0], rows}).data);
    Scratch scratch;
    const std::vector<const float*> inputs = prepare(pool, weights, x.as<float>(), tokens, width, scratch);
    // There are no partial sums, so tokens are only more work.
    const Chunks chunks(size, weights.cost() * std::max<size_t>(1, tokens), 1);
    std::vector<float*> to(chunks.count() * tokens);
    pool.run(tokens == 0 ? 0 : chunks.count(), [&](size_t c) {
      multiply(weights, chunks[c], inputs, in[kBias].as<float>(), y, size, to.data() + c * tokens);
    });
  }

 private:
  // Each row of x in the form that the kernels read.
  std::vector<const float*> prepare(const Pool& pool, const Rows& weights, const float* x, size_t tokens,
                                    int64_t columns, Scratch& scratch) const {
    const size_t width = static_cast<size_t>(columns), room = input_floats(weights.width);
    const bool padded = weights.width != width;
    float* memory = scratch.take((padded ? 2 : 1) * tokens * room);
    std::vector<const float*> inputs(tokens);
    const Pool& some = tokens > kTogether ? pool : Pool::none();
    some.run(tokens, [&](size_t t) {
      const float* from = x + t * width;
      if (padded) {
        float* own = memory + (tokens + t) * room;
        std::fill(std::copy_n(from, width, own), own + weights.width, 0.0f);
        from = own;
      }
      inputs[t] = kernels_.prepare(weights, from, 1, memory + t * room);
    });
    return inputs;
  }

  // `to` has room for one pointer for each row of x.
  void multiply(const Rows& weights, Chunk chunk, const std::vector<const float*>& inputs, const float* bias, float* y,
                size_t outputs, float** to) const {
    for (size_t t = 0; t < inputs.size(); ++t) to[t] = y + t * outputs + chunk.begin;
    kernels_.project_each(weights.from(chunk.begin), {nullptr, chunk.size()}, inputs.data(), inputs.size(), to);
    for (size_t t = 0; bias != nullptr && t < inputs.size(); ++t)
      for (size_t i = 0; i < chunk.size(); ++i) to[t][i] += bias[chunk.begin + i];
  }

  const Api& api_;
  Node node_;
  const Kernels& kernels_;
};

}  // namespace

const Entry kNestedLinear = entry_of<NestedLinear>();

std::unique_ptr<Part> nested_linear_part(const Api& api, const OrtKernelInfo* info, size_t first, bool tiled) {
  return std::make_unique<PartOf<NestedLinear>>(api, info, first, tiled);
}

}  // namespace shadowllm
