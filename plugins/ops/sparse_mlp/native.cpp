// SparseMLP: gate, up and down of the active neurons in one pass over their rows. With a low-bit copy, the other
// neurons are computed from it in the same pass. If the op chooses the neurons, an earlier pass computes gate and up of
// all neurons from the copy, and the later one uses these products. The full rows may be residuals of the copy: then
// they are added to its products, of the active neurons too (mlp_products.hpp).
#include <cmath>
#include <functional>
#include <numeric>

#include "largest.hpp"
#include "mlp_products.hpp"

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
  kDownNorms
};

Activation parse_activation(const Node& node, const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  node.fail("activation '" + name + "' is none of relu, silu and gelu");
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
      {"cs_down", kFloat, kOptional},    {"down_norms", kFloat, kOptional},
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
    check(in);
    Call call = read(in);
    const int64_t neurons = in[kWUp].dims[0];
    Picks picks{nullptr, call.full_count};
    if (!call.choosing) picks = node_.active(in[kIndices], in[kCount], neurons);
    if (call.nested() && !call.choosing && !ascending(picks)) node_.fail("the indices are not in ascending order");
    const Tensor y = node_.output_like(context, in[kX]), chosen = node_.optional_output(context, 1, {neurons});
    call.tokens = call.width == 0 ? 0 : y.size() / call.width;
    const size_t last = call.tokens % kTokenBlock, most = std::min(kTokenBlock, call.tokens);
    Room choice(nullptr), longest(nullptr), rest(nullptr);
    (void)ChoiceRoom(choice, call), (void)BlockRoom(longest, call, most), (void)BlockRoom(rest, call, last);
    Scratch scratch;
    float* const memory = scratch.take(choice.used() + std::max(longest.used(), rest.used()));
    Room start(memory);
    const ChoiceRoom choice_room(start, call);
    if (call.copied || call.choosing) std::iota(choice_room.all, choice_room.all + neurons, 0);
    if (call.copied) std::fill(choice_room.scores, choice_room.scores + neurons, 0.0f);
    const Pool pool(api_, context);
    // Calls pass(memory, inputs, outputs) for each block of tokens.
    const auto for_blocks = [&](auto pass) {
      for (size_t first = 0; first < call.tokens; first += kTokenBlock) {
        Room room(memory + choice.used());
        pass(BlockRoom(room, call, std::min(kTokenBlock, call.tokens - first)), in[kX].as<float>() + first * call.width,
             static_cast<float*>(y.data) + first * call.width);
      }
    };
    const bool keeps = call.tokens <= kTokenBlock;  // whether the products of the first pass are kept
    if (call.choosing) {
      if (call.scoring())
        for_blocks([&](const BlockRoom& room, const float* x, float*) { score(pool, call, choice_room, room, x); });
      picks.ids = choose(call, choice_room);
    }
    if (chosen.present()) {
      int32_t* out = static_cast<int32_t*>(chosen.data);
      std::fill(std::copy_n(picks.ids, std::min(picks.count, call.neurons), out), out + neurons, -1);
    }
    if (call.copied && !call.nested()) mark(call, picks, choice_room.marks);
    for_blocks([&](const BlockRoom& room, const float* x, float* to) {
      run(pool, call, picks, choice_room, room, x, call.scoring() && keeps, to);
    });
  }

 private:
  void check(const std::vector<Tensor>& in) const {
    if (in[kWUp].rank != 2) node_.fail("w_up has " + std::to_string(in[kWUp].rank) + " dimensions, not 2");
    const int64_t width = node_.width_of(in[kX]), neurons = in[kWUp].dims[0];
    for (const size_t port : {kBGate, kBUp, kDownNorms}) node_.expect(in, port, {neurons});
    node_.expect(in, kBDown, {width});
    if (in[kBGate].present() && !in[kWGate].present()) node_.fail("b_gate stands without w_gate");
    if (in[kCount].size() != 1) node_.fail("count has " + std::to_string(in[kCount].size()) + " elements, not 1");
    if (in[kRest].present() && in[kRest].size() != 1)
      node_.fail("rest has " + std::to_string(in[kRest].size()) + " elements, not 1");
    check_copy(in);
  }

  // The copy has the matrices of the layer, or none.
  void check_copy(const std::vector<Tensor>& in) const {
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
    if (!in[kIndices].present() && !(copied && in[kDownNorms].present()))
      node_.fail("without indices, the neurons are chosen with a low-bit copy and down_norms, but these are missing");
    if (wants_rest(in) && !copied) node_.fail("rest is 1, but there is no low-bit copy");
  }

  static bool ascending(Picks picks) {
    return std::adjacent_find(picks.ids, picks.ids + picks.count, std::greater_equal<>()) == picks.ids + picks.count;
  }

  static bool wants_rest(const std::vector<Tensor>& in) { return in[kRest].present() && *in[kRest].as<int32_t>() != 0; }

  Bias bias(const std::vector<Tensor>& in, Input port) const {
    if (!in[port].present()) return {};
    return {in[port].data, node_.row_type(in[port], kPorts[port].name)};
  }

  Call read(const std::vector<Tensor>& in) const {
    const int64_t rows = in[kWUp].dims[0], columns = node_.width_of(in[kX]), count = *in[kCount].as<int32_t>();
    Call call{};
    call.choosing = !in[kIndices].present();
    if (call.choosing) node_.bound("count", count, 0, rows);
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
    call.full_count = static_cast<size_t>(std::max<int64_t>(count, 0));
    call.rest = wants_rest(in) && count < rows;
    call.copied = call.nested() || (copied && count < rows && (call.choosing || call.rest));
    call.norms = in[kDownNorms].as<float>();
    return call;
  }

  Inputs prepare(const Matrices& of, const float* x, size_t tokens, float* room) const {
    const float* up = kernels_.prepare(of.up, x, tokens, room);
    if (of.gate.type == of.up.type && of.gate.block == of.up.block) return {up, up};
    return {kernels_.prepare(of.gate, x, tokens, room + input_floats(of.up.width)), up};
  }

  // Inputs for the copy: x, with zeros up to a whole number of blocks.
  Inputs prepare_low(const Call& call, const BlockRoom& room, const float* x) const {
    if (call.padded()) {
      const size_t wide = call.low.up.width;
      std::fill(room.low_x, room.low_x + room.tokens * wide, 0.0f);
      for (size_t t = 0; t < room.tokens; ++t)
        std::copy(x + t * call.width, x + (t + 1) * call.width, room.low_x + t * wide);
      x = room.low_x;
    }
    return prepare(call.low, x, room.tokens, room.low_inputs);
  }

  // h[i * tokens + t] = act(gate + b_gate) * (up + b_up) of the picked neurons. `after`: the rows that are read next.
  void products(const Call& call, const Matrices& of, Picks picks, Inputs inputs, size_t tokens, const Rows* after,
                float* h, float* u) const {
    const bool enough = picks.count >= kLeastAhead;
    if (of.gated) {
      kernels_.project(of.gate, picks, inputs.gate, tokens, h, {enough ? &of.up : nullptr, picks.ids});
      call.b_gate.add(kernels_, picks, tokens, h);
    } else {
      u = h;
    }
    kernels_.project(of.up, picks, inputs.up, tokens, u, {enough ? after : nullptr, picks.ids});
    call.b_up.add(kernels_, picks, tokens, u);
    kernels_.activate(activation_, h, of.gated ? u : nullptr, picks.count * tokens);
  }

  // Adds to the scores of all neurons: norm * sum over the tokens of |product|.
  void score(const Pool& pool, const Call& call, const ChoiceRoom& choice, const BlockRoom& room,
             const float* x) const {
    const Chunks chunks = call.chunks(room.tokens);
    const Inputs inputs = prepare_low(call, room, x);
    pool.run(chunks.count(), [&](size_t c) {
      const Chunk chunk = chunks[c];
      low_products(kernels_, activation_, call, room, {choice.all + chunk.begin, chunk.size()}, chunk.begin, inputs);
      for (size_t i = chunk.begin; i < chunk.end; ++i) {
        const float* h = room.low_hidden + i * room.tokens;
        float total = 0;
        for (size_t t = 0; t < room.tokens; ++t) total += std::fabs(h[t]);
        choice.scores[i] += call.norms[i] * total;
      }
    });
  }

  const int32_t* choose(const Call& call, const ChoiceRoom& choice) const {
    if (!call.scoring()) return choice.all;
    select_largest(kernels_, choice.scores, call.neurons, call.full_count, choice.keys, choice.chosen);
    return choice.chosen;
  }

  static void mark(const Call& call, Picks picks, int32_t* marks) {
    std::fill(marks, marks + call.neurons, 0);
    for (size_t i = 0; i < picks.count; ++i) marks[picks.ids[i]] = 1;
  }

  // Adds the neurons of a chunk that are not marked, from the copy, to `sum` (tokens, width).
  void add_rest(const Call& call, const ChoiceRoom& choice, const BlockRoom& room, Chunk chunk, float* padded,
                float* sum) const {
    const size_t tokens = room.tokens;
    float* h = room.low_hidden + chunk.begin * tokens;
    for (size_t i = chunk.begin; i < chunk.end; ++i)
      if (choice.marks[i] != 0) std::fill_n(h + (i - chunk.begin) * tokens, tokens, 0.0f);
    Picks left{choice.all + chunk.begin, chunk.size()};
    if (activation_ == Activation::relu) {
      int32_t* kept = room.low_kept + chunk.begin;
      left = {kept, drop_zeros(left, tokens, h, kept)};
    }
    with_padding(call, tokens, padded, sum,
                 [&](float* to) { kernels_.accumulate(call.low.down, left, h, tokens, to, {}); });
  }

  // Calls add(to) with `sum`, or with zeros of padded rows, which are then added to it.
  template <class Add>
  static void with_padding(const Call& call, size_t tokens, float* padded, float* sum, Add add) {
    if (!call.padded()) return add(sum);
    const size_t wide = call.low.down.width;
    std::fill(padded, padded + tokens * wide, 0.0f);
    add(padded);
    for (size_t t = 0; t < tokens; ++t)
      for (size_t k = 0; k < call.width; ++k) sum[t * call.width + k] += padded[t * wide + k];
  }

  // Adds a chunk of neurons whose full rows are the copy plus residuals to `sum` (tokens, width).
  void add_nested(const Call& call, Picks picks, const ChoiceRoom& choice, const BlockRoom& room, Chunk chunk,
                  Inputs inputs, bool has_products, float* padded, float* sum) const {
    const NestedChunk nested(kernels_, activation_, call, room, picks, choice.all, chunk);
    with_padding(call, room.tokens, padded, sum, [&](float* to) { nested.add(inputs, has_products, to); });
  }

  // Adds a chunk of the active neurons, from their full rows, to `sum` (tokens, width).
  void add_full(const Call& call, Picks picks, const BlockRoom& room, Chunk chunk, Inputs inputs, float* sum) const {
    const Picks mine{picks.ids + chunk.begin, chunk.size()};
    const size_t at = chunk.begin * room.tokens;
    const bool dense = activation_ != Activation::relu;
    float* h = room.hidden + at;
    products(call, call.full, mine, inputs, room.tokens, dense ? &call.full.down : nullptr, h, room.ups + at);
    Picks left = mine;
    if (!dense) left = {room.kept + chunk.begin, drop_zeros(mine, room.tokens, h, room.kept + chunk.begin)};
    kernels_.accumulate(call.full.down, left, h, room.tokens, sum, {});
  }

  void run(const Pool& pool, const Call& call, Picks picks, const ChoiceRoom& choice, const BlockRoom& room,
           const float* x, bool has_products, float* y) const {
    const size_t part = room.tokens * call.width, low_part = call.padded() ? room.tokens * call.low.down.width : 0;
    const Chunks chunks = call.chunks(room.tokens), full_chunks = chunks.of(picks.count);
    const bool nested = call.nested(), low = call.rest && !has_products;
    const Inputs inputs = nested ? Inputs{} : prepare(call.full, x, room.tokens, room.inputs);
    const Inputs low_inputs = low || nested ? prepare_low(call, room, x) : Inputs{};
    pool.run(chunks.count(), [&](size_t c) {
      const Chunk chunk = chunks[c];
      float *sum = room.parts + c * part, *padded = room.low_parts + c * low_part;
      std::fill(sum, sum + part, 0.0f);
      if (nested) return add_nested(call, picks, choice, room, chunk, low_inputs, has_products, padded, sum);
      if (low)
        low_products(kernels_, activation_, call, room, {choice.all + chunk.begin, chunk.size()}, chunk.begin,
                     low_inputs);
      if (call.rest) add_rest(call, choice, room, chunk, padded, sum);
      add_full(call, picks, room, full_chunks[c], inputs, sum);
    });
    const bool biased = call.b_down.data != nullptr;
    if (biased) kernels_.widen(call.b_down.data, call.b_down.type, room.start, call.width);
    add_up(pool, kernels_, room.parts, chunks.count(), room.tokens, call.width, biased ? room.start : nullptr, y);
  }

  const Api& api_;
  Node node_;
  const Kernels& kernels_;
  Activation activation_{};
};

}  // namespace

const Entry kSparseMlp = entry_of<SparseMlp>();

}  // namespace shadowllm
