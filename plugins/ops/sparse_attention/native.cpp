// SparseAttention: queries of the active heads, their attention over the visible cache, and their output projection.
//
// One task per head would need only one step (attention_steps.hpp), but would leave most threads idle if few heads are
// active. With a low-bit copy, the other heads take part in the same steps, with rows of the copy. If the full rows are
// the copy plus residuals, all heads have rows of the copy, and residuals are added for the full ones.
#include "attention_steps.hpp"
#include "largest.hpp"

namespace shadowllm {
namespace {

enum Input {
  kX,
  kKey,
  kValue,
  kLengths,
  kIndices,
  kCount,
  kWQ,
  kBQ,
  kWO,
  kBO,
  kCos,
  kSin,
  kSQ,
  kSO,
  kRest,
  kCQ,
  kCO,
  kCsQ,
  kCsO,
  kScoreWeight,
  kScoreBias,
  // The rest is not in the op's schema: a graph pass of the runtime adds it. With a norm, x is not normed, and the
  // result is added to it. With w_kv, key and value are without the tokens of this step, and become outputs.
  kNormWeight,
  kNormBias,
  kWKV,
  kBKV,
  kSKV,
  kCKV,
  kCsKV
};

class SparseAttention {
 public:
  static constexpr const char* kName = "SparseAttention";
  static constexpr Port kPorts[] = {
      {"x", kFloat, kRequired},           {"key", kUndefined, kRequired},      {"value", kUndefined, kRequired},
      {"lengths", kInt32, kRequired},     {"indices", kInt32, kOptional},      {"count", kInt32, kRequired},
      {"w_q", kUndefined, kRequired},     {"b_q", kUndefined, kOptional},      {"w_o", kUndefined, kRequired},
      {"b_o", kUndefined, kOptional},     {"cos", kFloat, kOptional},          {"sin", kFloat, kOptional},
      {"s_q", kFloat, kOptional},         {"s_o", kFloat, kOptional},          {"rest", kInt32, kOptional},
      {"c_q", kUInt8, kOptional},         {"c_o", kUInt8, kOptional},          {"cs_q", kFloat, kOptional},
      {"cs_o", kFloat, kOptional},        {"score_weight", kFloat, kOptional}, {"score_bias", kFloat, kOptional},
      {"norm_weight", kFloat, kOptional}, {"norm_bias", kFloat, kOptional},    {"w_kv", kUndefined, kOptional},
      {"b_kv", kUndefined, kOptional},    {"s_kv", kFloat, kOptional},         {"c_kv", kUInt8, kOptional},
      {"cs_kv", kFloat, kOptional},
  };
  static constexpr Port kOutputs[] = {{"y", kFloat, kRequired},
                                      {"chosen", kInt32, kOptional},
                                      {"new_key", kFloat, kOptional},
                                      {"new_value", kFloat, kOptional}};

  SparseAttention(const Api& api, const OrtKernelInfo* info)
      : api_(api), node_(api, info, kName, kPorts, std::size(kPorts), true), kernels_(choose_kernels()) {
    n_heads_ = node_.integer("n_heads");
    node_.bound("n_heads", n_heads_, 1, INT32_MAX);
  }

  static void infer(const Api& api, OrtShapeInferContext* context) { infer_like_first_input(api, context); }

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = node_.inputs(context);
    const size_t selections = check(in);
    const Tensor y = node_.output_like(context, in[kX]), chosen = node_.chosen_output(context, in[kCount], n_heads_);
    const std::array<Tensor, 2> caches = write(context, in);
    std::vector<Call> calls;
    for (size_t i = 0; i < selections; ++i) calls.push_back(read(in, i, selections, y, chosen, caches));
    Scratch scratch;
    Room sizes(nullptr);
    for (const Call& call : calls) (void)Memory(sizes, call);
    Room room(scratch.take(sizes.used()));
    std::vector<Memory> memory;
    std::vector<Heads> heads;
    for (Call& call : calls) {
      memory.emplace_back(room, call);
      if (call.residual != nullptr) norm(call, memory.back().normed);
      const int32_t* full = call.score_groups > 0 ? choose(call, memory.back()) : call.indices;
      if (call.listed != nullptr) {
        const size_t count = std::min(call.full_count, call.n_heads);
        std::fill(std::copy_n(full, count, call.listed), call.listed + call.n_heads, -1);
      }
      heads.push_back(list(call, memory.back(), full));
    }
    if (y.size() != 0) AttentionSteps(kernels_, calls, memory, heads).run(Pool(api_, context));
  }

