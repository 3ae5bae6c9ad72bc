// The layer between ONNX Runtime and an op: plain values for attributes, inputs and outputs, statuses, and threads.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "ort_api.hpp"
#include "pool.hpp"
#include "rows.hpp"

namespace shadowllm {

// A tensor of at most four dimensions. If it is absent, data is null and rank is -1.
struct Tensor {
  void* data = nullptr;
  int type = kUndefined;
  int rank = -1;
  std::array<int64_t, 4> dims{};

  bool present() const { return rank >= 0; }
  size_t size() const;
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  // Floats in memory of an op.
  static Tensor matrix(float* data, int64_t rows, int64_t columns) { return {data, kFloat, 2, {rows, columns}}; }
};

// One input or output of an op's signature. Type kUndefined means any weight type.
struct Port {
  const char* name;
  int type;
  Characteristic characteristic;
};

// Rows of integers, each followed by its scales or by rows of other matrices; or tiles.
struct PackedRows {
  PackedRows() = default;
  PackedRows(const PackedRows&) = delete;  // a copy's `data` would point into the original's memory
  PackedRows& operator=(const PackedRows&) = delete;
  PackedRows(PackedRows&&) = default;  // a vector that is moved keeps its memory
  PackedRows& operator=(PackedRows&&) = default;

  // Memory for rows that start at cache lines.
  void reserve(size_t rows, size_t bytes);
  size_t size() const { return memory.size() * sizeof(float); }

  std::vector<float> memory;  // empty if the rows are stored with those of another matrix
  char* data;                 // the first row
  size_t stride;              // bytes
};

// The tiles of rows of this type; see Kernels::write_tiles.
struct Tiles {
  RowType type;
  PackedRows memory;
};

class Outputs;

// A kernel's view of its node: its name for messages, and its constant inputs.
class Node {
 public:
  // The name is the op's name, and the attribute `layer` if the op has one. `first`: the place of its first input among
  // those of the node, if the op is a part of another one.
  Node(const Api& api, const OrtKernelInfo* info, const char* op, const Port* ports, size_t count, bool has_layer,
       size_t first = 0);

  int64_t integer(const char* attribute) const;
  int64_t integer_or(const char* attribute, int64_t otherwise) const;
  float real_or(const char* attribute, float otherwise) const;
  std::string text(const char* attribute) const;

  // Inputs of this call. Constant initializers were looked up once, at creation.
  std::vector<Tensor> inputs(const OrtKernelContext* context) const;
  bool is_constant(size_t port) const { return constants_[port].present(); }
  const Tensor& constant(size_t port) const { return constants_[port]; }  // absent if it is no constant
  Tensor output(OrtKernelContext* context, std::initializer_list<int64_t> dims) const;
  // An output that the node may lack; then the tensor is absent.
  Tensor optional_output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank) const;
  Tensor optional_output(OrtKernelContext* context, size_t index, std::initializer_list<int64_t> dims) const {
    return optional_output(context, index, dims.begin(), dims.size());
  }
  Tensor output_like(OrtKernelContext* context, const Tensor& tensor) const;

