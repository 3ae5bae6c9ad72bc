// SparseMLP: gate, up and down of the active neurons in one pass over their rows. With a low-bit copy, the other
// neurons are computed from it in the same pass. If the op chooses the neurons, an earlier pass computes gate and up of
// all neurons from the copy, and the later one uses these products. The full rows may be residuals of the copy: then
// they are added to its products, of the active neurons too (mlp_products.hpp). Without indices and copy: see
// gate_first.hpp.
#include <functional>

#include "mlp_steps.hpp"

namespace shadowllm {
namespace {

enum Input {
  kX,
  kIndices,
  kCount,
  kWGate,
  kBGate,
  kWUp,
  kBUp,
  kWDown,
  kBDown,
  kSGate,
  kSUp,
  kSDown,
  kRest,
  kCGate,
  kCUp,
  kCDown,
  kCsGate,
  kCsUp,
  kCsDown,
  kDownNorms,
  // The next two are not in the op's schema: a graph pass of the runtime adds them. Then x is not normed, and the
  // result is added to it.
  kNormWeight,
  kNormBias
};

Activation parse_activation(const Node& node, const std::string& name) {
  constexpr const char* kNames[] = {"relu", "relu2", "fatrelu", "drelu", "silu", "gelu", "gelu_tanh", "quick_gelu"};
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (name == kNames[i]) return {static_cast<Activation::Kind>(i), node.real_or("threshold", 0)};
  node.fail("activation '" + name + "' is not supported");
}

class SparseMlp {
 public:
  static constexpr const char* kName = "SparseMLP";
  static constexpr Port kPorts[] = {
      {"x", kFloat, kRequired},          {"indices", kInt32, kOptional},    {"count", kInt32, kRequired},
      {"w_gate", kUndefined, kOptional}, {"b_gate", kUndefined, kOptional}, {"w_up", kUndefined, kRequired},
      {"b_up", kUndefined, kOptional},   {"w_down", kUndefined, kRequired}, {"b_down", kUndefined, kOptional},
      {"s_gate", kFloat, kOptional},     {"s_up", kFloat, kOptional},       {"s_down", kFloat, kOptional},
      {"rest", kInt32, kOptional},       {"c_gate", kUInt8, kOptional},     {"c_up", kUInt8, kOptional},
      {"c_down", kUInt8, kOptional},     {"cs_gate", kFloat, kOptional},    {"cs_up", kFloat, kOptional},
      {"cs_down", kFloat, kOptional},    {"down_norms", kFloat, kOptional}, {"norm_weight", kFloat, kOptional},
      {"norm_bias", kFloat, kOptional},
  };
  static constexpr Port kOutputs[] = {{"y", kFloat, kRequired}, {"chosen", kInt32, kOptional}};

  SparseMlp(const Api& api, const OrtKernelInfo* info)
      : api_(api), node_(api, info, kName, kPorts, std::size(kPorts), true), kernels_(choose_kernels()) {
    activation_ = parse_activation(node_, node_.text("activation"));
    for (const auto& [weights, scales] : {std::pair{kWGate, kSGate}, {kWUp, kSUp}, {kWDown, kSDown}})
      node_.pack(weights, scales);
    node_.pack_records({{kWGate, kSGate}, {kWUp, kSUp}, {kWDown, kSDown}});
  }

  static void infer(const Api& api, OrtShapeInferContext* context) { infer_like_first_input(api, context); }

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = node_.inputs(context);
    const size_t selections = check(in);
    const Tensor y = node_.output_like(context, in[kX]);
    const Tensor chosen = node_.chosen_output(context, in[kCount], in[kWUp].dims[0]);
    std::vector<Call> calls;
    for (size_t i = 0; i < selections; ++i) calls.push_back(read(in, i, selections, y, chosen));
    Scratch scratch;
    Room sizes(nullptr);
    (void)Memory(sizes, calls);
    Room room(scratch.take(sizes.used()));
    const Memory memory(room, calls);
    for (size_t i = 0; i < selections; ++i)
      if (calls[i].residual != nullptr) calls[i].x = memory.choices[i].normed;
    MlpSteps(kernels_, activation_, calls, memory).run(Pool(api_, context));
  }

 private:
  // Returns the number of selections.
  size_t check(const std::vector<Tensor>& in) const {
    if (in[kWUp].rank != 2) node_.fail("w_up has " + std::to_string(in[kWUp].rank) + " dimensions, not 2");
    const int64_t width = node_.width_of(in[kX]), neurons = in[kWUp].dims[0];
    for (const size_t port : {kBGate, kBUp, kDownNorms}) node_.expect(in, port, {neurons});
    node_.expect(in, kBDown, {width});
    if (in[kBGate].present() && !in[kWGate].present()) node_.fail("b_gate stands without w_gate");
    const size_t selections = node_.selections(in[kCount], in[kX]);
    node_.expect_one_each(in, kRest, selections);
    check_copy(in, selections);
    return selections;
  }