 private:
  // Returns the number of selections.
  size_t check(const std::vector<Tensor>& in) const {
    const Tensor &x = in[kX], &key = in[kKey];
    const int64_t width = node_.width_of(x);
    if (key.rank != 4) node_.fail("key has " + std::to_string(key.rank) + " dimensions, not 4");
    const int64_t batch = key.dims[0], seqlen = seqlen_of(x, batch), kv_heads = key.dims[1], d = key.dims[3];
    if (kv_heads < 1 || n_heads_ % kv_heads != 0)
      node_.fail(std::to_string(n_heads_) + " heads do not divide among " + std::to_string(kv_heads) + " cached ones");
    for (const size_t port : {kKey, kValue}) node_.expect(in, port, {batch, kv_heads, key.dims[2], d});
    node_.expect(in, kLengths, {batch});
    node_.expect(in, kBQ, {n_heads_ * d});
    node_.expect(in, kBO, {width});
    for (const size_t port : {kCos, kSin}) node_.expect(in, port, {batch, seqlen, d / 2});
    if (in[kCos].present() != in[kSin].present()) node_.fail("cos and sin come together or not at all");
    if (in[kCos].present() && d % 2 != 0) node_.fail("head dimension " + std::to_string(d) + " is odd");
    for (int64_t b = 0; b < batch; ++b)
      node_.bound("length of row " + std::to_string(b), in[kLengths].as<int32_t>()[b], seqlen, key.dims[2]);
    const size_t selections = node_.selections(in[kCount], x);
    if (selections != 1 && static_cast<int64_t>(selections) != batch)
      node_.fail("count has " + std::to_string(selections) + " elements, not 1 or " + std::to_string(batch));
    node_.expect_one_each(in, kRest, selections);
    for (size_t i = 0; i < selections; ++i) check_rest(in, i);
    for (size_t i = 0; i < selections && !in[kIndices].present(); ++i) check_choice(in, width, i);
    return selections;
  }

  void check_rest(const std::vector<Tensor>& in, size_t selection) const {
    for (const auto& [one, other] : {std::pair{kCQ, kCsQ}, {kCO, kCsO}, {kCQ, kCO}})
      if (in[one].present() != in[other].present())
        node_.fail(std::string(kPorts[one].name) + " and " + kPorts[other].name + " must stand together");
    if (Node::number(in[kRest], selection) != 0 && !in[kCQ].present())
      node_.fail("rest is 1, but there is no low-bit copy");
  }

  void check_choice(const std::vector<Tensor>& in, int64_t width, size_t selection) const {
    const Tensor& weight = in[kScoreWeight];
    if (!weight.present() || !in[kScoreBias].present())
      node_.fail("without indices, the heads are chosen with score_weight and score_bias, but these are missing");
    const int64_t groups = weight.rank == 2 ? weight.dims[0] : 0, count = Node::number(in[kCount], selection);
    node_.expect(in, kScoreWeight, {groups, width});
    if (groups < 1 || n_heads_ % groups != 0)
      node_.fail(std::to_string(n_heads_) + " heads do not divide among the " + std::to_string(groups) +
                 " rows of score_weight");
    node_.expect(in, kScoreBias, {groups});
    node_.bound("count", count, 0, n_heads_);
    if (count % (n_heads_ / groups) != 0)
      node_.fail("count " + std::to_string(count) + " is no multiple of the " + std::to_string(n_heads_ / groups) +
                 " heads that are chosen together");
  }

  // Number of positions in this step, from hidden states (batch, seqlen, width) or (batch * seqlen, width).
  int64_t seqlen_of(const Tensor& x, int64_t batch) const {
    const int64_t rows = x.rank == 3 ? x.dims[0] * x.dims[1] : x.dims[0];
    if (x.rank == 3 ? x.dims[0] != batch : batch < 1 || rows % batch != 0)
      node_.fail("x holds " + std::to_string(rows) + " positions, the cache " + std::to_string(batch) + " sequences");
    return x.rank == 3 ? x.dims[1] : rows / batch;
  }