  // Throws an Error that starts with the op and its layer.
  [[noreturn]] void fail(const std::string& problem) const { throw Error(name_ + ": " + problem); }
  // Throws unless the tensor, if present, has these dimensions.
  void expect(const std::vector<Tensor>& inputs, size_t port, std::initializer_list<int64_t> dims) const;
  // The last dimension of hidden states (batch, seqlen, width) or (batch * seqlen, width); throws on any other rank.
  int64_t width_of(const Tensor& x) const;
  // Throws unless value is in low..high. The message has `what`, the value and the bounds.
  void bound(const std::string& what, int64_t value, int64_t low, int64_t high) const;
  // Copies a constant matrix of integers so that every row starts at a cache line and is followed by its scales. A
  // random row is then one stretch of memory instead of two. Does nothing for any other input.
  void pack(size_t port, size_t scales_port);
  // Copies constant matrices of residuals so that row i of all of them is one record, which starts at a cache line.
  // Does nothing unless all that are present are such matrices.
  void pack_records(std::initializer_list<std::pair<size_t, size_t>> ports_and_scales);
  // Copies constant scales of a `copy` as bfloat16, which is half as much to read. Kernels that round the factor need
  // them in this form. Does nothing if a scale has more digits.
  void shorten(std::initializer_list<size_t> scales_ports);
  // Copies the rows of a constant low-bit copy as tiles, or those of nested integers, if residuals are given. `copy` or
  // `nested` then gives them. Does nothing unless the kernels read such rows in tiles, and the scales were shortened.
  void tile(const Kernels& kernels, size_t copy_port, size_t scales_port,
            std::optional<size_t> residual_port = std::nullopt);
  // What a pass over all rows of a constant copy reads first; nothing if it is no constant.
  Bytes first_bytes(size_t copy_port) const;
  // How many selections a sparse op is given: one for all tokens, or one for each sequence. Throws if `count` has
  // another number of elements. `x` has as many tokens for each selection.
  size_t selections(const Tensor& count, const Tensor& x) const;
  // An input with one number for each selection, or one for all. Throws if it has another number of elements.
  void expect_one_each(const std::vector<Tensor>& inputs, size_t port, size_t selections) const;
  // The number of a selection in such an input; `otherwise` if it is absent.
  static int32_t number(const Tensor& tensor, size_t selection, int32_t otherwise = 0) {
    return tensor.present() ? tensor.as<int32_t>()[tensor.size() == 1 ? 0 : selection] : otherwise;
  }
  // The active indices of a selection: its row of `indices` up to its count. Throws unless all are in 0..rows-1.
  Picks active(const Tensor& indices, const Tensor& count, size_t selection, int64_t rows) const;
  // The output `chosen`: (width), or (selections, width) if `count` has a dimension. Absent if the node lacks it.
  Tensor chosen_output(const Outputs& outputs, const Tensor& count, int64_t width) const;
  // A weight matrix (rows, width). Integers come with scales (rows, blocks). Throws if the type is not supported, or if
  // the shapes do not match.
  Rows matrix(const std::vector<Tensor>& inputs, size_t port, size_t scales_port, int64_t rows, int64_t width) const;
  // The low-bit copy (rows, blocks, bytes) of a matrix (rows, width), with scales (rows, blocks). The width of the
  // result is that of whole blocks. Its factor may be rounded if the scales were shortened. Throws if the shapes do not
  // match.
  Rows copy(const std::vector<Tensor>& inputs, size_t port, size_t scales_port, int64_t rows, int64_t width) const;
  // A matrix of nested integers: a copy and the residuals of all its rows, whose shape does not matter. Throws as
  // `copy`, or if there are too few or too many residuals.
  Rows nested(const std::vector<Tensor>& inputs, size_t port, size_t copy_port, size_t scales_port, int64_t rows,
              int64_t width) const;
  // Whether an input holds residuals: integers without scales, that the low-bit copy completes.
  static bool is_residual(const Tensor& weights, const Tensor& scales) {
    return weights.type == kUInt8 && weights.present() && !scales.present();
  }
  // The residuals (rows, bytes) of a copy. Throws if the shape does not match.
  Rows residual(const std::vector<Tensor>& inputs, size_t port, const Rows& copy, int64_t rows) const;
  RowType row_type(const Tensor& tensor, const char* name) const;

 private:
  Tensor view(const OrtValue* value) const;
  void give_tiles(size_t copy_port, Rows& rows) const;

  const Api& api_;
  const OrtKernelInfo* info_;  // valid during creation only
  std::string name_;
  const Port* ports_;
  std::vector<Tensor> constants_;
  std::map<size_t, PackedRows> packed_;
  std::map<size_t, std::vector<uint16_t>> shortened_;  // by the port of the scales
  std::map<size_t, Tiles> tiles_;                      // by the port of the copy
  size_t first_;
  bool exact_copies_ = false;  // the factors of a copy's rows are not rounded to 8 bits; for validation
};

