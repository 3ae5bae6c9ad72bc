// SparseAttention: queries of the active heads, their attention over the visible cache, and their output projection.
//
// Three steps on the thread pool: rows of w_q, then one task per head and sequence, then rows of w_o. One task per head
// would need only one step, but would leave most threads idle if few heads are active.
#include <algorithm>
#include <cmath>

#include "op.hpp"

namespace shadowllm {
namespace {

enum Input { kX, kKey, kValue, kLengths, kIndices, kCount, kWQ, kBQ, kWO, kBO, kCos, kSin, kSQ, kSO };

// One checked call: sizes as in schema.py (hidden size D, H query heads of dimension d over n_kv cached ones),
// and the inputs in the form that the tasks read.
struct Call {
  size_t batch, seqlen, width, group, kv_heads, capacity, head_dim, longest;
  Picks heads;
  Rows w_q, w_o, key, value;
  const float *x, *cos, *sin;
  const int32_t* lengths;
  const Tensor &b_q, &b_o;
  RowType b_q_type, b_o_type;

  size_t tokens() const { return batch * seqlen; }
};

class SparseAttention {
 public:
  static constexpr const char* kName = "SparseAttention";
  static constexpr int kOutputType = kFloat;
  static constexpr Port kPorts[] = {
      {"x", kFloat, kRequired},       {"key", kUndefined, kRequired}, {"value", kUndefined, kRequired},
      {"lengths", kInt32, kRequired}, {"indices", kInt32, kRequired}, {"count", kInt32, kRequired},
      {"w_q", kUndefined, kRequired}, {"b_q", kUndefined, kOptional}, {"w_o", kUndefined, kRequired},
      {"b_o", kUndefined, kOptional}, {"cos", kFloat, kOptional},     {"sin", kFloat, kOptional},
      {"s_q", kFloat, kOptional},     {"s_o", kFloat, kOptional},
  };

  SparseAttention(const Api& api, const OrtKernelInfo* info)
      : api_(api), node_(api, info, kName, kPorts, std::size(kPorts), true), kernels_(choose_kernels()) {
    n_heads_ = node_.integer("n_heads");
    node_.bound("n_heads", n_heads_, 1, INT32_MAX);
  }

  static void infer(const Api& api, OrtShapeInferContext* context) { infer_like_first_input(api, context); }

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = node_.inputs(context);
    check(in);
    const Tensor y = node_.output_like(context, in[kX]);
    if (y.size() != 0) run(Pool(api_, context), prepare(in), static_cast<float*>(y.data));
  }

 private:
  void check(const std::vector<Tensor>& in) const {
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
  }

  // Number of positions in this step, from hidden states (batch, seqlen, width) or (batch * seqlen, width).
  int64_t seqlen_of(const Tensor& x, int64_t batch) const {
    const int64_t rows = x.rank == 3 ? x.dims[0] * x.dims[1] : x.dims[0];
    if (x.rank == 3 ? x.dims[0] != batch : batch < 1 || rows % batch != 0)
      node_.fail("x holds " + std::to_string(rows) + " positions, the cache " + std::to_string(batch) + " sequences");
    return batch == 0 ? 0 : rows / batch;
  }

  Call prepare(const std::vector<Tensor>& in) const {
    const auto dim = [&](Input port, int i) { return static_cast<size_t>(in[port].dims[i]); };
    const auto bias_type = [&](Input port, const char* name) {
      return in[port].present() ? node_.row_type(in[port], name) : RowType::f32;
    };
    const int32_t* lengths = in[kLengths].as<int32_t>();
    const int64_t rows = n_heads_ * in[kKey].dims[3], width = node_.width_of(in[kX]), batch = in[kKey].dims[0];
    return {dim(kKey, 0),
            static_cast<size_t>(seqlen_of(in[kX], batch)),
            static_cast<size_t>(width),
            static_cast<size_t>(n_heads_) / dim(kKey, 1),
            dim(kKey, 1),
            dim(kKey, 2),
            dim(kKey, 3),
            static_cast<size_t>(*std::max_element(lengths, lengths + batch)),
            node_.active(in[kIndices], in[kCount], n_heads_),
            node_.matrix(in, kWQ, kSQ, rows, width),
            node_.matrix(in, kWO, kSO, rows, width),
            cache(in, kKey),
            cache(in, kValue),
            in[kX].as<float>(),
            in[kCos].as<float>(),
            in[kSin].as<float>(),
            lengths,
            in[kBQ],
            in[kBO],
            bias_type(kBQ, "b_q"),
            bias_type(kBO, "b_o")};
  }

  Rows cache(const std::vector<Tensor>& in, Input port) const {
    const RowType type = node_.row_type(in[port], kPorts[port].name);
    const size_t d = static_cast<size_t>(in[port].dims[3]);
    return {in[port].data, d * element_size(type), d, type};
  }

