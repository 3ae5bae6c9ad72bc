// SparseMLP: gate, up and down of the active neurons in one pass over their rows. With a low-bit copy, the other
// neurons are computed from it in the same pass. If the op chooses the neurons, an earlier pass computes gate and up of
// all neurons from the copy, and the later one uses these products. The full rows may be residuals of the copy: then
// they are added to its products, of the active neurons too (mlp_products.hpp). Without indices and copy: see
// gate_first.hpp.
#include <cmath>
#include <functional>
#include <numeric>

#include "activation.hpp"
#include "gate_first.hpp"
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

  SparseMlp(const Api& api, const OrtKernelInfo* info, size_t first = 0)
      : api_(api), node_(api, info, kName, kPorts, std::size(kPorts), true, first), kernels_(choose_kernels()) {
    activation_ = parse_activation(node_);
    for (const auto& [weights, scales] : {std::pair{kWGate, kSGate}, {kWUp, kSUp}, {kWDown, kSDown}})
      node_.pack(weights, scales);
    node_.shorten({kCsGate, kCsUp, kCsDown});
    for (const auto& [copy, scales] : {std::pair{kCGate, kCsGate}, {kCUp, kCsUp}}) node_.tile(kernels_, copy, scales);
    node_.pack_records({{kWGate, kSGate}, {kWUp, kSUp}, {kWDown, kSDown}});
  }

  static void infer(const Api& api, OrtShapeInferContext* context) { infer_like_input(api, context, kX, 0); }

  Bytes first_bytes() const { return node_.first_bytes(kCUp); }
  std::vector<Tensor> inputs(const OrtKernelContext* context) const { return node_.inputs(context); }

  void compute(OrtKernelContext* context) const {
    compute(inputs(context), Outputs(node_, context), Pool(api_, context));
  }

  void compute(const std::vector<Tensor>& in, const Outputs& outputs, const Pool& pool) const {
    const size_t selections = check(in);
    const Tensor y = outputs.get(0, in[kX].dims.data(), static_cast<size_t>(in[kX].rank));
    const Tensor chosen = node_.chosen_output(outputs, in[kCount], in[kWUp].dims[0]);
    std::vector<Call> calls;
    for (size_t i = 0; i < selections; ++i) calls.push_back(read(in, i, selections, y, chosen));
    Scratch scratch;
    Room sizes(nullptr);
    (void)Memory(sizes, calls);
    Room room(scratch.take(sizes.used()));
    const Memory memory(room, calls);
    run(pool, calls, memory);
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
    const auto full = [&](Input port, Input scales, Rows& low) {
      if (!copied || !Node::is_residual(in[port], in[scales])) return node_.matrix(in, port, scales, rows, columns);
      const Rows found = node_.residual(in, port, low, rows);
      low.exact |= found.type == RowType::i2;  // they share an input, and no kernel of 2 bits reads it in integers
      return found;
    };
    const Rows up = full(kWUp, kSUp, call.low.up), down = full(kWDown, kSDown, call.low.down);
    call.full = {gated ? full(kWGate, kSGate, call.low.gate) : up, up, down, gated};
    if ((up.step == 0) != (down.step == 0) || (up.step == 0) != (call.full.gate.step == 0))
      node_.fail("some matrices are residuals of the low-bit copy, and others are not");
    call.b_gate = bias(in, kBGate), call.b_up = bias(in, kBUp), call.b_down = bias(in, kBDown);
    call.width = static_cast<size_t>(columns), call.neurons = static_cast<size_t>(rows);
    call.full_count = static_cast<size_t>(call.gate_first ? rows : std::max<int64_t>(count, 0));
    call.picks = {nullptr, call.full_count};
    if (!call.choosing) call.picks = node_.active(in[kIndices], in[kCount], selection, rows);
    const bool all = count >= rows && (call.choosing || ascending(call.picks));  // indices that repeat are not all
    call.rest = Node::number(in[kRest], selection) != 0 && !all;
    call.copied = call.nested() || (copied && !all && (call.choosing || call.rest));
    call.norms = in[kDownNorms].as<float>();
    if (call.nested() && !call.choosing && !ascending(call.picks)) node_.fail("the indices are not in ascending order");
    const size_t tokens = call.width == 0 ? 0 : y.size() / call.width / selections;
    const size_t first = selection * tokens * call.width;
    call.tokens = tokens, call.x = in[kX].as<float>() + first, call.y = static_cast<float*>(y.data) + first;
    if (chosen.present()) call.listed = static_cast<int32_t*>(chosen.data) + selection * call.neurons;
    return call;
  }

  Inputs prepare(const Matrices& of, const float* x, size_t tokens, float* room) const {
    const float* up = kernels_.prepare(of.up, x, tokens, room);
    if (of.gate.type == of.up.type && of.gate.block == of.up.block) return {up, up};
    return {kernels_.prepare(of.gate, x, tokens, room + tokens * input_floats(of.up.width)), up};
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
    if (of.gated) {
      kernels_.project(of.gate, picks, inputs.gate, tokens, h, Ahead::of(&of.up, picks));
      call.b_gate.add(kernels_, picks, tokens, h);
    } else {
      u = h;
    }
    kernels_.project(of.up, picks, inputs.up, tokens, u, Ahead::of(after, picks));
    call.b_up.add(kernels_, picks, tokens, u);
    kernels_.activate(activation_, h, of.gated ? u : nullptr, picks.count * tokens);
  }

  // Adds a chunk to the scores of all neurons: norm * sum over the tokens of |product|.
  void score(const Batch& batch, Chunk chunk) const {
    low_products(kernels_, activation_, batch, {batch.front().choice.all + chunk.begin, chunk.size()}, chunk.begin);
    for (const Block* block : batch) {
      const BlockRoom& room = block->room;
      for (size_t i = chunk.begin; i < chunk.end; ++i) {
        const float* h = room.low_hidden + i * room.tokens;
        float total = 0;
        for (size_t t = 0; t < room.tokens; ++t) total += std::fabs(h[t]);
        block->choice.scores[i] += block->call.norms[i] * total;
      }
    }
  }

  // Chooses the active neurons from the scores, if they are not given, and lists and marks them.
  void choose(Call& call, const ChoiceRoom& choice) const {
    if (call.scoring())
      select_largest(kernels_, choice.scores, call.neurons, call.full_count, choice.keys, choice.chosen);
    if (call.choosing) call.picks.ids = call.scoring() ? choice.chosen : choice.all;
    if (call.gate_first) return void(std::fill_n(choice.marks, call.neurons, 0));
    if (call.listed != nullptr) {
      const size_t count = std::min(call.picks.count, call.neurons);
      std::fill(std::copy_n(call.picks.ids, count, call.listed), call.listed + call.neurons, -1);
    }
    if (call.copied && !call.nested()) mark(call, call.picks, choice.marks);
  }

  static void mark(const Call& call, Picks picks, int32_t* marks) {
    std::fill(marks, marks + call.neurons, 0);
    for (size_t i = 0; i < picks.count; ++i) marks[picks.ids[i]] = 1;
  }

  // Adds the neurons of a chunk that are not marked, from the copy.
  void add_rest(const Batch& batch, size_t c) const {
    const Chunk chunk = batch.chunks[c];
    for (const Block* block : batch) {
      const size_t tokens = block->room.tokens;
      float* h = block->room.low_hidden + chunk.begin * tokens;
      for (size_t i = chunk.begin; i < chunk.end; ++i)
        if (block->choice.marks[i] != 0) std::fill_n(h + (i - chunk.begin) * tokens, tokens, 0.0f);
    }
    add_copy(batch, c, [&](const Block& block) {
      float* h = block.room.low_hidden + chunk.begin * block.room.tokens;
      int32_t* kept = block.room.low_kept + chunk.begin;
      const Picks left{kept, drop_zeros({block.choice.all + chunk.begin, chunk.size()}, block.room.tokens, h, kept)};
      kernels_.accumulate(block.call.low.down, left, h, block.room.tokens, block.low_sum(c), {});
    });
  }

  // Adds a chunk of neurons whose full rows are the copy plus residuals.
  void add_nested(const Batch& batch, size_t c) const {
    for (const Block* block : batch)
      NestedChunk(kernels_, activation_, *block, c).add_residuals(block->call.kept(), block->low_sum(c));
    add_copy(batch, c,
             [&](const Block& block) { NestedChunk(kernels_, activation_, block, c).add_copy(block.low_sum(c)); });
  }

  // Adds the rows of the copy for a chunk of neurons: of all for the whole batch, or those that add_one(block) picks.
  template <class AddOne>
  void add_copy(const Batch& batch, size_t c, AddOne add_one) const {
    const Chunk chunk = batch.chunks[c];
    const Call& call = batch.front().call;
    if (call.rest && !activation_.zeroes())
      batch.accumulate(
          kernels_, call.low.down, {batch.front().choice.all + chunk.begin, chunk.size()},
          [&](const Block& block) { return block.room.low_hidden + chunk.begin * block.room.tokens; },
          [&](const Block& block) { return block.low_sum(c); });
    else
      for (const Block* block : batch) add_one(*block);
    for (const Block* block : batch) block->add_padded(c);
  }

  // Adds a chunk of the active neurons, from their full rows, to `sum` (tokens, width).
  void add_full(const Call& call, const BlockRoom& room, Chunk chunk, Inputs inputs, float* sum) const {
    const Picks mine{call.picks.ids + chunk.begin, chunk.size()};
    const size_t at = chunk.begin * room.tokens;
    const bool dense = !activation_.zeroes();
    float* h = room.hidden + at;
    products(call, call.full, mine, inputs, room.tokens, dense ? &call.full.down : nullptr, h, room.ups + at);
    Picks left = mine;
    if (!dense) left = {room.kept + chunk.begin, drop_zeros(mine, room.tokens, h, room.kept + chunk.begin)};
    kernels_.accumulate(call.full.down, left, h, room.tokens, sum, {});
  }

  // Adds up a chunk of the neurons of each block, into its part of the block's memory.
  void add_chunk(const Batch& batch, size_t c) const {
    for (const Block* block : batch) block->clear(c);
    const Call& call = batch.front().call;
    if (call.nested()) return add_nested(batch, c);
    const Chunk chunk = batch.chunks[c];
    if (call.rest && !call.kept())
      low_products(kernels_, activation_, batch, {batch.front().choice.all + chunk.begin, chunk.size()}, chunk.begin);
    if (call.rest) add_rest(batch, c);
    for (const Block* block : batch) {
      const Call& own = block->call;
      const Chunk full = block->chunks.of(own.picks.count)[c];
      if (own.gate_first)
        add_gate_first(kernels_, activation_, own, {own.picks.ids + full.begin, full.size()}, block->inputs,
                       block->room, full.begin, block->choice.marks, block->sum(c));
      else
        add_full(own, block->room, full, block->inputs, block->sum(c));
    }
  }

  // The result of a block: its parts in order, and the bias.
  void finish(const Pool& pool, const Block& block) const {
    const Call& call = block.call;
    const bool biased = call.b_down.data != nullptr;
    if (biased) kernels_.widen(call.b_down.data, call.b_down.type, block.room.start, call.width);
    add_up(pool, kernels_, block.room.parts, block.chunks.count(), block.room.tokens, call.width,
           biased ? block.room.start : nullptr, block.y);
  }

  void run(const Pool& pool, std::vector<Call>& calls, const Memory& memory) const {
    bool scoring = false;
    for (size_t i = 0; i < calls.size(); ++i) {
      const Call& call = calls[i];
      const ChoiceRoom& choice = memory.choices[i];
      if (call.copied || call.choosing) std::iota(choice.all, choice.all + call.neurons, 0);
      if (call.copied) std::fill_n(choice.scores, call.neurons, 0.0f);
      scoring |= call.scoring();
    }
    if (scoring)
      for_blocks(calls, memory, [&](std::vector<Block>& blocks) {
        for (Block& block : blocks)
          if (block.call.scoring()) block.low_inputs = prepare_low(block.call, block.room, block.x);
        pool.ahead(node_.first_bytes(kCDown));
        in_chunks(pool, in_batches(blocks), [&](const Batch& batch, size_t c) {
          if (batch.front().call.scoring()) score(batch, batch.chunks[c]);
        });
      });
    pool.run(calls.size(), [&](size_t i) { choose(calls[i], memory.choices[i]); });
    for_blocks(calls, memory, [&](std::vector<Block>& blocks) {
      for (Block& block : blocks) {
        const Call& call = block.call;
        if (!call.nested()) block.inputs = prepare(call.full, block.x, block.room.tokens, block.room.inputs);
        if (call.nested() || (call.rest && !call.kept())) block.low_inputs = prepare_low(call, block.room, block.x);
      }
      in_chunks(pool, in_batches(blocks), [&](const Batch& batch, size_t c) { add_chunk(batch, c); });
      if (blocks.size() == 1) return finish(pool, blocks.front());
      pool.run(blocks.size(), [&](size_t i) { finish(Pool::none(), blocks[i]); });
    });
    for (size_t i = 0; i < calls.size(); ++i)
      if (calls[i].listed != nullptr && calls[i].gate_first)
        list_marked(memory.choices[i].marks, calls[i].neurons, calls[i].listed);
  }

  const Api& api_;
  Node node_;
  const Kernels& kernels_;
  Activation activation_{};
};

}  // namespace

const Entry kSparseMlp = entry_of<SparseMlp>();

std::unique_ptr<Part> sparse_mlp_part(const Api& api, const OrtKernelInfo* info, size_t first) {
  return std::make_unique<PartOf<SparseMlp>>(api, info, first);
}

}  // namespace shadowllm
