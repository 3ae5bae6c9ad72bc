// The part of ONNX Runtime's C API that the ops use, declared by hand because the Python wheel has no headers.
//
// `OrtApi` is a table of function pointers that only grows at its end, so a function keeps its slot in every later
// release. Slots 0..101 are from API version 1, slot 249 is from version 15, slots 268..274 are from version 17, and
// slot 414 is from version 24, which we request. `OrtCustomOp` also grows at its end, and its `version` field tells the
// runtime where ours ends. A wrong slot would call another function, so `Api` checks some slots when it is created, and
// the tests run every op.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;
struct OrtOpAttr;
struct OrtCustomOp;
using OrtApi = void (*const)();  // the first slot of the table

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // null, and a line on stderr, if the runtime is too old
  const char* (*GetVersionString)();
};

namespace shadowllm {

constexpr uint32_t kApiVersion = 24;
constexpr uint32_t kOpVersion = 17;  // of OrtCustomOp

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kUndefined = 0, kFloat = 1, kUInt8 = 2, kInt32 = 6, kFloat16 = 10, kBFloat16 = 16 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum AttributeType : int { kAttributeInt = 1 };

}  // namespace shadowllm

// Fields in the runtime's order, up to kOpVersion. The runtime calls GetInputMemoryType and the characteristics without
// a null check; CreateKernel and KernelCompute are not called when their V2 is set.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};

namespace shadowllm {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The functions of the table that we use, each bound to its slot.
class Api {
 public:
  // Throws Error if a slot does not hold the expected function.
  explicit Api(const OrtApi* table) : table_(table) {
    bind(0, create_status);
    bind(1, get_error_code);
    bind(2, get_error_message);
    bind(26, create_custom_op_domain);
    bind(27, custom_op_domain_add);
    bind(28, add_custom_op_domain);
    bind(51, get_tensor_mutable_data);
    bind(57, create_tensor_type_and_shape_info);
    bind(58, set_tensor_element_type);
    bind(59, set_dimensions);
    bind(60, get_tensor_element_type);
    bind(61, get_dimensions_count);
    bind(62, get_dimensions);
    bind(63, get_symbolic_dimensions);
    bind(85, kernel_info_get_attribute_float);
    bind(86, kernel_info_get_attribute_int64);
    bind(87, kernel_info_get_attribute_string);
    bind(88, kernel_context_get_input_count);
    bind(89, kernel_context_get_output_count);
    bind(90, kernel_context_get_input);
    bind(91, kernel_context_get_output);
    bind(93, release_status);
    bind(99, release_tensor_type_and_shape_info);
    bind(101, release_custom_op_domain);
    bind(249, kernel_info_get_constant_input);
    bind(268, shape_infer_get_input);
    bind(269, shape_infer_get_attribute);
    bind(270, shape_infer_set_output);
    bind(271, set_symbolic_dimensions);
    bind(272, read_op_attribute);
    bind(274, parallel_for);
    bind(414, get_type_and_shape);
    prove_slots();
  }

  const OrtApi* table() const { return table_; }

  void check(OrtStatus* status) const {
    if (status == nullptr) return;
    const std::string message = get_error_message(status);
    release_status(status);
    throw Error(message);
  }

