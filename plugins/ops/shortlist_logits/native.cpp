// ShortlistLogits: logits from a 4-bit copy of the output table. The best rows are recomputed from the table. If the
// table holds residuals of the copy, their products are added to the logits of the copy. Rows of x share each pass over
// the copy, and are computed as each would be alone; but if all rows of a float table are wanted, products of several
// rows of x are added up in another order.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "largest.hpp"
#include "op.hpp"

namespace shadowllm {
namespace {

enum Input { kX, kTable, kCopy, kScales, kErrors, kShortlist, kCertify, kWeighting, kTableScales };

constexpr size_t kTokens = 16;  // rows of x per pass over the copy
constexpr size_t kRows = 256;   // rows of the copy that are read for one row of x after the other, from the cache
constexpr size_t kWorkers = 4;  // rows of x that are completed at the same time, each with lists of its own

// The part of |copy / d| * |d * x| that the errors contain for rounding, as in certificate.py. Half of it is for the
// sums. Kernels may also round x, to multiples of the largest element of a block times kInputStep or less.
constexpr double kRounding = 1.0 / 1024, kInputStep = 1.0 / 32768;

// Lists of rows, for one row of x after the other.
struct Lists {
  int32_t *ids, *keys;  // rows of the shortlist, before that of the candidates, and their keys
  int32_t* others;      // rows that the certificate needs
  float* exact;
};

// The scratch memory of a pass.
struct Memory {
  Memory(Scratch& scratch, size_t tokens, size_t rows, size_t padded) : room(input_floats(padded)), rows(rows) {
    const size_t groups = (rows + kKeyGroup - 1) / kKeyGroup;
    x = scratch.take(2 * tokens * room + tokens * groups + 4 * rows * std::min(tokens, kWorkers));
    inputs = x + tokens * room;
    maxima = reinterpret_cast<int32_t*>(inputs + tokens * room);
    lists_ = maxima + tokens * groups;
  }

  Lists lists(size_t worker) const {
    int32_t* ids = lists_ + 4 * rows * worker;
    return {ids, ids + rows, ids + 2 * rows, reinterpret_cast<float*>(ids + 3 * rows)};
  }

  size_t room, rows;  // floats of a row of x or inputs; rows of the table
  float *x, *inputs;  // x with the padding of the last block, and in the form that the kernels read
  int32_t* maxima;    // the largest key of each group

 private:
  int32_t* lists_;
};

// A row of x, and what is asked for it.
struct Query {
  const float* x;
  const float* padded;  // x with the padding of the last block
  size_t shortlist;
  bool certify;
  Rows table, copy;
  float* logits;
  int32_t* recomputed;

  bool whole(size_t rows) const { return shortlist == rows && table.step == 0; }  // the copy is not read by itself
};

class ShortlistLogits {
 public:
  static constexpr const char* kName = "ShortlistLogits";
  static constexpr Port kPorts[] = {
      {"x", kFloat, kRequired},       {"table", kUndefined, kRequired}, {"copy", kUInt8, kRequired},
      {"scales", kFloat, kRequired},  {"errors", kFloat, kRequired},    {"shortlist", kInt32, kRequired},
      {"certify", kInt32, kRequired}, {"weighting", kFloat, kOptional}, {"table_scales", kFloat, kOptional},
  };
  static constexpr Port kOutputs[] = {{"logits", kFloat, kRequired}, {"recomputed", kInt32, kRequired}};

  ShortlistLogits(const Api& api, const OrtKernelInfo* info)
      : api_(api), node_(api, info, kName, kPorts, std::size(kPorts), false), kernels_(choose_kernels()) {
    node_.shorten({kScales});
    node_.tile(kernels_, kCopy, kScales);
  }

