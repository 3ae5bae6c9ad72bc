// DecoderLayer: a whole layer. Its parts are other ops of this library. They use one team of threads, so that a thread
// does not stop between them.
#include <algorithm>
#include <cmath>
#include <memory>
#include <thread>

#include "op.hpp"
#include "room.hpp"

namespace shadowllm {
namespace {

enum Input { kX, kNorm, kPostNorm, kOwn };  // then the inputs of the parts

constexpr size_t kLinear = 4, kAttention = 6;  // inputs of a part
constexpr size_t kQkvAt = kOwn, kAttentionAt = kQkvAt + kLinear, kOutAt = kAttentionAt + kAttention,
                 kMlpAt = kOutAt + kLinear;
constexpr size_t kMostThreads = 64;
constexpr size_t kTogether = 8;  // rows of x that one thread normalises

// A matrix of floats in memory of this op.
struct Matrix {
  float* data;
  int64_t rows, columns;

  size_t size() const { return static_cast<size_t>(rows * columns); }
  Tensor tensor() const {
    Tensor found;
    found.data = data, found.type = kFloat, found.rank = 2;
    found.dims[0] = rows, found.dims[1] = columns;
    return found;
  }
  Outputs::Place place() const { return {data, 0}; }
};

class DecoderLayer {
 public:
  static constexpr const char* kName = "DecoderLayer";
  static constexpr Port kPorts[] = {
      {"x", kFloat, kRequired},
      {"norm", kFloat, kRequired},
      {"post_norm", kFloat, kRequired},
      {"qkv_x", kFloat, kOptional},
      {"qkv_w", kUInt8, kRequired},
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
      {"out_scales", kFloat, kRequired},
      {"out_bias", kFloat, kOptional},
      {"mlp_x", kFloat, kOptional},
      {"mlp_indices", kInt32, kOptional},
      {"mlp_count", kInt32, kRequired},
      {"mlp_w_gate", kUndefined, kOptional},
      {"mlp_b_gate", kUndefined, kOptional},
      {"mlp_w_up", kUndefined, kRequired},
      {"mlp_b_up", kUndefined, kOptional},
      {"mlp_w_down", kUndefined, kRequired},
      {"mlp_b_down", kUndefined, kOptional},
      {"mlp_s_gate", kFloat, kOptional},
      {"mlp_s_up", kFloat, kOptional},
      {"mlp_s_down", kFloat, kOptional},
      {"mlp_rest", kInt32, kOptional},
      {"mlp_c_gate", kUInt8, kOptional},
      {"mlp_c_up", kUInt8, kOptional},
      {"mlp_c_down", kUInt8, kOptional},
      {"mlp_cs_gate", kFloat, kOptional},
      {"mlp_cs_up", kFloat, kOptional},
      {"mlp_cs_down", kFloat, kOptional},
      {"mlp_down_norms", kFloat, kOptional},
  };
  static constexpr Port kOutputs[] = {{"y", kFloat, kRequired},
                                      {"key", kFloat, kRequired},
                                      {"value", kFloat, kRequired},
                                      {"chosen", kInt32, kOptional}};

  DecoderLayer(const Api& api, const OrtKernelInfo* info)
      : api_(api), node_(api, info, kName, kPorts, kOwn, true), qkv_(linear_w8a8_part(api, info, kQkvAt)),
        attention_(cached_attention_part(api, info, kAttentionAt)), out_(linear_w8a8_part(api, info, kOutAt)),
        mlp_(sparse_mlp_part(api, info, kMlpAt)), n_heads_(node_.integer("n_heads")),
        epsilon_(node_.real_or("epsilon", 1e-5f)) {}

  static void infer(const Api& api, OrtShapeInferContext* context) {
    infer_like_input(api, context, kX, 0);
    infer_like_input(api, context, kAttentionAt + 1, 1);
    infer_like_input(api, context, kAttentionAt + 2, 2);
  }

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = node_.inputs(context);
    const Tensor& x = in[kX];
    if (x.rank != 2) node_.fail("x has " + std::to_string(x.rank) + " dimensions, not 2");
    const int64_t tokens = x.dims[0], width = x.dims[1];
    for (const size_t port : {kNorm, kPostNorm}) node_.expect(in, port, {width});
    std::vector<Tensor> qkv = qkv_->inputs(context), attention = attention_->inputs(context),
                        out = out_->inputs(context), mlp = mlp_->inputs(context);
    const int64_t projected = rows_of(qkv), head_dim = attention[1].rank == 4 ? attention[1].dims[3] : 0;
    if (rows_of(out) != width)
      node_.fail("out_w has " + std::to_string(rows_of(out)) + " rows, not " + std::to_string(width));
    const Tensor y = node_.output(context, {tokens, width});
    Scratch scratch;
    Room sizes(nullptr);
    (void)Memory(sizes, tokens, width, projected, n_heads_ * head_dim);
    Room room(scratch.take(sizes.used()));
    const Memory memory(room, tokens, width, projected, n_heads_ * head_dim);
    Team::gather(api_, context, threads(), [&](Team& team) {
      const Pool pool(team);
      const auto outputs = [&](std::vector<Outputs::Place> places) { return Outputs(node_, context, places); };
      normalise(pool, memory.normed, x.as<float>(), in[kNorm].as<float>());
      qkv[0] = memory.normed.tensor();
      qkv_->compute(qkv, outputs({memory.projected.place()}), pool);
      attention[0] = memory.projected.tensor();
      attention_->compute(attention, outputs({memory.attended.place(), {nullptr, 1}, {nullptr, 2}}), pool);
      out[0] = memory.attended.tensor();
      out_->compute(out, outputs({memory.hidden.place()}), pool);
      add(memory.hidden.data, x.as<float>(), memory.hidden.size());
      normalise(pool, memory.normed, memory.hidden.data, in[kPostNorm].as<float>());
      mlp[0] = memory.normed.tensor();
      mlp_->compute(mlp, outputs({{y.data, 0}, {nullptr, 3}}), pool);
      add(static_cast<float*>(y.data), memory.hidden.data, memory.hidden.size());
    });
  }

 private:
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
  static int64_t rows_of(const std::vector<Tensor>& linear) { return linear[1].rank < 1 ? 0 : linear[1].dims[0]; }

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

  static void add(float* to, const float* other, size_t size) {
    for (size_t i = 0; i < size; ++i) to[i] += other[i];
  }

  const Api& api_;
  Node node_;
  std::unique_ptr<Part> qkv_, attention_, out_, mlp_;
  int64_t n_heads_;
  float epsilon_;
};

}  // namespace

const Entry kDecoderLayer = entry_of<DecoderLayer>();

}  // namespace shadowllm