// Where an op writes its results: outputs of the node, or memory if it is a part of another op.
class Outputs {
 public:
  struct Place {
    void* memory;   // null for an output of the node
    size_t output;  // its index
  };

  Outputs(const Node& node, OrtKernelContext* context) : node_(node), context_(context) {}
  // Output i of the op goes to place i. The memory must be large enough.
  Outputs(const Node& node, OrtKernelContext* context, std::vector<Place> places)
      : node_(node), context_(context), places_(std::move(places)) {}
  // The only output of the op goes to memory.
  Outputs(const Node& node, float* memory) : Outputs(node, nullptr, {{memory, 0}}) {}

  // Absent if the node lacks it.
  Tensor get(size_t index, const int64_t* dims, size_t rank) const;
  Tensor get(size_t index, std::initializer_list<int64_t> dims) const { return get(index, dims.begin(), dims.size()); }

 private:
  const Node& node_;
  OrtKernelContext* context_;
  std::vector<Place> places_;
};

// An op as a part of another one.
struct Part {
  virtual ~Part() = default;
  // Weights that it reads first.
  virtual Bytes first_bytes() const = 0;
  virtual std::vector<Tensor> inputs(const OrtKernelContext* context) const = 0;
  virtual void compute(const std::vector<Tensor>& inputs, const Outputs& outputs, const Pool& pool) const = 0;
};

template <class Op>
struct PartOf : Part {
  template <class... Options>
  PartOf(const Api& api, const OrtKernelInfo* info, size_t first, Options... options)
      : op(api, info, first, options...) {}
  Bytes first_bytes() const override { return op.first_bytes(); }
  std::vector<Tensor> inputs(const OrtKernelContext* context) const override { return op.inputs(context); }
  void compute(const std::vector<Tensor>& inputs, const Outputs& outputs, const Pool& pool) const override {
    op.compute(inputs, outputs, pool);
  }
  Op op;
};

// Floats for one call. The memory is kept for the next call of any thread, unless it is more than 64 MB. Nested use
// gets separate memory.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Returns uninitialised memory, aligned to a cache line. Take all that a call needs at once.
  float* take(size_t floats);

 private:
  std::vector<float> memory_;
};

// A range of items that one thread processes at a time.
struct Chunk {
  size_t begin, end;
  size_t size() const { return end - begin; }
};

// Splits items into chunks, which depend on the work and the machine's cores, but not on the session's threads. So
// partial sums are added in the same order with any session options, and results are repeatable bit for bit.
class Chunks {
 public:
  Chunks(size_t items, size_t bytes_each, size_t tokens);
  size_t count() const { return count_; }
  Chunk operator[](size_t i) const;
  // The same number of chunks over other items.
  Chunks of(size_t items) const { return Chunks(items, count_); }

 private:
  Chunks(size_t items, size_t count) : items_(items), count_(count) {}

  size_t items_, count_;
};

// Calls body(part, c) for each chunk c of each of the parts, which have `chunks`. Chunk c of all parts is one task, so
// that what they read together is read from memory once. Each part is computed as it would be alone.
template <class Part, class Body>
void in_chunks(const Pool& pool, const std::vector<Part>& parts, Body body) {
  size_t most = 0;
  for (const Part& part : parts) most = std::max(most, part.chunks.count());
  pool.run(most, [&](size_t c) {
    for (const Part& part : parts)
      if (c < part.chunks.count()) body(part, c);
  });
}

// y[t] = start + sum of parts in order, for tokens rows of width; parts are tokens * width floats each.
void add_up(const Pool& pool, const Kernels& kernels, const float* parts, size_t count, size_t tokens, size_t width,
            const float* start, float* y);