  static void infer(const Api& api, OrtShapeInferContext* context);

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = node_.inputs(context);
    for (const Input port : {kX, kTable})
      if (in[port].rank != 2)
        node_.fail(std::string(kPorts[port].name) + " has " + std::to_string(in[port].rank) + " dimensions, not 2");
    const int64_t tokens = in[kX].dims[0], rows = in[kTable].dims[0];
    for (const Input port : {kShortlist, kCertify}) node_.expect_one_each(in, port, static_cast<size_t>(tokens));
    const Tensor logits = node_.output(context, {tokens, rows}), counts = node_.optional_output(context, 1, {tokens});
    if (counts.present()) std::fill_n(static_cast<int32_t*>(counts.data), tokens, 0);
    std::vector<Query> queries;
    for (int64_t t = 0; t < tokens; ++t) queries.push_back(read(in, static_cast<size_t>(t), logits, counts));
    const bool alike = in[kShortlist].size() == 1 && in[kCertify].size() == 1;  // the same is asked for all rows of x
    const Pool pool(api_, context);
    for (size_t first = 0; rows > 0 && first < queries.size(); first += kTokens) {
      const size_t count = std::min(kTokens, queries.size() - first);
      const Query* some = queries.data() + first;
      if (alike && count > 1 && some->whole(static_cast<size_t>(rows)) && some->table.scales == nullptr)
        multiply(pool, some, count, static_cast<size_t>(rows));
      else
        run(pool, in, queries.data() + first, count);
    }
  }

 private:
  Query read(const std::vector<Tensor>& in, size_t token, const Tensor& logits, const Tensor& counts) const {
    const int64_t rows = in[kTable].dims[0], wanted = Node::number(in[kShortlist], token);
    node_.bound("shortlist", wanted, 0, INT32_MAX);
    Query query{};
    query.certify = Node::number(in[kCertify], token) != 0;
    query.shortlist = static_cast<size_t>(std::min<int64_t>(std::max<int64_t>(wanted, query.certify), rows));
    query.copy = copy_rows(in, query.certify), query.table = table_rows(in, query);
    query.x = query.padded = in[kX].as<float>() + token * static_cast<size_t>(in[kX].dims[1]);
    query.logits = static_cast<float*>(logits.data) + token * static_cast<size_t>(rows);
    query.recomputed = static_cast<int32_t*>(counts.data) + token;
    return query;
  }

  Rows table_rows(const std::vector<Tensor>& in, const Query& query) const {
    const int64_t rows = in[kTable].dims[0], width = in[kX].dims[1];
    node_.expect(in, kErrors, {rows});
    node_.expect(in, kWeighting, {width});
    if (!Node::is_residual(in[kTable], in[kTableScales])) return node_.matrix(in, kTable, kTableScales, rows, width);
    if (query.shortlist == static_cast<size_t>(rows) && !query.certify)
      return node_.nested(in, kTable, kCopy, kScales, rows, width);
    return exact(node_.residual(in, kTable, query.copy, rows), query.certify);
  }

  Rows copy_rows(const std::vector<Tensor>& in, bool certify) const {
    return exact(node_.copy(in, kCopy, kScales, in[kTable].dims[0], in[kX].dims[1]), certify);
  }

  // The kernels of the copy and of residuals may round x to 8 bits, which the certificate does not allow for.
  static Rows exact(Rows rows, bool certify) {
    if (certify && rows.type == RowType::c4) rows.type = RowType::i4;
    if (certify && rows.type == RowType::c2) rows.type = RowType::i2;
    return rows;
  }

  void run(const Pool& pool, const std::vector<Tensor>& in, Query* queries, size_t count) const {
    const size_t rows = static_cast<size_t>(in[kTable].dims[0]), width = static_cast<size_t>(in[kX].dims[1]);
    Scratch scratch;
    const Memory memory(scratch, count, rows, queries->copy.width);
    for (size_t t = 0; t < count && queries->copy.width != width; ++t) {
      float* own = memory.x + t * memory.room;
      std::fill(std::copy_n(queries[t].x, width, own), own + queries->copy.width, 0.0f);
      queries[t].padded = own;
    }
    products(pool, queries, count, rows, memory);
    if (count == 1) return complete(pool, in, queries[0], width, memory, memory.lists(0), 0);
    const size_t workers = std::min(count, kWorkers);
    pool.run(workers, [&](size_t worker) {
      for (size_t t = worker; t < count; t += workers)
        complete(Pool::none(), in, queries[t], width, memory, memory.lists(worker), t);
    });
  }

  // All logits of several queries from the whole table of floats, which is read once.
  void multiply(const Pool& pool, const Query* queries, size_t count, size_t rows) const {
    const Rows& table = queries->table;
    const Chunks chunks(rows, table.cost(), count);
    pool.run(chunks.count(), [&](size_t c) {
      float products[kRows * kTokens];
      for (size_t first = chunks[c].begin; first < chunks[c].end; first += kRows) {
        const size_t size = std::min(kRows, chunks[c].end - first);
        kernels_.project(table.from(first), {nullptr, size}, queries->x, count, products, {});
        for (size_t t = 0; t < count; ++t)
          for (size_t i = 0; i < size; ++i) queries[t].logits[first + i] = products[i * count + t];
      }
    });
    for (size_t t = 0; t < count; ++t) *queries[t].recomputed = static_cast<int32_t>(rows);
  }

