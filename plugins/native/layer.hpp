// A whole layer of a Llama-like model. Its parts are other ops of this library. They use one team of threads, so that a
// thread does not stop between them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <thread>

#include "op.hpp"
#include "room.hpp"

namespace shadowllm {
namespace {

enum LayerInput { kX, kNorm, kPostNorm, kOwn };  // then the inputs of the parts

constexpr size_t kLinear = 5, kAttention = 6;  // inputs of a part
constexpr size_t kCopyOfLinear = 2;
constexpr size_t kQkvAt = kOwn, kAttentionAt = kQkvAt + kLinear, kOutAt = kAttentionAt + kAttention,
                 kMlpAt = kOutAt + kLinear;
constexpr size_t kMostThreads = 64;
constexpr size_t kTogether = 8;  // rows of x that one thread normalises or adds

// The inputs of a layer without those of its MLP.
constexpr std::array<Port, kMlpAt> kLayerPorts = {{
    {"x", kFloat, kRequired},
    {"norm", kFloat, kRequired},
    {"post_norm", kFloat, kRequired},
    {"qkv_x", kFloat, kOptional},
    {"qkv_w", kUInt8, kRequired},
    {"qkv_copy", kUInt8, kRequired},
    {"qkv_scales", kFloat, kRequired},
    {"qkv_bias", kFloat, kOptional},
    {"attention_projected", kFloat, kOptional},
    {"attention_past_key", kFloat, kRequired},
    {"attention_past_value", kFloat, kRequired},
    {"attention_last", kInt32, kRequired},
    {"attention_cos", kFloat, kOptional},
    {"attention_sin", kFloat, kOptional},
    {"out_x", kFloat, kOptional},
    {"out_w", kUInt8, kRequired},
    {"out_copy", kUInt8, kRequired},
    {"out_scales", kFloat, kRequired},
    {"out_bias", kFloat, kOptional},
}};

template <size_t N>
constexpr std::array<Port, kMlpAt + N> with_layer_ports(const Port (&mlp)[N]) {
  std::array<Port, kMlpAt + N> all{};
  for (size_t i = 0; i < kMlpAt; ++i) all[i] = kLayerPorts[i];
  for (size_t i = 0; i < N; ++i) all[kMlpAt + i] = mlp[i];
  return all;
}

// A matrix of floats in memory of this op.
struct Matrix {
  float* data;
  int64_t rows, columns;

  Tensor tensor() const { return Tensor::matrix(data, rows, columns); }
  Outputs::Place place() const { return {data, 0}; }
};

// `Op` has the name, the ports and the outputs of the op, and says whether it has an attribute `layer`, and
// whether its linear layers are `tiled`; `mlp` makes its
// MLP.
template <class Op>
class Layer : public Op {
 public:
  Layer(const Api& api, const OrtKernelInfo* info)
      : api_(api), node_(api, info, Op::kName, std::data(Op::kPorts), kAttentionAt, Op::kHasLayer),
        qkv_(nested_linear_part(api, info, kQkvAt, Op::kTiled)),
        attention_(cached_attention_part(api, info, kAttentionAt)),
        out_(nested_linear_part(api, info, kOutAt, Op::kTiled)), mlp_(Op::mlp(api, info, kMlpAt)),
        n_heads_(node_.integer("n_heads")), epsilon_(node_.real_or("epsilon", 1e-5f)) {}

  static void infer(const Api& api, OrtShapeInferContext* context) {
    infer_like_input(api, context, kX, 0);  // the node may lack the other outputs
  }

  void compute(OrtKernelContext* context) const {
    Team::gather(api_, context, threads(), [&](Team& team) { lead(Pool(team), context); });
  }

