// SparseAttention: queries of the active heads, their attention over the visible cache, and their output projection.
//
// Three steps on the thread pool: rows of w_q, then one task per head and sequence, then rows of w_o. One task per head
// would need only one step, but would leave most threads idle if few heads are active. With a low-bit copy, the other
// heads take part in the same steps, with rows of the copy. If the full rows are the copy plus residuals, all heads
// have rows of the copy, and residuals are added for the full ones.
#include "attend.hpp"
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
  kScoreBias
};

class SparseAttention {
 public:
  static constexpr const char* kName = "SparseAttention";
  static constexpr Port kPorts[] = {
      {"x", kFloat, kRequired},       {"key", kUndefined, kRequired},      {"value", kUndefined, kRequired},
      {"lengths", kInt32, kRequired}, {"indices", kInt32, kOptional},      {"count", kInt32, kRequired},
      {"w_q", kUndefined, kRequired}, {"b_q", kUndefined, kOptional},      {"w_o", kUndefined, kRequired},
      {"b_o", kUndefined, kOptional}, {"cos", kFloat, kOptional},          {"sin", kFloat, kOptional},
      {"s_q", kFloat, kOptional},     {"s_o", kFloat, kOptional},          {"rest", kInt32, kOptional},
      {"c_q", kUInt8, kOptional},     {"c_o", kUInt8, kOptional},          {"cs_q", kFloat, kOptional},
      {"cs_o", kFloat, kOptional},    {"score_weight", kFloat, kOptional}, {"score_bias", kFloat, kOptional},
  };
  static constexpr Port kOutputs[] = {{"y", kFloat, kRequired}, {"chosen", kInt32, kOptional}};

  SparseAttention(const Api& api, const OrtKernelInfo* info)
      : api_(api), node_(api, info, kName, kPorts, std::size(kPorts), true), kernels_(choose_kernels()) {
    n_heads_ = node_.integer("n_heads");
    node_.bound("n_heads", n_heads_, 1, INT32_MAX);
    window_ = node_.integer_or("window", 0);
    node_.bound("window", window_, 0, INT32_MAX);
    node_.shorten({kCsQ, kCsO});
  }

  static void infer(const Api& api, OrtShapeInferContext* context) { infer_like_input(api, context, kX, 0); }

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = node_.inputs(context);
    const size_t selections = check(in);
    const Tensor y = node_.output_like(context, in[kX]);
    const Tensor chosen = node_.chosen_output(Outputs(node_, context), in[kCount], n_heads_);
    std::vector<Call> calls;
    for (size_t i = 0; i < selections; ++i) calls.push_back(read(in, i, selections, y, chosen));
    Scratch scratch;
    Room sizes(nullptr);
    for (const Call& call : calls) (void)Memory(sizes, call);
    Room room(scratch.take(sizes.used()));
    std::vector<Memory> memory;
    std::vector<Heads> heads;
    for (const Call& call : calls) {
      memory.emplace_back(room, call);
      const int32_t* full = call.score_groups > 0 ? choose(call, memory.back()) : call.indices;
      if (call.listed != nullptr) {
        const size_t count = std::min(call.full_count, call.n_heads);
        std::fill(std::copy_n(full, count, call.listed), call.listed + call.n_heads, -1);
      }
      heads.push_back(list(call, memory.back(), full));
    }
    if (y.size() != 0) run(Pool(api_, context), calls, memory, heads);
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

