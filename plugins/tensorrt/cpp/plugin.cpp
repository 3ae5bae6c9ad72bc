#include "plugin.hpp"

using namespace nvinfer1;

namespace shadowllm {
namespace {

// Runs `body` and returns 0. If it throws, logs the error and returns -1, which is failure for TensorRT.
template <class Body>
int32_t guarded(const std::string& op, Body body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    log_error(op + ": " + error.what());
  } catch (...) {
    log_error(op + ": unknown C++ exception");
  }
  return -1;
}

}  // namespace

Plugin::Plugin(std::string op, std::shared_ptr<Launcher> launcher)
    : op_(std::move(op)), launcher_(std::move(launcher)),
      field_(kField, launcher_->program.packed().data(), PluginFieldType::kCHAR,
             int32_t(launcher_->program.packed().size())),
      fields_{1, &field_} {}

IPluginCapability* Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

IPluginV3* Plugin::clone() noexcept {
  IPluginV3* copy = nullptr;
  guarded(op_, [&] { copy = new Plugin(op_, launcher_); });
  return copy;
}

int32_t Plugin::getOutputDataTypes(DataType* types, int32_t count, const DataType*, int32_t) const noexcept {
  for (int32_t i = 0; i < count; ++i) types[i] = DataType(launcher_->program.outputs[size_t(i)].dtype);
  return 0;
}

int32_t Plugin::getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*, int32_t,
                                DimsExprs* outputs, int32_t count, IExprBuilder& builder) noexcept {
  return guarded(op_, [&] {
    for (int32_t i = 0; i < count; ++i) {
      const std::vector<Dimension>& shape = launcher_->program.outputs.at(size_t(i)).shape;
      outputs[i].nbDims = int32_t(shape.size());
      for (size_t axis = 0; axis < shape.size(); ++axis) {
        const Dimension& dim = shape[axis];
        if (dim.input >= input_count || (dim.input >= 0 && dim.value >= inputs[dim.input].nbDims))
          throw Error("an input is missing, or has too few dimensions");
        outputs[i].d[axis] = dim.input < 0 ? builder.constant(dim.value) : inputs[dim.input].d[dim.value];
      }
    }
  });
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t input_count,
                                       int32_t) noexcept {
  const Program& program = launcher_->program;
  const PluginTensorDesc& tensor = tensors[position].desc;
  return size_t(input_count) == program.inputs.size() && tensor.format == TensorFormat::kLINEAR &&
         int64_t(tensor.type) == program.dtype(size_t(position));
}

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                const DynamicPluginTensorDesc*, int32_t) noexcept {
  return guarded(op_, [&] {
    const size_t expected = launcher_->program.inputs.size();
    if (size_t(input_count) != expected)
      throw Error("has " + std::to_string(input_count) + " inputs, expected " + std::to_string(expected));
    const CallSize largest(inputs[0].max.d, inputs[0].max.nbDims);
    launcher_->program.plan(largest.batch, largest.seqlen);
  });
}

IPluginV3* Plugin::attachToContext(IPluginResourceContext*) noexcept {
  return guarded(op_, [&] { launcher_->load(); }) == 0 ? clone() : nullptr;
}

// A builder times plugins without a context that they are attached to, and may capture the timed run.
int32_t Plugin::onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*, int32_t) noexcept {
  return guarded(op_, [&] { launcher_->load(); });
}

int32_t Plugin::enqueue(const PluginTensorDesc* inputs, const PluginTensorDesc*, const void* const* read,
                        void* const* written, void* workspace, cudaStream_t stream) noexcept {
  return guarded(op_,
                 [&] { launcher_->run(inputs[0].dims.d, inputs[0].dims.nbDims, read, written, workspace, stream); });
}

}  // namespace shadowllm
