// ShortlistLogits: logits from a 4-bit copy of the output table. The best rows are recomputed from the table. If the
// table holds residuals of the copy, their products are added to the logits of the copy.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "largest.hpp"
#include "op.hpp"

namespace shadowllm {
namespace {

enum Input { kX, kTable, kCopy, kScales, kErrors, kShortlist, kCertify, kWeighting, kTableScales };

constexpr size_t kTokens = 16;  // rows of x per pass over the copy
constexpr size_t kGroup = 8;    // logits that are first compared by their largest; chunks start at multiples of it

// The part of |copy / d| * |d * x| that the errors contain for rounding, as in certificate.py. Half of it is for the
// sums. Kernels may also round x, to multiples of the largest element of a block times kInputStep or less.
constexpr double kRounding = 1.0 / 1024, kInputStep = 1.0 / 32768;

// The scratch memory of a call. The lists of rows serve one row of x after the other.
struct Memory {
  Memory(Scratch& scratch, size_t tokens, size_t rows, size_t padded, bool turned) {
    const size_t room = tokens * input_floats(padded), groups = (rows + kGroup - 1) / kGroup;
    x = scratch.take(2 * room + (turned ? tokens * rows : 0) + tokens * groups + 4 * rows);
    input = x + room;
    products = input + room;
    float* rest = products + (turned ? tokens * rows : 0);
    maxima = reinterpret_cast<int32_t*>(rest);
    ids = maxima + tokens * groups;
    keys = ids + rows;
    others = keys + rows;
    exact = reinterpret_cast<float*>(others + rows);
  }

  float *x, *input;     // x with the padding of the last block, and in the form that the kernels read
  float* products;      // of more than one token: (rows, tokens)
  int32_t* maxima;      // the largest key of each group
  int32_t *ids, *keys;  // rows of the shortlist, before that of the candidates, and their keys
  int32_t* others;      // rows that the certificate needs
  float* exact;
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
      : api_(api), node_(api, info, kName, kPorts, std::size(kPorts), false), kernels_(choose_kernels()) {}

  static void infer(const Api& api, OrtShapeInferContext* context);

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = node_.inputs(context);
    const bool certify = scalar(in, kCertify) != 0;
    const Rows copy = copy_rows(in, certify), table = table_rows(in, copy, certify);
    const int64_t tokens = in[kX].dims[0], width = in[kX].dims[1], rows = in[kTable].dims[0];
    const int64_t wanted = scalar(in, kShortlist);
    node_.bound("shortlist", wanted, 0, INT32_MAX);
    const Tensor logits = node_.output(context, {tokens, rows}), counts = node_.optional_output(context, 1, {tokens});
    int32_t* recomputed = static_cast<int32_t*>(counts.data);
    const size_t shortlist = std::min<size_t>(std::max<int64_t>(wanted, certify), rows);
    for (int64_t first = 0; rows > 0 && first < tokens; first += kTokens) {
      const size_t count = std::min<size_t>(kTokens, tokens - first);
      run(Pool(api_, context), in, table, copy, in[kX].as<float>() + first * width, count, shortlist, certify,
          static_cast<float*>(logits.data) + first * rows, recomputed + first);
    }
  }

 private:
  int32_t scalar(const std::vector<Tensor>& in, Input port) const {
    if (in[port].size() != 1)
      node_.fail(std::string(kPorts[port].name) + " has " + std::to_string(in[port].size()) + " elements, not 1");
    return *in[port].as<int32_t>();
  }

  Rows table_rows(const std::vector<Tensor>& in, const Rows& copy, bool certify) const {
    const int64_t rows = in[kTable].dims[0], width = in[kX].dims[1];
    node_.expect(in, kErrors, {rows});
    node_.expect(in, kWeighting, {width});
    if (!Node::is_residual(in[kTable], in[kTableScales])) return node_.matrix(in, kTable, kTableScales, rows, width);
    return exact(node_.residual(in, kTable, copy, rows), certify);
  }

  Rows copy_rows(const std::vector<Tensor>& in, bool certify) const {
    for (const Input port : {kX, kTable})
      if (in[port].rank != 2)
        node_.fail(std::string(kPorts[port].name) + " has " + std::to_string(in[port].rank) + " dimensions, not 2");
    return exact(node_.copy(in, kCopy, kScales, in[kTable].dims[0], in[kX].dims[1]), certify);
  }

  // The kernels of the copy and of residuals may round x to 8 bits, which the certificate does not allow for.
  static Rows exact(Rows rows, bool certify) {
    if (certify && rows.type == RowType::c4) rows.type = RowType::i4;
    if (certify && rows.type == RowType::c2) rows.type = RowType::i2;
    return rows;
  }