  Call read(const std::vector<Tensor>& in, size_t selection, size_t selections, const Tensor& y,
            const Tensor& chosen) const {
    const auto dim = [&](Input port, int i) { return static_cast<size_t>(in[port].dims[i]); };
    const auto bias_type = [&](Input port) {
      return in[port].present() ? node_.row_type(in[port], kPorts[port].name) : RowType::f32;
    };
    const int64_t rows = n_heads_ * in[kKey].dims[3], width = node_.width_of(in[kX]), batch = in[kKey].dims[0];
    Call call{};
    call.batch = dim(kKey, 0) / selections, call.kv_heads = dim(kKey, 1), call.capacity = dim(kKey, 2);
    call.head_dim = dim(kKey, 3);
    call.seqlen = static_cast<size_t>(seqlen_of(in[kX], batch)), call.width = static_cast<size_t>(width);
    call.n_heads = static_cast<size_t>(n_heads_), call.group = call.n_heads / call.kv_heads;
    call.window = static_cast<size_t>(window_);
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
    const auto full = [&](Input port, Input scales, Rows& low) {
      if (!in[kCQ].present() || !Node::is_residual(in[port], in[scales]))
        return node_.matrix(in, port, scales, rows, width);
      const Rows found = node_.residual(in, port, low, rows);
      low.exact |= found.type == RowType::i2;  // they share an input, and no kernel of 2 bits reads it in integers
      return found;
    };
    call.w_q = full(kWQ, kSQ, q), call.w_o = full(kWO, kSO, o);
    if ((call.w_q.step == 0) != (call.w_o.step == 0))
      node_.fail("one matrix is a residual of the low-bit copy, and the other is not");
    if (call.rest_count > 0 || call.nested()) call.c_q = q, call.c_o = o;
    const size_t caches = first * call.kv_heads * call.capacity, tokens = first * call.seqlen;
    call.key = cache(in, kKey, caches), call.value = cache(in, kValue, caches);
    call.x = in[kX].as<float>() + tokens * call.width, call.y = static_cast<float*>(y.data) + tokens * call.width;
    if (in[kCos].present()) {
      call.cos = in[kCos].as<float>() + tokens * (call.head_dim / 2);
      call.sin = in[kSin].as<float>() + tokens * (call.head_dim / 2);
    }
    if (chosen.present()) call.listed = static_cast<int32_t*>(chosen.data) + selection * call.n_heads;
    call.score_weight = in[kScoreWeight].as<float>(), call.score_bias = in[kScoreBias].as<float>();
    call.b_q = in[kBQ], call.b_o = in[kBO];
    call.b_q_type = bias_type(kBQ), call.b_o_type = bias_type(kBO);
    return call;
  }