  // The caches that the op writes, with the contents of the old ones, unless they are the same memory. Absent if the op
  // does not write them.
  std::array<Tensor, 2> write(OrtKernelContext* context, const std::vector<Tensor>& in) const {
    if (!in[kWKV].present()) return {};
    std::array<Tensor, 2> caches;
    for (const size_t i : {0, 1}) {
      const Tensor& old = in[i == 0 ? kKey : kValue];
      if (old.type != kFloat) node_.fail("w_kv needs a cache of float32");
      const auto& d = old.dims;
      caches[i] = node_.optional_output(context, 2 + i, {d[0], d[1], d[2], d[3]});
      if (!caches[i].present()) node_.fail("w_kv stands without the outputs new_key and new_value");
      if (caches[i].data != old.data) std::memcpy(caches[i].data, old.data, old.size() * sizeof(float));
    }
    return caches;
  }

  // Replaces x by its norm.
  void norm(Call& call, float* normed) const {
    for (size_t t = 0; t < call.tokens(); ++t)
      kernels_.normalise(call.norm, call.residual + t * call.width, normed + t * call.width, call.width);
    call.x = normed;
  }

  Bias bias(const std::vector<Tensor>& in, Input port) const {
    if (!in[port].present()) return {};
    return {in[port].data, node_.row_type(in[port], kPorts[port].name)};
  }

  // A matrix of integers may have a dimension for its blocks.
  static std::vector<Tensor> flattened(std::vector<Tensor> in, Input port) {
    Tensor& tensor = in[port];
    if (tensor.rank == 3) tensor.dims[1] *= tensor.dims[2], tensor.rank = 2;
    return in;
  }

  void read_kv(const std::vector<Tensor>& all, Call& call) const {
    if (!all[kWKV].present()) return;
    const std::vector<Tensor> in = flattened(all, kWKV);
    const int64_t rows = 2 * in[kKey].dims[1] * in[kKey].dims[3], width = node_.width_of(in[kX]);
    node_.expect(in, kBKV, {rows});
    if (in[kCKV].present() != in[kCsKV].present() || in[kCKV].present() != call.nested())
      node_.fail("c_kv and cs_kv must be there if w_q and w_kv are residuals, and only then");
    if (call.nested()) {
      call.c_kv = node_.copy(in, kCKV, kCsKV, rows, width);
      call.w_kv = node_.residual(in, kWKV, call.c_kv, rows);
      if (call.c_kv.block != call.c_q.block) node_.fail("c_q and c_kv have blocks of different sizes");
    } else {
      call.w_kv = node_.matrix(in, kWKV, kSKV, rows, width);
    }
    call.b_kv = bias(in, kBKV);
  }

  Call read(const std::vector<Tensor>& in, size_t selection, size_t selections, const Tensor& y, const Tensor& chosen,
            const std::array<Tensor, 2>& caches) const {
    const auto dim = [&](Input port, int i) { return static_cast<size_t>(in[port].dims[i]); };
    const int64_t rows = n_heads_ * in[kKey].dims[3], width = node_.width_of(in[kX]), batch = in[kKey].dims[0];
    Call call{};
    call.batch = dim(kKey, 0) / selections, call.kv_heads = dim(kKey, 1), call.capacity = dim(kKey, 2);
    call.head_dim = dim(kKey, 3);
    call.seqlen = static_cast<size_t>(seqlen_of(in[kX], batch)), call.width = static_cast<size_t>(width);
    call.n_heads = static_cast<size_t>(n_heads_), call.group = call.n_heads / call.kv_heads;
    const size_t first = selection * call.batch;  // its first sequence
    call.lengths = in[kLengths].as<int32_t>() + first;
    if (batch != 0) call.longest = static_cast<size_t>(*std::max_element(call.lengths, call.lengths + call.batch));
    bool ascending = true;
    if (in[kIndices].present()) {
      const Picks heads = node_.active(in[kIndices], in[kCount], selection, n_heads_);
      call.indices = heads.ids, call.full_count = heads.count;
      for (size_t i = 1; i < heads.count; ++i) ascending &= heads.ids[i - 1] < heads.ids[i];
    } else {
      call.full_count = static_cast<size_t>(Node::number(in[kCount], selection));
      call.score_groups = dim(kScoreWeight, 0);
    }
    if (Node::number(in[kRest], selection) != 0) call.rest_count = call.n_heads - (ascending ? call.full_count : 0);
    Rows q{}, o{};
    if (in[kCQ].present()) q = node_.copy(in, kCQ, kCsQ, rows, width), o = node_.copy(in, kCO, kCsO, rows, width);
    const auto full = [&](Input port, Input scales, const Rows& low) {
      const bool nested = in[kCQ].present() && Node::is_residual(in[port], in[scales]);
      return nested ? node_.residual(in, port, low, rows) : node_.matrix(in, port, scales, rows, width);
    };
    call.w_q = full(kWQ, kSQ, q), call.w_o = full(kWO, kSO, o);
    if ((call.w_q.step == 0) != (call.w_o.step == 0))
      node_.fail("one matrix is a residual of the low-bit copy, and the other is not");
    if (call.rest_count > 0 || call.nested()) call.c_q = q, call.c_o = o;
    read_kv(in, call);
    const size_t tokens = first * call.seqlen, place = first * call.kv_heads * call.capacity;
    const bool writes = caches[0].present();
    call.key = cache(writes ? caches[0] : in[kKey], kKey).from(place);
    call.value = cache(writes ? caches[1] : in[kValue], kValue).from(place);
    if (writes) {
      call.new_keys = static_cast<float*>(caches[0].data) + place * call.head_dim;
      call.new_values = static_cast<float*>(caches[1].data) + place * call.head_dim;
    }
    call.x = in[kX].as<float>() + tokens * call.width, call.y = static_cast<float*>(y.data) + tokens * call.width;
    if (in[kCos].present()) {
      call.cos = in[kCos].as<float>() + tokens * (call.head_dim / 2);
      call.sin = in[kSin].as<float>() + tokens * (call.head_dim / 2);
    }
    if (chosen.present()) call.listed = static_cast<int32_t*>(chosen.data) + selection * call.n_heads;
    call.score_weight = in[kScoreWeight].as<float>(), call.score_bias = in[kScoreBias].as<float>();
    call.b_q = bias(in, kBQ), call.b_o = bias(in, kBO);
    call.norm = node_.norm(in, kNormWeight, kNormBias, width);
    if (call.norm.weight != nullptr) call.residual = call.x;
    return call;
  }

