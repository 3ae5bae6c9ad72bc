// A custom op as a TensorRT plugin, which interprets the program in its only field. ../creators.py does the same in
// Python. TensorRT's interfaces are noexcept, so no exception leaves a method.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>

#include "launcher.hpp"

namespace shadowllm {

constexpr const char* kDomain = "shadowllm";
constexpr const char* kVersion = "1";
constexpr const char* kField = "program";

// Writes to TensorRT's logger, or to stderr if there is none.
void log_error(const std::string& message) noexcept;

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  // Copies of a plugin share their launcher, which has no stream of its own.
  Plugin(std::string op, std::shared_ptr<Launcher> launcher);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return op_.c_str(); }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kDomain; }

  int32_t getNbOutputs() const noexcept override { return int32_t(launcher_->program.outputs.size()); }
  int32_t getOutputDataTypes(nvinfer1::DataType* types, int32_t count, const nvinfer1::DataType* inputs,
                             int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc*, int32_t, const nvinfer1::DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    return size_t(launcher_->program.workspace_bytes());
  }

  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &fields_; }
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override;
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc*, int32_t, const nvinfer1::PluginTensorDesc*,
                        int32_t) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*, const void* const* read,
                  void* const* written, void* workspace, cudaStream_t stream) noexcept override;

 private:
  std::string op_;
  std::shared_ptr<Launcher> launcher_;
  nvinfer1::PluginField field_;
  nvinfer1::PluginFieldCollection fields_;
};

}  // namespace shadowllm