  // Recomputes the best rows of a query, and those that its certificate needs.
  void complete(const Pool& pool, const std::vector<Tensor>& in, const Query& query, size_t width, const Memory& memory,
                const Lists& lists, size_t t) const {
    const size_t rows = memory.rows;
    size_t count = query.shortlist;
    if (!query.whole(rows)) {
      if (count == rows)
        std::iota(lists.ids, lists.ids + rows, 0);
      else
        choose(query.logits, rows, count, memory, lists, t);
      const float* x = query.table.step != 0 ? query.padded : query.x;
      const float* input = kernels_.prepare(query.table, x, 1, memory.inputs + t * memory.room);
      const float best = recompute(pool, query.table, {lists.ids, count}, input, lists.exact, query.logits);
      if (query.certify) {
        const size_t more =
            doubtful(in, query.x, width, query.copy.block, query.logits, rows, best, query.shortlist, lists);
        recompute(pool, query.table, {lists.others, more}, input, lists.exact, query.logits);
        count += more;
      }
    }
    *query.recomputed = static_cast<int32_t>(count);
  }

  // Queries that are multiplied with the same matrix, which is read once for all of them.
  struct Batch {
    const Rows* matrix;
    Chunks chunks;
    size_t count = 0;
    const float* inputs[kTokens];
    float* logits[kTokens];
    int32_t* maxima[kTokens];
  };

  // All logits, from the copy or the whole table, and the largest key of each group of logits.
  void products(const Pool& pool, const Query* queries, size_t count, size_t rows, const Memory& memory) const {
    std::vector<Batch> parts;
    const size_t groups = (rows + kKeyGroup - 1) / kKeyGroup;
    for (size_t t = 0; t < count; ++t) {
      const Query& query = queries[t];
      const bool whole = query.whole(rows);
      const Rows& matrix = whole ? query.table : query.copy;
      const float* x = matrix.width == query.copy.width ? query.padded : query.x;
      const float* input = kernels_.prepare(matrix, x, 1, memory.inputs + t * memory.room);
      const auto fits = [&](const Batch& part) {
        return part.matrix->type == matrix.type && part.matrix->data == matrix.data;
      };
      auto part = std::find_if(parts.begin(), parts.end(), fits);
      if (part == parts.end()) part = parts.insert(part, Batch{&matrix, Chunks(rows, matrix.cost(), 1)});
      part->inputs[part->count] = input, part->logits[part->count] = query.logits;
      part->maxima[part->count++] = memory.maxima + t * groups;
    }
    size_t most = 0;
    for (const Batch& part : parts) most = std::max(most, part.chunks.count());
    pool.run(most, [&](size_t c) {
      // Rows from the cache for all queries but the first. One query reads its rows without a stop.
      const size_t step = count == 1 ? rows : kRows;
      for (size_t at = 0; at < rows; at += step)
        for (const Batch& part : parts) {
          if (c >= part.chunks.count()) continue;
          const Chunk chunk = part.chunks[c];
          const size_t first = chunk.begin + at, end = std::min(chunk.end, first + step);
          if (first < end) project(part, first, end);
        }
    });
  }

  // The logits of rows first..end, and the largest keys of their groups.
  void project(const Batch& part, size_t first, size_t end) const {
    float* logits[kTokens];
    for (size_t t = 0; t < part.count; ++t) logits[t] = part.logits[t] + first;
    kernels_.project_each(part.matrix->from(first), {nullptr, end - first}, part.inputs, part.count, logits);
    for (size_t t = 0; t < part.count; ++t)
      kernels_.group_maxima(logits[t], end - first, part.maxima[t] + first / kKeyGroup);
  }