  void run(const Pool& pool, const std::vector<Tensor>& in, const Rows& table, const Rows& copy, const float* x,
           size_t tokens, size_t shortlist, bool certify, float* logits, int32_t* recomputed) const {
    const size_t rows = static_cast<size_t>(in[kTable].dims[0]), width = static_cast<size_t>(in[kX].dims[1]);
    const bool nested = table.step != 0;
    Scratch scratch;
    Memory memory(scratch, tokens, rows, copy.width, tokens > 1);
    if (shortlist == rows && !nested) {
      products(pool, table, rows, x, tokens, logits, memory, false);
      std::fill(recomputed, recomputed + tokens, static_cast<int32_t>(rows));
      return;
    }
    const float* padded = x;
    if (copy.width != width) {
      padded = memory.x;
      std::fill(memory.x, memory.x + tokens * copy.width, 0.0f);
      for (size_t t = 0; t < tokens; ++t) std::copy(x + t * width, x + (t + 1) * width, memory.x + t * copy.width);
    }
    products(pool, copy, rows, padded, tokens, logits, memory, shortlist > 0);
    for (size_t t = 0; t < tokens; ++t) {
      const float* of = x + t * width;
      float* mine = logits + t * rows;
      if (shortlist == rows)
        std::iota(memory.ids, memory.ids + rows, 0);
      else
        choose(mine, rows, shortlist, memory, t);
      const float* input = kernels_.prepare(table, nested ? padded + t * copy.width : of, 1, memory.input);
      const float best = recompute(pool, table, {memory.ids, shortlist}, input, memory.exact, mine);
      size_t count = shortlist;
      if (certify) {
        const size_t more = doubtful(in, of, width, copy.block, mine, rows, best, shortlist, memory);
        recompute(pool, table, {memory.others, more}, input, memory.exact, mine);
        count += more;
      }
      recomputed[t] = static_cast<int32_t>(count);
    }
  }

  // logits (tokens, rows) of all rows of a matrix and, if wanted, the largest key of each group.
  void products(const Pool& pool, const Rows& matrix, size_t rows, const float* x, size_t tokens, float* logits,
                const Memory& memory, bool with_maxima) const {
    const float* input = kernels_.prepare(matrix, x, tokens, memory.input);
    const Chunks chunks(rows, matrix.cost(), tokens);
    const size_t groups = (rows + kGroup - 1) / kGroup;
    pool.run(chunks.count(), [&](size_t c) {
      const Chunk chunk = chunks[c];
      Rows part = matrix;
      part.data = static_cast<const char*>(matrix.data) + chunk.begin * matrix.stride;
      if (matrix.scales != nullptr) part.scales += chunk.begin * matrix.scales_stride / sizeof(float);
      float* out = tokens == 1 ? logits + chunk.begin : memory.products + chunk.begin * tokens;
      kernels_.project(part, {nullptr, chunk.size()}, input, tokens, out, {});
      for (size_t t = 0; tokens > 1 && t < tokens; ++t)
        for (size_t i = 0; i < chunk.size(); ++i) logits[t * rows + chunk.begin + i] = out[i * tokens + t];
      for (size_t t = 0; with_maxima && t < tokens; ++t)
        for (size_t first = chunk.begin; first < chunk.end; first += kGroup) {
          int32_t most = INT32_MIN;
          for (size_t i = first; i < std::min(first + kGroup, chunk.end); ++i)
            most = std::max(most, sortable(logits[t * rows + i]));
          memory.maxima[t * groups + first / kGroup] = most;
        }
    });
  }

  // Writes the rows of the k largest logits to memory.ids. At least k logits reach the k-th largest maximum of a group,
  // so only those are candidates, and most groups are skipped.
  void choose(const float* logits, size_t rows, size_t k, const Memory& memory, size_t token) const {
    if (k == 0) return;
    const size_t groups = (rows + kGroup - 1) / kGroup;
    const int32_t* maxima = memory.maxima + token * groups;
    const int32_t least = k < groups ? kth_largest(kernels_, maxima, groups, k).key : INT32_MIN;
    size_t count = 0;
    for (size_t g = 0; g < groups; ++g) {
      if (maxima[g] < least) continue;
      for (size_t i = g * kGroup; i < std::min((g + 1) * kGroup, rows); ++i) {
        const int32_t key = sortable(logits[i]);
        memory.ids[count] = static_cast<int32_t>(i);
        memory.keys[count] = key;
        count += key >= least;
      }
    }
    write_largest(kernels_, memory.keys, count, k, memory.ids, [&](size_t i) { return memory.ids[i]; });
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

  // Writes to memory.others the rows outside the shortlist whose exact logit may reach `best`; returns how many.
  size_t doubtful(const std::vector<Tensor>& in, const float* x, size_t width, size_t block, const float* logits,
                  size_t rows, float best, size_t shortlist, const Memory& memory) const {
    const float* errors = in[kErrors].as<float>();
    const float reach = error_factor(x, in[kWeighting].as<float>(), width, block);
    size_t found = 0, count = 0, listed = 0;
    for (size_t i = 0; i < rows; ++i) {
      memory.others[found] = static_cast<int32_t>(i);
      found += !(logits[i] + errors[i] * reach < best);
    }
    for (size_t i = 0; i < found; ++i) {
      const int32_t row = memory.others[i];
      while (listed < shortlist && memory.ids[listed] < row) ++listed;
      memory.others[count] = row;
      count += listed == shortlist || memory.ids[listed] != row;
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
  int64_t dims[2] = {};
  const char* names[2] = {};
  for (size_t input = 0; input < 2; ++input) {  // the first dimensions of x and of the table
    OrtTensorTypeAndShapeInfo* info = nullptr;  // owned by the context
    api.check(api.shape_infer_get_input(context, input, &info));
    int64_t found[2] = {};
    const char* called[2] = {};
    size_t rank = 0;
    api.check(api.get_dimensions_count(info, &rank));
    if (rank != 2) return;
    api.check(api.get_dimensions(info, found, 2));
    api.check(api.get_symbolic_dimensions(info, called, 2));
    if (found[0] < 0 && *called[0] == '\0') return;
    dims[input] = found[0];
    names[input] = called[0];
  }
  infer_output(api, context, 0, kFloat, dims, names, 2);
  infer_output(api, context, 1, kInt32, dims, names, 1);
}

}  // namespace

const Entry kShortlistLogits = entry_of<ShortlistLogits>();

}  // namespace shadowllm
