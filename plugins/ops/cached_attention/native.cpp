// CachedAttention: writes this step's keys and values into the cache, then attends. Query heads that share a KV head
// attend together, so that they read its cache once. With few KV heads and many positions, the positions
// are divided into tasks too. A result does not depend on the other sequences. In a short step, a token has the bits
// that it has in a step of its own.
#include <cmath>
#include <cstring>

#include "op.hpp"
#include "room.hpp"

namespace shadowllm {
namespace {

enum Input { kProjected, kPastKey, kPastValue, kLast, kCos, kSin };

constexpr size_t kQueries = 16;     // queries of a KV head that attend together
constexpr size_t kShortStep = 65;   // most tokens of a sequence that attend one by one: LONGEST_DRAFT + 1
constexpr size_t kWorkers = 24;     // threads, each with memory for the scores of its queries
constexpr size_t kTasks = 24;       // that a sequence should have
constexpr size_t kLeastPart = 256;  // positions of a task, at least, if they are divided
constexpr size_t kRowsAtOnce = 16;  // of the kernels, at most; a part starts at a multiple of it

// Queries of a KV head that attend together: `count` of them, from `first` on. They are by token, then by
// head.
struct Tile {
  size_t b, kv_head, first, count;
};

// What some positions add to the results of a tile. For each query: the sum of the values times exp(score - largest),
// the largest score, and the sum of these exponentials.
struct Partial {
  float *contexts, *largest, *totals;

  Partial(float* memory, size_t queries, size_t head_dim)
      : contexts(memory), largest(memory + queries * head_dim), totals(largest + queries) {}
  static size_t floats(size_t queries, size_t head_dim) { return whole_lines(queries * (head_dim + 2)); }
};

// What one call works on. Sizes are as in schema.py.
struct Step {
  size_t batch, seqlen, n_heads, kv_heads, capacity, head_dim;
  size_t window;   // 0 if all positions are seen
  size_t longest;  // positions of the longest sequence, new ones included
  const float *projected, *cos, *sin;
  const int32_t* last;
  float *key, *value, *y;

  size_t group() const { return n_heads / kv_heads; }
  size_t past(size_t b) const { return static_cast<size_t>(last[b]) + 1 - seqlen; }
  // In a short step, each token is a turn of its own. Otherwise all tokens are one turn. Queries of a KV head in a
  // turn:
  size_t queries() const { return (seqlen <= kShortStep ? 1 : seqlen) * group(); }
  size_t turns() const { return seqlen <= kShortStep ? seqlen : 1; }
  size_t tiles_of_turn() const { return (queries() + kQueries - 1) / kQueries; }
  size_t tiles_of_head() const { return turns() * tiles_of_turn(); }
  size_t tiles() const { return kv_heads * tiles_of_head(); }  // of a sequence
  Tile tile(size_t i) const {
    const size_t b = i / tiles(), kv_head = i % tiles() / tiles_of_head(), of_head = i % tiles_of_head();
    const size_t start = of_head / tiles_of_turn() * queries(), first = of_head % tiles_of_turn() * kQueries;
    return {b, kv_head, start + first, std::min(kQueries, queries() - first)};
  }
  // As many for a token of a short step as in a step of its own.
  size_t most_parts() const { return kTasks / std::max<size_t>(1, kv_heads * tiles_of_turn()); }
  // Into how many parts so many positions are divided.
  size_t parts(size_t positions) const { return std::max<size_t>(1, std::min(most_parts(), positions / kLeastPart)); }
  // The most positions of a part.
  size_t longest_part() const {
    if (parts(longest) == 1) return longest;
    return std::max(2 * kLeastPart, longest / most_parts()) + kRowsAtOnce;
  }
  // The positions that query q of a tile sees.
  Chunk seen(const Tile& tile, size_t q) const {
    const size_t end = past(tile.b) + token(tile, q) + 1;
    return {window != 0 && end > window ? end - window : 0, end};
  }
  size_t token(const Tile& tile, size_t q) const { return (tile.first + q) / group(); }
  size_t head(const Tile& tile, size_t q) const { return tile.kv_head * group() + (tile.first + q) % group(); }
  // The positions that a tile sees.
  Chunk seen(const Tile& tile) const { return {seen(tile, 0).begin, seen(tile, tile.count - 1).end}; }
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
      {"y", kFloat, kRequired}, {"key", kFloat, kOptional}, {"value", kFloat, kOptional}};

  CachedAttention(const Api& api, const OrtKernelInfo* info, size_t first = 0)
      : api_(api), node_(api, info, kName, kPorts, std::size(kPorts), false, first), kernels_(choose_kernels()) {
    n_heads_ = node_.integer("n_heads");
    node_.bound("n_heads", n_heads_, 1, INT32_MAX);
    window_ = node_.integer_or("window", 0);
    node_.bound("window", window_, 0, INT32_MAX);
  }

  static void infer(const Api&, OrtShapeInferContext*) {}  // the node may lack the outputs whose shapes are known

  Bytes first_bytes() const { return {}; }  // it has no weights
  std::vector<Tensor> inputs(const OrtKernelContext* context) const { return node_.inputs(context); }

  void compute(OrtKernelContext* context) const {
    compute(inputs(context), Outputs(node_, context), Pool(api_, context));
  }