  // Writes the rows of the k largest logits to lists.ids. At least k logits reach the k-th largest maximum of a group,
  // so only those are candidates, and most groups are skipped.
  void choose(const float* logits, size_t rows, size_t k, const Memory& memory, const Lists& lists,
              size_t token) const {
    if (k == 0) return;
    const size_t groups = (rows + kKeyGroup - 1) / kKeyGroup;
    const int32_t* maxima = memory.maxima + token * groups;
    const int32_t least = k < groups ? kth_largest(kernels_, maxima, groups, k).key : INT32_MIN;
    // The logits of these groups one after the other, then the positions and rows of the candidates among them.
    const size_t found = kernels_.list_from(maxima, groups, least, groups, lists.others);
    size_t gathered = 0;
    for (size_t i = 0; i < found; ++i) {
      const size_t first = static_cast<size_t>(lists.others[i]) * kKeyGroup, size = std::min(kKeyGroup, rows - first);
      std::copy_n(logits + first, size, lists.exact + gathered);
      gathered += size;
    }
    kernels_.order(lists.exact, gathered, lists.keys);
    const size_t count = kernels_.list_from(lists.keys, gathered, least, gathered, lists.ids);
    for (size_t i = 0; i < count; ++i) {
      const size_t at = static_cast<size_t>(lists.ids[i]);
      lists.keys[i] = lists.keys[at];
      lists.ids[i] =
          lists.others[at / kKeyGroup] * static_cast<int32_t>(kKeyGroup) + static_cast<int32_t>(at % kKeyGroup);
    }
    write_largest(kernels_, lists.keys, count, k, lists.others);
    for (size_t i = 0; i < k; ++i) lists.ids[i] = lists.ids[lists.others[i]];
  }

  // Replaces the logits of some rows by exact ones, and returns the largest.
  float recompute(const Pool& pool, const Rows& table, Picks picks, const float* x, float* exact, float* logits) const {
    const Chunks chunks(picks.count, table.cost(), 1);
    if (picks.count == 0) return -INFINITY;
    pool.run(chunks.count(), [&](size_t c) {
      const Chunk chunk = chunks[c];
      const Picks mine{picks.ids + chunk.begin, chunk.size()};
      kernels_.project(table, mine, x, 1, exact + chunk.begin, {});
      for (size_t i = 0; i < mine.count; ++i) {
        float &value = exact[chunk.begin + i], &logit = logits[mine.ids[i]];
        if (table.step != 0) value = logit + table.step * value;
        logit = value;
      }
    });
    float best = -INFINITY;
    for (size_t i = 0; i < picks.count; ++i) best = exact[i] > best ? exact[i] : best;
    return best;
  }

  // Writes to lists.others the rows outside the shortlist whose exact logit may reach `best`; returns how many.
  size_t doubtful(const std::vector<Tensor>& in, const float* x, size_t width, size_t block, const float* logits,
                  size_t rows, float best, size_t shortlist, const Lists& lists) const {
    const float* errors = in[kErrors].as<float>();
    const float reach = error_factor(x, in[kWeighting].as<float>(), width, block);
    size_t found = 0, count = 0, listed = 0;
    for (size_t i = 0; i < rows; ++i) {
      lists.others[found] = static_cast<int32_t>(i);
      found += !(logits[i] + errors[i] * reach < best);
    }
    for (size_t i = 0; i < found; ++i) {
      const int32_t row = lists.others[i];
      while (listed < shortlist && lists.ids[listed] < row) ++listed;
      lists.others[count] = row;
      count += listed == shortlist || lists.ids[listed] != row;
    }
    return count;
  }

  // |weighting * x|, enlarged where the kernels round x more than the errors allow. In double precision, because a
  // square may be outside the range of a float.
  static float error_factor(const float* x, const float* weighting, size_t width, size_t block) {
    double squares = 0, steps = 0;
    for (size_t first = 0; first < width; first += block) {
      double most = 0, weights = 0;
      for (size_t k = first; k < std::min(first + block, width); ++k) {
        const double value = x[k], weight = weighting == nullptr ? 1.0 : weighting[k];
        squares += value * value * weight * weight;
        weights += weight * weight;
        most = std::max(most, std::fabs(value));
      }
      steps += most * most * weights;
    }
    const double norm = std::sqrt(squares), rounded = std::sqrt(steps) * kInputStep;
    const double more = std::max(0.0, rounded / kRounding - norm / 2);
    return std::nextafter(static_cast<float>(norm + more), INFINITY);
  }

  const Api& api_;
  Node node_;
  const Kernels& kernels_;
};

void ShortlistLogits::infer(const Api& api, OrtShapeInferContext* context) {
  infer_rows(api, context, {kX, kTable}, 0, kFloat);
  infer_rows(api, context, {kX}, 1, kInt32);
}

}  // namespace

const Entry kShortlistLogits = entry_of<ShortlistLogits>();

}  // namespace shadowllm
