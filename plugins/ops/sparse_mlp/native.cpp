// SparseMLP: gate, up and down of the active neurons in one pass over their rows.
#include <algorithm>

#include "op.hpp"

namespace shadowllm {
namespace {

enum Input { kX, kIndices, kCount, kWGate, kBGate, kWUp, kBUp, kWDown, kBDown, kSGate, kSUp, kSDown };
constexpr size_t kTokenBlock = 64;  // tokens per pass over the weights

Activation parse_activation(const Node& node, const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  node.fail("activation '" + name + "' is none of relu, silu and gelu");
}

struct Bias {
  const void* data;
  RowType type;

  // h[i * tokens + t] += bias[ids[i]]
  void add(const Kernels& kernels, Picks picks, size_t tokens, float* h) const {
    if (data == nullptr) return;
    for (size_t i = 0; i < picks.count; ++i) {
      float value;
      kernels.widen(static_cast<const char*>(data) + picks.ids[i] * element_size(type), type, &value, 1);
      for (size_t t = 0; t < tokens; ++t) h[i * tokens + t] += value;
    }
  }
};

// Moves the neurons with a nonzero output to the front and returns their number. After ReLU most outputs are zero, and
// the rows of w_down for zeros need not be read.
size_t drop_zeros(Picks picks, size_t tokens, float* h, int32_t* kept_ids) {
  size_t kept = 0;
  for (size_t i = 0; i < picks.count; ++i) {
    const float* from = h + i * tokens;
    if (std::all_of(from, from + tokens, [](float value) { return value == 0; })) continue;
    if (kept != i) std::copy(from, from + tokens, h + kept * tokens);
    kept_ids[kept++] = picks.ids[i];
  }
  return kept;
}

class SparseMlp {
 public:
  static constexpr const char* kName = "SparseMLP";
  static constexpr int kOutputType = kFloat;
  static constexpr Port kPorts[] = {
      {"x", kFloat, kRequired},          {"indices", kInt32, kRequired},    {"count", kInt32, kRequired},
      {"w_gate", kUndefined, kOptional}, {"b_gate", kUndefined, kOptional}, {"w_up", kUndefined, kRequired},
      {"b_up", kUndefined, kOptional},   {"w_down", kUndefined, kRequired}, {"b_down", kUndefined, kOptional},
      {"s_gate", kFloat, kOptional},     {"s_up", kFloat, kOptional},       {"s_down", kFloat, kOptional},
  };

  SparseMlp(const Api& api, const OrtKernelInfo* info)
      : api_(api), node_(api, info, kName, kPorts, std::size(kPorts), true), kernels_(choose_kernels()) {
    activation_ = parse_activation(node_, node_.text("activation"));
    for (const auto& [weights, scales] : {std::pair{kWGate, kSGate}, {kWUp, kSUp}, {kWDown, kSDown}})
      node_.pack(weights, scales);
  }

  static void infer(const Api& api, OrtShapeInferContext* context) { infer_like_first_input(api, context); }

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = node_.inputs(context);
    const Tensor& x = in[kX];
    const size_t width = static_cast<size_t>(node_.width_of(x));
    check(in);
    const Tensor y = node_.output_like(context, x);
    if (y.size() == 0) return;
    const size_t tokens = y.size() / width;
    const Picks picks = node_.active(in[kIndices], in[kCount], in[kWUp].dims[0]);
    for (size_t first = 0; first < tokens; first += kTokenBlock)
      run(Pool(api_, context), in, picks, x.as<float>() + first * width, std::min(kTokenBlock, tokens - first),
          static_cast<float*>(y.data) + first * width);
  }

 private:
  void check(const std::vector<Tensor>& in) const {
    if (in[kWUp].rank != 2) node_.fail("w_up has " + std::to_string(in[kWUp].rank) + " dimensions, not 2");
    const int64_t width = node_.width_of(in[kX]), neurons = in[kWUp].dims[0];
    for (const size_t port : {kBGate, kBUp}) node_.expect(in, port, {neurons});
    node_.expect(in, kBDown, {width});
    if (in[kBGate].present() && !in[kWGate].present()) node_.fail("b_gate stands without w_gate");
  }

  Bias bias(const std::vector<Tensor>& in, Input port) const {
    if (!in[port].present()) return {nullptr, RowType::f32};
    return {in[port].data, node_.row_type(in[port], kPorts[port].name)};
  }

  void run(const Pool& pool, const std::vector<Tensor>& in, Picks picks, const float* x, size_t tokens,
           float* y) const {
    const bool gated = in[kWGate].present();
    const int64_t rows = in[kWUp].dims[0], columns = node_.width_of(in[kX]);
    const Rows up = node_.matrix(in, kWUp, kSUp, rows, columns), down = node_.matrix(in, kWDown, kSDown, rows, columns);
    const Rows gate = gated ? node_.matrix(in, kWGate, kSGate, rows, columns) : up;
    const Bias b_gate = bias(in, kBGate), b_up = bias(in, kBUp), b_down = bias(in, kBDown);
    const size_t width = up.width, neurons = picks.count, part = tokens * width;
    const size_t row_cost = up.cost() + down.cost() + (gated ? gate.cost() : 0), room = input_floats(width);
    const Chunks chunks(neurons, row_cost, tokens);
    // Prepared inputs, partial sums, two projections, the bias of the output, and the neurons left after drop_zeros.
    Scratch scratch;
    float* inputs = scratch.take(2 * room + chunks.count() * part + 2 * neurons * tokens + width + neurons);
    float* parts = inputs + 2 * room;
    float *hidden = parts + chunks.count() * part, *ups = hidden + neurons * tokens, *start = ups + neurons * tokens;
    int32_t* kept = reinterpret_cast<int32_t*>(start + width);
    const float* up_input = kernels_.prepare(up, x, tokens, inputs);
    const bool alike = gate.type == up.type && gate.block == up.block;
    const float* gate_input = alike ? up_input : kernels_.prepare(gate, x, tokens, inputs + room);
    pool.run(chunks.count(), [&](size_t c) {
      const Chunk chunk = chunks[c];
      const Picks mine{picks.ids + chunk.begin, chunk.size()};
      float *h = hidden + chunk.begin * tokens, *u = gated ? ups + chunk.begin * tokens : h;
      const bool enough = mine.count >= kLeastAhead, dense = activation_ != Activation::relu;
      if (gated) {
        kernels_.project(gate, mine, gate_input, tokens, h, {enough ? &up : nullptr, mine.ids});
        b_gate.add(kernels_, mine, tokens, h);
      }
      kernels_.project(up, mine, up_input, tokens, u, {enough && dense ? &down : nullptr, mine.ids});
      b_up.add(kernels_, mine, tokens, u);
      kernels_.activate(activation_, h, gated ? u : nullptr, mine.count * tokens);
      Picks left = mine;
      if (!dense) left = {kept + chunk.begin, drop_zeros(mine, tokens, h, kept + chunk.begin)};
      float* sum = parts + c * part;
      std::fill(sum, sum + part, 0.0f);
      kernels_.accumulate(down, left, h, tokens, sum, {});
    });
    if (b_down.data != nullptr) kernels_.widen(b_down.data, b_down.type, start, width);
    add_up(pool, kernels_, parts, chunks.count(), tokens, width, b_down.data ? start : nullptr, y);
  }

  const Api& api_;
  Node node_;
  const Kernels& kernels_;
  Activation activation_{};
};

}  // namespace

const Entry kSparseMlp = entry_of<SparseMlp>();

}  // namespace shadowllm