  void compute(const std::vector<Tensor>& in, const Outputs& outputs, const Pool& pool) const {
    const Step step = read(in, outputs);
    const Pool some = step.seqlen == 1 ? Pool::none() : pool;
    some.run(step.batch * step.kv_heads, [&](size_t i) { write(step, i / step.kv_heads, i % step.kv_heads); });
    const size_t tiles = step.batch * step.tiles(), parts = step.parts(step.longest), tasks = tiles * parts;
    const size_t workers = std::min(tasks, kWorkers), results = parts == 1 ? workers : tasks;
    const size_t most = std::min(step.queries(), kQueries), size = Partial::floats(most, step.head_dim);
    const size_t room = whole_lines(most * (step.head_dim + whole_lines(step.longest_part())));
    Scratch scratch;
    float *found = scratch.take(results * size + workers * room), *work = found + results * size;
    // Tiles of a KV head come one after the other with the same part of the positions, because they read the same
    // cache.
    const size_t of_head = step.tiles_of_head();
    pool.run(workers, [&](size_t worker) {
      for (size_t i = worker; i < tasks; i += workers) {
        const size_t part = i / of_head % parts, tile = i / of_head / parts * of_head + i % of_head;
        float* result = found + (parts == 1 ? worker : tile * parts + part) * size;
        attend(step, step.tile(tile), part, work + worker * room, result);
        if (parts == 1) finish(step, step.tile(tile), result, size);
      }
    });
    pool.run(parts > 1 ? tiles : 0, [&](size_t i) { finish(step, step.tile(i), found + i * parts * size, size); });
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
    step.window = static_cast<size_t>(window_);
    step.capacity = static_cast<size_t>(capacity), step.head_dim = static_cast<size_t>(d);
    for (size_t b = 0; b < step.batch; ++b)
      step.longest = std::max(step.longest, static_cast<size_t>(in[kLast].as<int32_t>()[b]) + 1);
    step.projected = projected.as<float>(), step.last = in[kLast].as<int32_t>();
    step.cos = in[kCos].as<float>(), step.sin = in[kSin].as<float>();
    step.y = static_cast<float*>(outputs.get(0, {rows, n_heads_ * d}).data);
    const auto cache = [&](size_t output, Input input) {
      const Tensor& past = in[input];
      const Tensor present = outputs.get(output, {batch, kv_heads, capacity, d});
      if (!present.present() && node_.is_constant(input)) node_.fail("a constant cache needs an output");
      void* data = present.present() ? present.data : past.data;
      if (data != past.data && past.size() != 0) std::memcpy(data, past.data, past.size() * sizeof(float));
      return static_cast<float*>(data);
    };
    step.key = cache(1, kPastKey), step.value = cache(2, kPastValue);
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

  // What part `part` of the positions adds to a tile. `work` and `result` have the sizes that `compute` takes.
  void attend(const Step& step, const Tile& tile, size_t part, float* work, float* result) const {
    const size_t d = step.head_dim, count = tile.count;
    const Chunk all = step.seen(tile);
    const size_t parts = step.parts(all.size());
    if (part >= parts) return;
    const auto edge = [&](size_t i) {
      return i == parts ? all.end : all.begin + all.size() * i / parts / kRowsAtOnce * kRowsAtOnce;
    };
    const Chunk mine{edge(part), edge(part + 1)};
    const Partial found(result, count, d);
    const size_t stride = whole_lines(mine.size());
    float *queries = work, *scores = queries + count * d;
    const float scale = 1 / std::sqrt(static_cast<float>(d));
    for (size_t q = 0; q < count; ++q)
      step.rotated(tile.b, step.token(tile, q), step.head(tile, q), scale, queries + q * d);
    const auto cache = [&](const float* of) { return step.cache(of, tile.b, tile.kv_head, mine.begin); };
    const Rows keys = cache(step.key), values = cache(step.value);
    kernels_.attention_scores(keys, values, mine.size(), queries, count, scores, stride);
    for (size_t q = 0; q < count; ++q) {
      const Chunk seen = step.seen(tile, q);
      const auto place = [&](size_t at) { return std::clamp(at, mine.begin, mine.end) - mine.begin; };
      found.totals[q] =
          weigh({place(seen.begin), place(seen.end)}, mine.size(), scores + q * stride, &found.largest[q]);
    }
    kernels_.attention_sum(values, mine.size(), scores, count, stride, found.contexts);
  }

  // Replaces `all` scores by exp(score - largest) of those that are seen, and 0 for the others. Returns the sum.
  float weigh(Chunk seen, size_t all, float* scores, float* largest) const {
    std::fill(scores, scores + seen.begin, 0.0f);
    std::fill(scores + seen.end, scores + all, 0.0f);
    return kernels_.exponentials(scores + seen.begin, seen.size(), largest);
  }

  // The results of a tile, from those of its parts, which are `size` floats apart.
  void finish(const Step& step, const Tile& tile, float* results, size_t size) const {
    const size_t d = step.head_dim, parts = step.parts(step.seen(tile).size());
    for (size_t q = 0; q < tile.count; ++q) {
      const auto part = [&](size_t p) { return Partial(results + p * size, tile.count, d); };
      float largest = -INFINITY, total = 0;
      for (size_t p = 0; p < parts; ++p) largest = std::max(largest, part(p).largest[q]);
      float* y = step.y + ((tile.b * step.seqlen + step.token(tile, q)) * step.n_heads + step.head(tile, q)) * d;
      std::fill_n(y, d, 0.0f);
      for (size_t p = 0; p < parts; ++p) {
        const float weight = std::exp(part(p).largest[q] - largest);
        total += weight * part(p).totals[q];
        for (size_t j = 0; j < d; ++j) y[j] += weight * part(p).contexts[q * d + j];
      }
      for (size_t j = 0; j < d; ++j) y[j] /= total;
    }
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