  OrtStatus* (*create_status)(int code, const char* message);
  int (*get_error_code)(const OrtStatus*);
  const char* (*get_error_message)(const OrtStatus*);
  OrtStatus* (*create_custom_op_domain)(const char* domain, OrtCustomOpDomain** out);
  OrtStatus* (*custom_op_domain_add)(OrtCustomOpDomain*, const OrtCustomOp*);
  OrtStatus* (*add_custom_op_domain)(OrtSessionOptions*, OrtCustomOpDomain*);
  OrtStatus* (*get_tensor_mutable_data)(OrtValue*, void** out);
  OrtStatus* (*create_tensor_type_and_shape_info)(OrtTensorTypeAndShapeInfo** out);
  OrtStatus* (*set_tensor_element_type)(OrtTensorTypeAndShapeInfo*, int type);
  OrtStatus* (*set_dimensions)(OrtTensorTypeAndShapeInfo*, const int64_t* dims, size_t rank);
  OrtStatus* (*get_tensor_element_type)(const OrtTensorTypeAndShapeInfo*, int* out);
  OrtStatus* (*get_dimensions_count)(const OrtTensorTypeAndShapeInfo*, size_t* out);
  OrtStatus* (*get_dimensions)(const OrtTensorTypeAndShapeInfo*, int64_t* dims, size_t rank);
  OrtStatus* (*get_symbolic_dimensions)(const OrtTensorTypeAndShapeInfo*, const char** names, size_t rank);
  OrtStatus* (*kernel_info_get_attribute_float)(const OrtKernelInfo*, const char* name, float* out);
  OrtStatus* (*kernel_info_get_attribute_int64)(const OrtKernelInfo*, const char* name, int64_t* out);
  OrtStatus* (*kernel_info_get_attribute_string)(const OrtKernelInfo*, const char* name, char* out, size_t* size);
  OrtStatus* (*kernel_context_get_input_count)(const OrtKernelContext*, size_t* out);
  OrtStatus* (*kernel_context_get_output_count)(const OrtKernelContext*, size_t* out);
  OrtStatus* (*kernel_context_get_input)(const OrtKernelContext*, size_t index, const OrtValue** out);
  OrtStatus* (*kernel_context_get_output)(OrtKernelContext*, size_t index, const int64_t* dims, size_t rank,
                                          OrtValue** out);
  void (*release_status)(OrtStatus*);
  void (*release_tensor_type_and_shape_info)(OrtTensorTypeAndShapeInfo*);
  void (*release_custom_op_domain)(OrtCustomOpDomain*);
  OrtStatus* (*kernel_info_get_constant_input)(const OrtKernelInfo*, size_t index, int* is_constant,
                                               const OrtValue** out);
  OrtStatus* (*shape_infer_get_input)(const OrtShapeInferContext*, size_t index, OrtTensorTypeAndShapeInfo** out);
  OrtStatus* (*shape_infer_get_attribute)(const OrtShapeInferContext*, const char* name, const OrtOpAttr** out);
  OrtStatus* (*shape_infer_set_output)(const OrtShapeInferContext*, size_t index, const OrtTensorTypeAndShapeInfo*);
  OrtStatus* (*set_symbolic_dimensions)(OrtTensorTypeAndShapeInfo*, const char** names, size_t rank);
  OrtStatus* (*read_op_attribute)(const OrtOpAttr*, int type, void* data, size_t size, size_t* out);
  OrtStatus* (*get_type_and_shape)(const OrtValue*, int* type, const int64_t** dims, size_t* rank);  // no copies
  OrtStatus* (*parallel_for)(const OrtKernelContext*, void (*run)(void*, size_t), size_t total, size_t batches, void*);

 private:
  template <class Function>
  void bind(size_t slot, Function*& function) {
    function = reinterpret_cast<Function*>(table_[slot]);
  }

  void prove_slots() const {
    const char* text = "shadowllm";
    OrtStatus* status = create_status(kInvalidArgument, text);
    bool good = get_error_code(status) == kInvalidArgument && std::strcmp(get_error_message(status), text) == 0;
    release_status(status);
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(create_tensor_type_and_shape_info(&info));
    const int64_t dims[3] = {2, 3, 5};
    int64_t seen[3] = {};
    size_t rank = 0;
    int type = 0;
    check(set_tensor_element_type(info, kInt32));
    check(set_dimensions(info, dims, 3));
    check(get_tensor_element_type(info, &type));
    check(get_dimensions_count(info, &rank));
    check(get_dimensions(info, seen, 3));
    release_tensor_type_and_shape_info(info);
    good = good && type == kInt32 && rank == 3 && std::memcmp(dims, seen, sizeof dims) == 0;
    if (!good) throw Error("this ONNX Runtime's C API table is not laid out as API version 24");
  }

  const OrtApi* table_;
};

}  // namespace shadowllm
