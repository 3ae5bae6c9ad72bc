// SelectTopK: finds the smallest selected score of each row, then reads the row once, in order.
#include <algorithm>
#include <cmath>

#include "op.hpp"

namespace shadowllm {
namespace {

enum Input { kScores, kCounts };

// An integer with the same order as the score. Both zeros are equal, and a NaN is below everything.
int32_t sortable(float score) {
  const float positive_zero = score + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &positive_zero, sizeof bits);
  return std::isnan(score) ? INT32_MIN : bits ^ (bits >> 31 & INT32_MAX);
}

struct Threshold {
  int32_t key;  // the smallest selected key
  size_t ties;  // how many keys equal to it are selected
};

// The k-th largest of n keys, k in 1..n. Finds its bits from the top; each bit needs one count, fast with vectors.
Threshold kth_largest(const Kernels& kernels, const int32_t* keys, size_t n, size_t k) {
  uint32_t found = 0;  // distance from the smallest int32
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t higher = found | 1u << bit;
    const size_t count = kernels.count_above(keys, n, static_cast<int32_t>((higher - 1) ^ 0x80000000u));
    if (count >= k) found = higher;
    if (count == k) break;
  }
  const int32_t key = static_cast<int32_t>(found ^ 0x80000000u);
  return {key, k - kernels.count_above(keys, n, key)};
}

void select(const Kernels& kernels, const float* scores, size_t n, size_t k, int32_t* keys, int32_t* out) {
  if (k == 0) return;
  for (size_t i = 0; i < n; ++i) keys[i] = sortable(scores[i]);
  Threshold threshold = kth_largest(kernels, keys, n, k);
  size_t filled = 0;
  for (size_t i = 0; i < n && filled < k; ++i) {
    // No branch on the data, because the CPU cannot predict which unit is selected.
    const bool tie = (keys[i] == threshold.key) & (threshold.ties > 0);
    out[filled] = static_cast<int32_t>(i);
    filled += (keys[i] > threshold.key) | tie;
    threshold.ties -= tie;
  }
}

class SelectTopK {
 public:
  static constexpr const char* kName = "SelectTopK";
  static constexpr int kOutputType = kInt32;
  static constexpr Port kPorts[] = {{"scores", kFloat, kRequired}, {"counts", kInt32, kRequired}};

  SelectTopK(const Api& api, const OrtKernelInfo* info)
      : api_(api), node_(api, info, kName, kPorts, std::size(kPorts), false), kernels_(choose_kernels()),
        cap_(node_.integer("cap")) {
    node_.bound("cap", cap_, 0, INT32_MAX);
  }

  static void infer(const Api& api, OrtShapeInferContext* context);

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = node_.inputs(context);
    const Tensor& scores = in[kScores];
    if (scores.rank != 2) node_.fail("scores has " + std::to_string(scores.rank) + " dimensions, not 2");
    const int64_t rows = scores.dims[0], n = scores.dims[1];
    node_.expect(in, kCounts, {rows});
    const int32_t* counts = in[kCounts].as<int32_t>();
    for (int64_t r = 0; r < rows; ++r)
      node_.bound("row " + std::to_string(r) + " count", counts[r], 0, std::min(cap_, n));
    const Tensor out = node_.output(context, {rows, cap_});
    int32_t* indices = static_cast<int32_t*>(out.data);
    std::fill(indices, indices + out.size(), -1);
    const size_t tasks = std::min<size_t>(rows, 12), keys = static_cast<size_t>(n);
    Scratch scratch;
    int32_t* memory = reinterpret_cast<int32_t*>(scratch.take(tasks * keys));
    Pool(api_, context).run(tasks, [&](size_t task) {
      for (size_t r = task; r < static_cast<size_t>(rows); r += tasks)
        select(kernels_, scores.as<float>() + r * n, n, counts[r], memory + task * keys, indices + r * cap_);
    });
  }

 private:
  const Api& api_;
  Node node_;
  const Kernels& kernels_;
  int64_t cap_;
};

void SelectTopK::infer(const Api& api, OrtShapeInferContext* context) {
  OrtTensorTypeAndShapeInfo* scores = nullptr;  // owned by the context
  api.check(api.shape_infer_get_input(context, 0, &scores));
  size_t rank = 0, size = 0;
  api.check(api.get_dimensions_count(scores, &rank));
  if (rank != 2) return;
  int64_t dims[2], cap = 0;
  const char* names[2] = {};
  api.check(api.get_dimensions(scores, dims, 2));
  api.check(api.get_symbolic_dimensions(scores, names, 2));
  const OrtOpAttr* attribute = nullptr;
  api.check(api.shape_infer_get_attribute(context, "cap", &attribute));
  api.check(api.read_op_attribute(attribute, kAttributeInt, &cap, sizeof cap, &size));
  dims[1] = cap;
  names[1] = "";
  OrtTensorTypeAndShapeInfo* shape = nullptr;
  api.check(api.create_tensor_type_and_shape_info(&shape));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api.release_tensor_type_and_shape_info)> owner(
      shape, api.release_tensor_type_and_shape_info);
  api.check(api.set_tensor_element_type(shape, kInt32));
  api.check(api.set_dimensions(shape, dims, 2));
  api.check(api.set_symbolic_dimensions(shape, names, 2));
  api.check(api.shape_infer_set_output(context, 0, shape));
}

}  // namespace

const Entry kSelectTopK = entry_of<SelectTopK>();

}  // namespace shadowllm
