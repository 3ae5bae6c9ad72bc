// The functions that TensorRT looks up in the library, and the creators of the plugins.
#include <cstdio>
#include <cstring>
#include <iterator>

#include "plugin.hpp"

using namespace nvinfer1;

namespace shadowllm {
namespace {

ILoggerFinder* logger_finder = nullptr;

class Creator final : public IPluginCreatorV3One {
 public:
  explicit Creator(const char* op) : op_(op) {}

  const char* getPluginName() const noexcept override { return op_; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kDomain; }
  const PluginFieldCollection* getFieldNames() noexcept override { return &fields_; }

  IPluginV3* createPlugin(const char* name, const PluginFieldCollection* fields, TensorRTPhase) noexcept override {
    try {
      return create(fields);
    } catch (const std::exception& error) {
      log_error(std::string(op_) + " " + (name ? name : "") + ": " + error.what());
    } catch (...) {
      log_error(std::string(op_) + ": unknown C++ exception");
    }
    return nullptr;
  }

 private:
  IPluginV3* create(const PluginFieldCollection* fields) const {
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
      const PluginField& field = fields->fields[i];
      if (std::strcmp(field.name, kField) == 0 && field.data != nullptr && field.length > 0) {
        std::string packed(static_cast<const char*>(field.data), size_t(field.length));
        return new Plugin(op_, std::make_shared<Launcher>(std::move(packed)));
      }
    }
    throw Error("carries no program: build engines with `shadowllm build`");
  }

  const char* op_;
  PluginField field_{kField, nullptr, PluginFieldType::kCHAR, 0};
  PluginFieldCollection fields_{1, &field_};
};

}  // namespace

void log_error(const std::string& message) noexcept {
  ILogger* logger = nullptr;
  try {
    if (logger_finder != nullptr) logger = logger_finder->findLogger();
  } catch (...) {  // without a logger, stderr is used
  }
  if (logger != nullptr)
    logger->log(ILogger::Severity::kERROR, message.c_str());
  else
    std::fprintf(stderr, "shadowllm plugins: %s\n", message.c_str());
}

}  // namespace shadowllm

#define SHADOWLLM_EXPORT extern "C" __attribute__((visibility("default")))

SHADOWLLM_EXPORT void setLoggerFinder(ILoggerFinder* finder) { shadowllm::logger_finder = finder; }

SHADOWLLM_EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static shadowllm::Creator top("SelectTopK"), scores("ScoreNeurons"), mlp("SparseMLP"), attention("SparseAttention"),
      logits("ShortlistLogits"), linear("NestedLinear"), gather("NestedGather");
  static IPluginCreatorInterface* const creators[] = {&top, &scores, &mlp, &attention, &logits, &linear, &gather};
  count = std::size(creators);
  return creators;
}
