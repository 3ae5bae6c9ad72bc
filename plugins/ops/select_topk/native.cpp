// SelectTopK: each row of scores is a task.
#include <algorithm>

#include "largest.hpp"
#include "op.hpp"

namespace shadowllm {
namespace {

enum Input { kScores, kCounts };

class SelectTopK {
 public:
  static constexpr const char* kName = "SelectTopK";
  static constexpr Port kPorts[] = {{"scores", kFloat, kRequired}, {"counts", kInt32, kRequired}};
  static constexpr Port kOutputs[] = {{"indices", kInt32, kRequired}};

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
        select_largest(kernels_, scores.as<float>() + r * n, n, counts[r], memory + task * keys, indices + r * cap_);
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
  infer_output(api, context, 0, kInt32, dims, names, 2);
}

}  // namespace

const Entry kSelectTopK = entry_of<SelectTopK>();

}  // namespace shadowllm
