// CachedAttention: writes this step's keys and values into the cache, then attends. Query heads that share a head of
// the cache attend together, so that they read it once. A result does not depend on the other sequences.
#include <cmath>
#include <cstring>

#include "op.hpp"

namespace shadowllm {
namespace {

enum Input { kProjected, kPastKey, kPastValue, kLast, kCos, kSin };

constexpr size_t kQueries = 16;  // queries of a head of the cache that attend together
constexpr size_t kWorkers = 24;  // threads, each with memory for the scores of its queries

// What one call works on. Sizes are as in schema.py.
struct Step {
  size_t batch, seqlen, n_heads, kv_heads, capacity, head_dim;
  size_t longest;  // positions of the longest sequence, new ones included
  const float *projected, *cos, *sin;
  const int32_t* last;
  float *key, *value, *y;

  size_t group() const { return n_heads / kv_heads; }
  size_t past(size_t b) const { return static_cast<size_t>(last[b]) + 1 - seqlen; }
  // The query, key or value of a token: `head` counts all query heads, then those of keys and of values.
  const float* head_of(size_t b, size_t s, size_t head) const {
    return projected + ((b * seqlen + s) * (n_heads + 2 * kv_heads) + head) * head_dim;
  }
  // to = the query or key of a token, rotated and times `scale`
  void rotated(size_t b, size_t s, size_t head, float scale, float* to) const {
    const size_t half = head_dim / 2, row = (past(b) + s) * half;
    const float* from = head_of(b, s, head);
    if (cos == nullptr) return void(std::transform(from, from + head_dim, to, [=](float x) { return scale * x; }));
    for (size_t j = 0; j < half; ++j) {
      const float one = from[j], two = from[half + j];
      to[j] = scale * (one * cos[row + j] - two * sin[row + j]);
      to[half + j] = scale * (two * cos[row + j] + one * sin[row + j]);
    }
  }
  // Rows of a cache, by position from `first` on.
  Rows cache(const float* of, size_t b, size_t kv_head, size_t first) const {
    const size_t row = (b * kv_heads + kv_head) * capacity + first;
    return {of + row * head_dim, head_dim * sizeof(float), head_dim, RowType::f32};
  }
};

class CachedAttention {
 public:
  static constexpr const char* kName = "CachedAttention";
  static constexpr Port kPorts[] = {{"projected", kFloat, kRequired},  {"past_key", kFloat, kRequired},
                                    {"past_value", kFloat, kRequired}, {"last", kInt32, kRequired},
                                    {"cos", kFloat, kOptional},        {"sin", kFloat, kOptional}};
  static constexpr Port kOutputs[] = {
      {"y", kFloat, kRequired}, {"key", kFloat, kRequired}, {"value", kFloat, kRequired}};

  CachedAttention(const Api& api, const OrtKernelInfo* info, size_t first = 0)
      : api_(api), node_(api, info, kName, kPorts, std::size(kPorts), false, first), kernels_(choose_kernels()) {
    n_heads_ = node_.integer("n_heads");
    node_.bound("n_heads", n_heads_, 1, INT32_MAX);
    window_ = node_.integer_or("window", 0);
    node_.bound("window", window_, 0, INT32_MAX);
  }

  static void infer(const Api& api, OrtShapeInferContext* context) {
    infer_like_input(api, context, kPastKey, 1);
    infer_like_input(api, context, kPastValue, 2);
  }

  std::vector<Tensor> inputs(const OrtKernelContext* context) const { return node_.inputs(context); }

  void compute(OrtKernelContext* context) const {
    compute(inputs(context), Outputs(node_, context), Pool(api_, context));
  }

  void compute(const std::vector<Tensor>& in, const Outputs& outputs, const Pool& pool) const {
    const Step step = read(in, outputs);
    const size_t queries = step.seqlen * step.group(), tiles = (queries + kQueries - 1) / kQueries;
    const size_t heads = step.batch * step.kv_heads, tasks = heads * tiles, workers = std::min(tasks, kWorkers);
    const size_t room = std::min(queries, kQueries) * (2 * step.head_dim + step.longest) + step.longest;
    Scratch scratch;
    float* memory = scratch.take(workers * room);
    const Pool some = step.seqlen == 1 ? Pool::none() : pool;
    some.run(heads, [&](size_t i) { write(step, i / step.kv_heads, i % step.kv_heads); });
    pool.run(workers, [&](size_t worker) {
      for (size_t i = worker; i < tasks; i += workers) {
        const size_t head = i / tiles, first = i % tiles * kQueries;
        const size_t count = std::min(kQueries, queries - first);
        attend(step, head / step.kv_heads, head % step.kv_heads, first, count, memory + worker * room);
      }
    });
  }