  // Keys or values: a row is a position of one head and sequence.
  Rows cache(const Tensor& tensor, Input port) const {
    const RowType type = node_.row_type(tensor, kPorts[port].name);
    const size_t d = static_cast<size_t>(tensor.dims[3]);
    return {tensor.data, d * element_size(type), d, type};
  }

  // The best groups of heads, as heads in ascending order.
  const int32_t* choose(const Call& call, const Memory& memory) const {
    const size_t groups = call.score_groups, together = call.n_heads / groups;
    std::fill(memory.scores, memory.scores + groups, 0.0f);
    const Rows rows{call.score_weight, call.width * sizeof(float), call.width, RowType::f32};
    for (size_t t = 0; t < (call.full_count % call.n_heads == 0 ? 0 : call.tokens()); ++t) {
      kernels_.project(rows, {nullptr, groups}, call.x + t * call.width, 1, memory.products, {});
      for (size_t g = 0; g < groups; ++g) memory.scores[g] += memory.products[g] + call.score_bias[g];
    }
    const size_t count = call.full_count / together;
    select_largest(kernels_, memory.scores, groups, count, memory.keys, memory.groups);
    for (size_t g = 0; g < count; ++g)
      for (size_t i = 0; i < together; ++i)
        memory.heads[g * together + i] = static_cast<int32_t>(memory.groups[g] * together + i);
    return memory.heads;
  }

  // The full heads, then the rest. There are few heads, so that a search for each is fast enough.
  Heads list(const Call& call, const Memory& memory, const int32_t* full) const {
    Heads heads{memory.heads, memory.rows, call.full_count, call.full_count};
    if (full != heads.ids) std::copy_n(full, call.full_count, heads.ids);
    for (size_t head = 0; call.rest_count > 0 && head < call.n_heads; ++head) {
      const int32_t id = static_cast<int32_t>(head), *end = heads.ids + call.full_count;
      if (std::find(static_cast<const int32_t*>(heads.ids), end, id) == end) heads.ids[heads.count++] = id;
    }
    const size_t d = call.head_dim;
    for (size_t i = 0; i < heads.count; ++i)
      for (size_t j = 0; j < d; ++j) heads.rows[i * d + j] = static_cast<int32_t>(heads.ids[i] * d + j);
    return heads;
  }

  const Api& api_;
  Node node_;
  const Kernels& kernels_;
  int64_t n_heads_ = 0;
};

}  // namespace

const Entry kSparseAttention = entry_of<SparseAttention>();

}  // namespace shadowllm