template <class Body>
OrtStatus* guarded(const Api& api, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    return api.create_status(kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return api.create_status(kFail, error.what());
  } catch (...) {
    return api.create_status(kFail, "unknown C++ exception");
  }
}

// Describes Op to the runtime. Op has kName, kPorts, kOutputs, a constructor (api, info), compute(context) and a
// static infer(api, context).
template <class Op>
struct Registration : OrtCustomOp {
  explicit Registration(const Api& api) : OrtCustomOp{}, api(api) {
    version = kOpVersion;
    GetName = [](const OrtCustomOp*) { return Op::kName; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU
    GetInputType = [](const OrtCustomOp*, size_t i) { return Op::kPorts[i].type; };
    GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Op::kPorts); };
    GetOutputType = [](const OrtCustomOp*, size_t i) { return Op::kOutputs[i].type; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Op::kOutputs); };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int { return Op::kPorts[i].characteristic; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) -> int { return Op::kOutputs[i].characteristic; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      const Api& api = static_cast<const Registration*>(self)->api;
      return guarded(api, [&] { *kernel = new Held{api, Op(api, info)}; });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      Held& held = *static_cast<Held*>(kernel);
      return guarded(held.api, [&] { held.op.compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Held*>(kernel); };
    InferOutputShapeFn = [](const OrtCustomOp* self, OrtShapeInferContext* context) {
      const Api& api = static_cast<const Registration*>(self)->api;
      return guarded(api, [&] { Op::infer(api, context); });
    };
    GetStartVersion = GetEndVersion = [](const OrtCustomOp*) { return 1; };
  }

  struct Held {
    const Api& api;
    Op op;
  };
  const Api& api;
};

// Sets type and shape of one output during shape inference; a dimension without a size has a name.
void infer_output(const Api& api, OrtShapeInferContext* context, size_t output, int type, const int64_t* dims,
                  const char** names, size_t rank);

// Shape inference of an output whose dimensions are the first dimensions of some inputs. Does nothing if an input's
// rank is not known.
void infer_rows(const Api& api, OrtShapeInferContext* context, std::initializer_list<size_t> inputs, size_t output,
                int type);

// Shape inference of a float output that has the shape of an input.
void infer_like_input(const Api& api, OrtShapeInferContext* context, size_t input, size_t output);

// An op of this library.
struct Entry {
  const char* name;
  const Port* ports;
  size_t port_count;
  const Port* outputs;
  size_t output_count;
  // A shared pointer, because it keeps the right deleter; OrtCustomOp has no virtual destructor.
  std::shared_ptr<OrtCustomOp> (*make)(const Api& api);
};

template <class Op>
constexpr Entry entry_of() {
  return {Op::kName,
          std::data(Op::kPorts),
          std::size(Op::kPorts),
          std::data(Op::kOutputs),
          std::size(Op::kOutputs),
          [](const Api& api) -> std::shared_ptr<OrtCustomOp> { return std::make_shared<Registration<Op>>(api); }};
}

// Ops that are also parts of another one. `first`: see Node.
std::unique_ptr<Part> nested_linear_part(const Api& api, const OrtKernelInfo* info, size_t first, bool tiled);
std::unique_ptr<Part> cached_attention_part(const Api& api, const OrtKernelInfo* info, size_t first);
std::unique_ptr<Part> sparse_mlp_part(const Api& api, const OrtKernelInfo* info, size_t first);
std::unique_ptr<Part> dense_mlp_part(const Api& api, const OrtKernelInfo* info, size_t first);

// The ops. Each is defined in the native.cpp of its folder.
extern const Entry kSelectTopK;
extern const Entry kSparseMlp;
extern const Entry kSparseAttention;
extern const Entry kShortlistLogits;
extern const Entry kCachedAttention;
extern const Entry kNestedLinear;
extern const Entry kDenseMlp;
extern const Entry kDecoderLayer;
extern const Entry kDenseDecoderLayer;

}  // namespace shadowllm