 private:
  // The other threads prefetch the first weights while this one reads the inputs.
  void lead(const Pool& pool, OrtKernelContext* context) const {
    pool.ahead(qkv_->first_bytes());
    const std::vector<Tensor> in = node_.inputs(context);
    const Tensor& x = in[kX];
    if (x.rank != 2) node_.fail("x has " + std::to_string(x.rank) + " dimensions, not 2");
    const int64_t tokens = x.dims[0], width = x.dims[1];
    for (const size_t port : {kNorm, kPostNorm}) node_.expect(in, port, {width});
    std::vector<Tensor> qkv = qkv_->inputs(context), attention = attention_->inputs(context),
                        out = out_->inputs(context), mlp = mlp_->inputs(context);
    const int64_t projected = rows_of(qkv), head_dim = attention[1].rank == 4 ? attention[1].dims[3] : 0;
    if (rows_of(out) != width)
      node_.fail("out_copy has " + std::to_string(rows_of(out)) + " rows, not " + std::to_string(width));
    const Tensor y = node_.output(context, {tokens, width});
    Scratch scratch;
    Room sizes(nullptr);
    (void)Memory(sizes, tokens, width, projected, n_heads_ * head_dim);
    Room room(scratch.take(sizes.used()));
    const Memory memory(room, tokens, width, projected, n_heads_ * head_dim);
    const auto outputs = [&](std::vector<Outputs::Place> places) { return Outputs(node_, context, places); };
    normalise(pool, memory.normed, x.as<float>(), in[kNorm].as<float>());
    qkv[0] = memory.normed.tensor();
    pool.ahead(out_->first_bytes());
    qkv_->compute(qkv, outputs({memory.projected.place()}), pool);
    attention[0] = memory.projected.tensor();
    attention_->compute(attention, outputs({memory.attended.place(), {nullptr, 1}, {nullptr, 2}}), pool);
    out[0] = memory.attended.tensor();
    pool.ahead(mlp_->first_bytes());
    out_->compute(out, outputs({memory.hidden.place()}), pool);
    add(pool, memory.hidden, x.as<float>());
    normalise(pool, memory.normed, memory.hidden.data, in[kPostNorm].as<float>());
    mlp[0] = memory.normed.tensor();
    mlp_->compute(mlp, outputs({{y.data, 0}, {nullptr, 3}}), pool);
    add(pool, {static_cast<float*>(y.data), tokens, width}, memory.hidden.data);
  }

  struct Memory {
    Matrix normed, projected, attended, hidden;

    Memory(Room& room, int64_t tokens, int64_t width, int64_t projected_width, int64_t attended_width) {
      const auto matrix = [&](int64_t columns) {
        return Matrix{room.floats(static_cast<size_t>(tokens * columns)), tokens, columns};
      };
      normed = matrix(width), projected = matrix(projected_width);
      attended = matrix(attended_width), hidden = matrix(width);
    }
  };

  static size_t threads() {
    static const size_t cores = std::max(1u, std::thread::hardware_concurrency());
    return std::min(cores, kMostThreads);
  }

  // The rows of the weights of a linear layer.
  static int64_t rows_of(const std::vector<Tensor>& linear) {
    const Tensor& copy = linear[kCopyOfLinear];
    return copy.rank < 1 ? 0 : copy.dims[0];
  }

  // to = x, each row divided by the root of its mean square, times the weights
  void normalise(const Pool& pool, const Matrix& to, const float* x, const float* weights) const {
    const size_t width = static_cast<size_t>(to.columns), rows = static_cast<size_t>(to.rows);
    pool.run((rows + kTogether - 1) / kTogether, [&](size_t task) {
      for (size_t t = task * kTogether; t < std::min(rows, (task + 1) * kTogether); ++t) {
        const float* from = x + t * width;
        float lanes[16] = {};
        size_t k = 0;
        for (; k + 16 <= width; k += 16)
          for (size_t i = 0; i < 16; ++i) lanes[i] += from[k + i] * from[k + i];
        for (size_t i = 0; k < width; ++k, ++i) lanes[i] += from[k] * from[k];
        float squares = 0;
        for (const float lane : lanes) squares += lane;
        const float factor = 1 / std::sqrt(squares / static_cast<float>(width) + epsilon_);
        for (k = 0; k < width; ++k) to.data[t * width + k] = from[k] * factor * weights[k];
      }
    });
  }

  static void add(const Pool& pool, const Matrix& to, const float* other) {
    const size_t width = static_cast<size_t>(to.columns), rows = static_cast<size_t>(to.rows);
    pool.run((rows + kTogether - 1) / kTogether, [&](size_t task) {
      const size_t end = std::min(rows, (task + 1) * kTogether) * width;
      for (size_t i = task * kTogether * width; i < end; ++i) to.data[i] += other[i];
    });
  }

  const Api& api_;
  Node node_;
  std::unique_ptr<Part> qkv_, attention_, out_, mlp_;
  int64_t n_heads_;
  float epsilon_;
};

}  // namespace
}  // namespace shadowllm