  // Keys or values from a row on: a row is a position of one head and sequence.
  Rows cache(const std::vector<Tensor>& in, Input port, size_t first) const {
    const RowType type = node_.row_type(in[port], kPorts[port].name);
    const size_t d = static_cast<size_t>(in[port].dims[3]);
    const size_t stride = d * element_size(type);
    return {in[port].as<char>() + first * stride, stride, d, type};
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

  void run(const Pool& pool, const std::vector<Call>& calls, const std::vector<Memory>& memory,
           const std::vector<Heads>& heads) const {
    project(pool, calls, memory, heads);
    attend(pool, calls, memory, heads);
    std::vector<Part> parts;
    for (size_t i = 0; i < calls.size(); ++i)
      parts.push_back({calls[i], memory[i], heads[i], calls[i].chunks(calls[i].w_o, calls[i].c_o)});
    in_chunks(pool, parts, [&](const Part& part, size_t c) { add_chunk(part, c); });
    if (parts.size() == 1) return finish(pool, parts.front());
    pool.run(parts.size(), [&](size_t i) { finish(Pool::none(), parts[i]); });
  }

  // The queries of all heads, without bias.
  void project(const Pool& pool, const std::vector<Call>& calls, const std::vector<Memory>& memory,
               const std::vector<Heads>& heads) const {
    std::vector<Part> parts;
    for (size_t i = 0; i < calls.size(); ++i) {
      const Call& call = calls[i];
      if (heads[i].count == 0) continue;
      parts.push_back({call, memory[i], heads[i], call.chunks(call.w_q, call.c_q)});
      if (!call.nested()) parts.back().input = kernels_.prepare(call.w_q, call.x, call.tokens(), memory[i].inputs);
      if (call.nested() || heads[i].count > heads[i].full_count) parts.back().low_input = prepare_low(call, memory[i]);
    }
    in_chunks(pool, parts, [&](const Part& part, size_t c) {
      const Call& call = part.call;
      const Memory& own = part.memory;
      const size_t tokens = call.tokens(), full_rows = part.heads.full_count * call.head_dim;
      const Chunk full = part.full(c), low = part.low(c);
      if (call.nested()) return project_nested(call, own, part.heads, part.all(c), part.low_input);
      kernels_.project(call.w_q, {part.heads.rows + full.begin, full.size()}, part.input, tokens,
                       own.queries + full.begin * tokens, {});
      if (low.size() > 0)
        kernels_.project(call.c_q, {part.heads.rows + full_rows + low.begin, low.size()}, part.low_input, tokens,
                         own.queries + (full_rows + low.begin) * tokens, {});
    });
  }

  // Replaces all queries by contexts. The heads of a sequence that share a KV head are a task.
  void attend(const Pool& pool, const std::vector<Call>& calls, const std::vector<Memory>& memory,
              const std::vector<Heads>& heads) const {
    const size_t batch = calls.front().batch;
    std::vector<SharedHeads> shared;
    for (size_t i = 0; i < calls.size(); ++i) {
      const Call& call = calls[i];
      std::vector<std::vector<size_t>> by_cached(call.kv_heads);
      for (size_t place = 0; place < heads[i].count; ++place)
        by_cached[static_cast<size_t>(heads[i].ids[place]) / call.group].push_back(place);
      float* work = memory[i].work;
      for (std::vector<size_t>& places : by_cached) {
        if (places.empty()) continue;
        float* const own = std::exchange(work, work + places.size() * batch * call.head_room());
        shared.push_back({call, heads[i].ids, std::move(places), memory[i].queries, own});
      }
    }
    pool.run(shared.size() * batch,
             [&](size_t task) { shadowllm::attend(kernels_, shared[task / batch], task % batch); });
  }

  // Adds up the output projection of a chunk of rows, into its part of the memory.
  void add_chunk(const Part& part, size_t c) const {
    const Call& call = part.call;
    const Memory& memory = part.memory;
    const Heads& heads = part.heads;
    const size_t tokens = call.tokens(), size = tokens * call.width, first_low = heads.full_count * call.head_dim;
    const Chunk full = part.full(c), low = part.low(c);
    float *sum = memory.parts + c * size, *padded = memory.low_parts + c * tokens * call.padded(call.c_o);
    std::fill(sum, sum + size, 0.0f);
    if (call.nested()) return add_nested(call, memory, heads, part.all(c), padded, sum);
    kernels_.accumulate(call.w_o, {heads.rows + full.begin, full.size()}, memory.queries + full.begin * tokens, tokens,
                        sum, {});
    if (low.size() > 0)
      with_padding(call, padded, sum, [&](float* to) {
        kernels_.accumulate(call.c_o, {heads.rows + first_low + low.begin, low.size()},
                            memory.queries + (first_low + low.begin) * tokens, tokens, to, {});
      });
  }

  // The result of a selection: its parts in order, and the bias.
  void finish(const Pool& pool, const Part& part) const {
    const Call& call = part.call;
    const bool biased = call.b_o.present();
    if (biased) kernels_.widen(call.b_o.data, call.b_o_type, part.memory.start, call.width);
    add_up(pool, kernels_, part.memory.parts, part.chunks.count(), call.tokens(), call.width,
           biased ? part.memory.start : nullptr, call.y);
  }

  // The input for the copy: x, with zeros up to a whole number of blocks.
  const float* prepare_low(const Call& call, const Memory& memory) const {
    const size_t wide = call.padded(call.c_q), tokens = call.tokens();
    const float* x = call.x;
    if (wide != 0) {
      std::fill(memory.low_x, memory.low_x + tokens * wide, 0.0f);
      for (size_t t = 0; t < tokens; ++t) std::copy_n(x + t * call.width, call.width, memory.low_x + t * wide);
      x = memory.low_x;
    }
    return kernels_.prepare(call.c_q, x, tokens, memory.low_inputs);
  }

  // The queries of a chunk of rows: from the copy, plus the residuals of the full heads, which come first.
  void project_nested(const Call& call, const Memory& memory, const Heads& heads, Chunk chunk,
                      const float* input) const {
    const size_t tokens = call.tokens(), first = chunk.begin * tokens;
    const Picks full = full_rows(call, heads, chunk);
    float *queries = memory.queries + first, *more = memory.residuals + first;
    kernels_.project(call.c_q, {heads.rows + chunk.begin, chunk.size()}, input, tokens, queries, {});
    kernels_.project(call.w_q, full, input, tokens, more, {});
    for (size_t i = 0; i < full.count * tokens; ++i) queries[i] += call.w_q.step * more[i];
  }

  // Adds the output projection of the contexts of a chunk of rows to `sum` (tokens, width), in the same way.
  void add_nested(const Call& call, const Memory& memory, const Heads& heads, Chunk chunk, float* padded,
                  float* sum) const {
    const size_t tokens = call.tokens(), first = chunk.begin * tokens;
    const Picks full = full_rows(call, heads, chunk);
    const float* contexts = memory.queries + first;
    float* scaled = memory.residuals + first;
    for (size_t i = 0; i < full.count * tokens; ++i) scaled[i] = call.w_o.step * contexts[i];
    with_padding(call, padded, sum, [&](float* to) {
      kernels_.accumulate(call.c_o, {heads.rows + chunk.begin, chunk.size()}, contexts, tokens, to, {});
      kernels_.accumulate(call.w_o, full, scaled, tokens, to, {});
    });
  }

  // The rows of a chunk that belong to full heads.
  static Picks full_rows(const Call& call, const Heads& heads, Chunk chunk) {
    const size_t end = std::min(chunk.end, heads.full_count * call.head_dim);
    return {heads.rows + chunk.begin, end > chunk.begin ? end - chunk.begin : 0};
  }

  const Api& api_;
  Node node_;
  const Kernels& kernels_;
  int64_t n_heads_ = 0, window_ = 0;
};

}  // namespace

const Entry kSparseAttention = entry_of<SparseAttention>();

}  // namespace shadowllm