  void run(const Pool& pool, const Call& call, float* y) const {
    const size_t d = call.head_dim, tokens = call.tokens(), n = call.heads.count * d, part = tokens * call.width;
    const size_t tasks = call.heads.count * call.batch, task_size = 2 * d + call.longest;
    const Chunks in_chunks(n, call.w_q.cost(), tokens), out_chunks(n, call.w_o.cost(), tokens);
    const size_t room = input_floats(call.width);
    // By (row, token): the queries, later the contexts. Per task: a query, a context, and the scores of the cache.
    Scratch scratch;
    float* prepared = scratch.take(room + n * tokens + tasks * task_size + out_chunks.count() * part + call.width + n);
    float* queries = prepared + room;
    float *work = queries + n * tokens, *parts = work + tasks * task_size;
    float* start = parts + out_chunks.count() * part;
    int32_t* rows = reinterpret_cast<int32_t*>(start + call.width);
    for (size_t i = 0; i < n; ++i) rows[i] = static_cast<int32_t>(call.heads.ids[i / d] * d + i % d);

    const float* input = kernels_.prepare(call.w_q, call.x, tokens, prepared);
    pool.run(n == 0 ? 0 : in_chunks.count(), [&](size_t c) {
      const Chunk chunk = in_chunks[c];
      kernels_.project(call.w_q, {rows + chunk.begin, chunk.size()}, input, tokens, queries + chunk.begin * tokens, {});
    });
    pool.run(tasks, [&](size_t task) {
      const size_t i = task / call.batch, b = task % call.batch;
      attend(call, static_cast<size_t>(call.heads.ids[i]), b, queries + i * d * tokens, work + task * task_size);
    });
    pool.run(out_chunks.count(), [&](size_t c) {
      const Chunk chunk = out_chunks[c];
      float* sum = parts + c * part;
      std::fill(sum, sum + part, 0.0f);
      kernels_.accumulate(call.w_o, {rows + chunk.begin, chunk.size()}, queries + chunk.begin * tokens, tokens, sum,
                          {});
    });
    if (call.b_o.present()) kernels_.widen(call.b_o.data, call.b_o_type, start, call.width);
    add_up(pool, kernels_, parts, out_chunks.count(), tokens, call.width, call.b_o.present() ? start : nullptr, y);
  }

  // Replaces the queries of one head and sequence by its contexts. Only visible positions of the cache are read.
  void attend(const Call& call, size_t head, size_t b, float* queries, float* work) const noexcept {
    const size_t d = call.head_dim, tokens = call.tokens();
    const size_t past = static_cast<size_t>(call.lengths[b]) - call.seqlen;
    const size_t first = (b * call.kv_heads + head / call.group) * call.capacity;
    Rows keys = call.key, values = call.value;
    keys.data = static_cast<const char*>(keys.data) + first * keys.stride;
    values.data = static_cast<const char*>(values.data) + first * values.stride;
    float *query = work, *context = work + d, *scores = work + 2 * d;
    for (size_t s = 0; s < call.seqlen; ++s) {
      const size_t token = b * call.seqlen + s, visible = past + s + 1;
      load_query(call, head, token, queries, query);
      kernels_.project(keys, {nullptr, visible}, query, 1, scores, {});
      const float total = kernels_.exponentials(scores, visible);
      std::fill(context, context + d, 0.0f);
      kernels_.accumulate(values, {nullptr, visible}, scores, 1, context, {});
      for (size_t j = 0; j < d; ++j) queries[j * tokens + token] = context[j] / total;
    }
  }

  // One token's query: bias, rotary embedding (half-split), and the scale 1 / sqrt(d) of the scores.
  void load_query(const Call& call, size_t head, size_t token, const float* queries, float* query) const noexcept {
    const size_t d = call.head_dim, half = d / 2;
    std::fill(query, query + d, 0.0f);
    if (call.b_q.present())
      kernels_.widen(call.b_q.as<char>() + head * d * element_size(call.b_q_type), call.b_q_type, query, d);
    for (size_t j = 0; j < d; ++j) query[j] += queries[j * call.tokens() + token];
    if (call.cos != nullptr) {
      const float *cos = call.cos + token * half, *sin = call.sin + token * half;
      for (size_t j = 0; j < half; ++j) {
        const float one = query[j], two = query[half + j];
        query[j] = one * cos[j] - two * sin[j];
        query[half + j] = two * cos[j] + one * sin[j];
      }
    }
    const float scale = 1 / std::sqrt(static_cast<float>(d));
    for (size_t j = 0; j < d; ++j) query[j] *= scale;
  }

  const Api& api_;
  Node node_;
  const Kernels& kernels_;
  int64_t n_heads_ = 0;
};

}  // namespace

const Entry kSparseAttention = entry_of<SparseAttention>();

}  // namespace shadowllm