  // The copy has the matrices of the layer, or none.
  void check_copy(const std::vector<Tensor>& in, size_t selections) const {
    const bool copied = in[kCUp].present();
    for (const auto& [copy, scales] : {std::pair{kCGate, kCsGate}, {kCUp, kCsUp}, {kCDown, kCsDown}})
      if (in[copy].present() != in[scales].present())
        node_.fail(std::string(kPorts[copy].name) + " and " + kPorts[scales].name + " must stand together");
    for (const auto copy : {kCGate, kCUp, kCDown}) {
      const bool needed = copied && (copy != kCGate || in[kWGate].present());
      if (in[copy].present() != needed)
        node_.fail("the low-bit copy must have the matrices of the layer, but " + std::string(kPorts[copy].name) +
                   (needed ? " is missing" : " stands alone"));
    }
    if (!in[kIndices].present() && !gate_first(in) && !(copied && in[kDownNorms].present()))
      node_.fail("without indices, the neurons are chosen with a low-bit copy and down_norms, but these are missing");
    for (size_t i = 0; i < selections; ++i)
      if (Node::number(in[kRest], i) != 0 && !copied) node_.fail("rest is 1, but there is no low-bit copy");
  }

  bool gate_first(const std::vector<Tensor>& in) const {
    return !in[kIndices].present() && !in[kCUp].present() && !in[kDownNorms].present() && activation_.zeroes();
  }

  static bool ascending(Picks picks) {
    return std::adjacent_find(picks.ids, picks.ids + picks.count, std::greater_equal<>()) == picks.ids + picks.count;
  }

  Bias bias(const std::vector<Tensor>& in, Input port) const {
    if (!in[port].present()) return {};
    return {in[port].data, node_.row_type(in[port], kPorts[port].name)};
  }

  Call read(const std::vector<Tensor>& in, size_t selection, size_t selections, const Tensor& y,
            const Tensor& chosen) const {
    const int64_t rows = in[kWUp].dims[0], columns = node_.width_of(in[kX]);
    const int64_t count = Node::number(in[kCount], selection);
    Call call{};
    call.choosing = !in[kIndices].present(), call.gate_first = gate_first(in);
    if (call.choosing && !call.gate_first) node_.bound("count", count, 0, rows);
    const bool gated = in[kWGate].present(), copied = in[kCUp].present();
    if (copied) {
      const Rows low = node_.copy(in, kCUp, kCsUp, rows, columns);
      call.low = {gated ? node_.copy(in, kCGate, kCsGate, rows, columns) : low, low,
                  node_.copy(in, kCDown, kCsDown, rows, columns), gated};
      if (call.low.gate.block != low.block || call.low.down.block != low.block)
        node_.fail("the matrices of the low-bit copy have blocks of different sizes");
    }
    const auto full = [&](Input port, Input scales, const Rows& low) {
      const bool nested = copied && Node::is_residual(in[port], in[scales]);
      return nested ? node_.residual(in, port, low, rows) : node_.matrix(in, port, scales, rows, columns);
    };
    const Rows up = full(kWUp, kSUp, call.low.up), down = full(kWDown, kSDown, call.low.down);
    call.full = {gated ? full(kWGate, kSGate, call.low.gate) : up, up, down, gated};
    if ((up.step == 0) != (down.step == 0) || (up.step == 0) != (call.full.gate.step == 0))
      node_.fail("some matrices are residuals of the low-bit copy, and others are not");
    call.b_gate = bias(in, kBGate), call.b_up = bias(in, kBUp), call.b_down = bias(in, kBDown);
    call.width = static_cast<size_t>(columns), call.neurons = static_cast<size_t>(rows);
    call.full_count = static_cast<size_t>(call.gate_first ? rows : std::max<int64_t>(count, 0));
    call.rest = Node::number(in[kRest], selection) != 0 && count < rows;
    call.copied = call.nested() || (copied && count < rows && (call.choosing || call.rest));
    call.norm = node_.norm(in, kNormWeight, kNormBias, columns);
    call.norms = in[kDownNorms].as<float>();
    call.picks = {nullptr, call.full_count};
    if (!call.choosing) call.picks = node_.active(in[kIndices], in[kCount], selection, rows);
    if (call.nested() && !call.choosing && !ascending(call.picks)) node_.fail("the indices are not in ascending order");
    const size_t tokens = call.width == 0 ? 0 : y.size() / call.width / selections;
    const size_t first = selection * tokens * call.width;
    call.tokens = tokens, call.x = in[kX].as<float>() + first, call.y = static_cast<float*>(y.data) + first;
    if (call.norm.weight != nullptr) call.residual = call.x;
    if (chosen.present()) call.listed = static_cast<int32_t*>(chosen.data) + selection * call.neurons;
    return call;
  }

  const Api& api_;
  Node node_;
  const Kernels& kernels_;
  Activation activation_{};
};

}  // namespace

const Entry kSparseMlp = entry_of<SparseMlp>();

}  // namespace shadowllm