 private:
  Step read(const std::vector<Tensor>& in, const Outputs& outputs) const {
    const Tensor &projected = in[kProjected], &key = in[kPastKey];
    if (key.rank != 4) node_.fail("past_key has " + std::to_string(key.rank) + " dimensions, not 4");
    if (projected.rank != 2) node_.fail("projected has " + std::to_string(projected.rank) + " dimensions, not 2");
    const int64_t batch = key.dims[0], kv_heads = key.dims[1], capacity = key.dims[2], d = key.dims[3];
    if (kv_heads < 1 || n_heads_ % kv_heads != 0)
      node_.fail(std::to_string(n_heads_) + " heads do not divide among " + std::to_string(kv_heads) + " cached ones");
    const int64_t rows = projected.dims[0], seqlen = batch < 1 ? 0 : rows / batch;
    if (rows != batch * seqlen)
      node_.fail(std::to_string(rows) + " tokens do not divide among " + std::to_string(batch) + " sequences");
    node_.expect(in, kProjected, {rows, (n_heads_ + 2 * kv_heads) * d});
    node_.expect(in, kPastValue, {batch, kv_heads, capacity, d});
    node_.expect(in, kLast, {batch});
    for (int64_t b = 0; b < batch; ++b)
      node_.bound("last of row " + std::to_string(b), in[kLast].as<int32_t>()[b], seqlen - 1, capacity - 1);
    check_tables(in, d);
    Step step{};
    step.batch = static_cast<size_t>(batch), step.seqlen = static_cast<size_t>(seqlen);
    step.n_heads = static_cast<size_t>(n_heads_), step.kv_heads = static_cast<size_t>(kv_heads);
    step.capacity = static_cast<size_t>(capacity), step.head_dim = static_cast<size_t>(d);
    for (size_t b = 0; b < step.batch; ++b)
      step.longest = std::max(step.longest, static_cast<size_t>(in[kLast].as<int32_t>()[b]) + 1);
    step.projected = projected.as<float>(), step.last = in[kLast].as<int32_t>();
    step.cos = in[kCos].as<float>(), step.sin = in[kSin].as<float>();
    step.y = static_cast<float*>(outputs.get(0, {rows, n_heads_ * d}).data);
    const auto cache = [&](size_t output, const Tensor& past) {
      void* data = outputs.get(output, {batch, kv_heads, capacity, d}).data;
      if (data != past.data && past.size() != 0) std::memcpy(data, past.data, past.size() * sizeof(float));
      return static_cast<float*>(data);
    };
    step.key = cache(1, key), step.value = cache(2, in[kPastValue]);
    return step;
  }

  // The tables have a row for every position that is used.
  void check_tables(const std::vector<Tensor>& in, int64_t d) const {
    const Tensor &cos = in[kCos], &last = in[kLast];
    if (cos.present() != in[kSin].present()) node_.fail("cos and sin come together or not at all");
    if (!cos.present()) return;
    if (d % 2 != 0) node_.fail("head dimension " + std::to_string(d) + " is odd");
    const int64_t rows = cos.rank > 0 ? cos.dims[0] : 0;
    for (const size_t port : {kCos, kSin}) node_.expect(in, port, {rows, d / 2});
    for (size_t b = 0; b < last.size(); ++b)
      node_.bound("last of row " + std::to_string(b), last.as<int32_t>()[b], -1, rows - 1);
  }

  // Writes the new keys and values of one head and sequence.
  static void write(const Step& step, size_t b, size_t kv_head) {
    const size_t first = (b * step.kv_heads + kv_head) * step.capacity + step.past(b);
    for (size_t s = 0; s < step.seqlen; ++s) {
      const size_t at = (first + s) * step.head_dim;
      step.rotated(b, s, step.n_heads + kv_head, 1, step.key + at);
      std::copy_n(step.head_of(b, s, step.n_heads + step.kv_heads + kv_head), step.head_dim, step.value + at);
    }
  }

  // The contexts of `count` queries of a head of the cache, from `first` on. The queries are by token, then by head.
  // `work` has the size that `compute` takes.
  void attend(const Step& step, size_t b, size_t kv_head, size_t first, size_t count, float* work) const {
    const size_t d = step.head_dim, group = step.group();
    const auto token = [&](size_t q) { return (first + q) / group; };
    const auto head = [&](size_t q) { return kv_head * group + (first + q) % group; };
    // A query sees the positions begin(q) .. end(q) - 1. Positions before that of the first query are not read.
    const size_t window = static_cast<size_t>(window_);
    const auto end = [&](size_t q) { return step.past(b) + token(q) + 1; };
    const auto begin = [&](size_t q) { return window != 0 && end(q) > window ? end(q) - window : 0; };
    const size_t start = begin(0), all = end(count - 1) - start;
    float *queries = work, *contexts = queries + count * d, *row = contexts + count * d, *scores = row + step.longest;
    const float scale = 1 / std::sqrt(static_cast<float>(d));
    for (size_t q = 0; q < count; ++q) step.rotated(b, token(q), head(q), scale, queries + q * d);
    kernels_.project(step.cache(step.key, b, kv_head, start), {nullptr, all}, queries, count, scores, {});
    for (size_t q = 0; q < count; ++q) weigh({begin(q) - start, end(q) - start}, all, count, scores + q, row);
    std::fill_n(contexts, count * d, 0.0f);
    kernels_.accumulate(step.cache(step.value, b, kv_head, start), {nullptr, all}, scores, count, contexts, {});
    for (size_t q = 0; q < count; ++q)
      std::copy_n(contexts + q * d, d, step.y + ((b * step.seqlen + token(q)) * step.n_heads + head(q)) * d);
  }

  // Replaces the scores of a query, `stride` floats apart, by their softmax over those that it sees.
  void weigh(Chunk seen, size_t all, size_t stride, float* scores, float* row) const {
    for (size_t i = seen.begin; i < seen.end; ++i) row[i - seen.begin] = scores[i * stride];
    const float inverse = 1 / kernels_.exponentials(row, seen.size());
    for (size_t i = 0; i < seen.begin; ++i) scores[i * stride] = 0;
    for (size_t i = seen.begin; i < seen.end; ++i) scores[i * stride] = row[i - seen.begin] * inverse;
    for (size_t i = seen.end; i < all; ++i) scores[i * stride] = 0;
  }

  const Api& api_;
  Node node_;
  const Kernels& kernels_;
  int64_t n_heads_ = 0, window_ = 0;
};

}  // namespace

const Entry kCachedAttention = entry_of<CachedAttention>();

std::unique_ptr<Part> cached_attention_part(const Api& api, const OrtKernelInfo* info, size_t first) {
  return std::make_unique<PartOf<CachedAttention>>(api, info, first);
}

}  // namespace shadowllm
