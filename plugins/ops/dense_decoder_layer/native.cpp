// DenseDecoderLayer: a layer whose MLP is DenseMLP.
#include "layer.hpp"

namespace shadowllm {
namespace {

constexpr Port kMlpPorts[] = {
    {"mlp_x", kFloat, kOptional},         {"mlp_up_w", kUInt8, kRequired},      {"mlp_up_copy", kUInt8, kRequired},
    {"mlp_up_scales", kFloat, kRequired}, {"mlp_up_bias", kFloat, kOptional},   {"mlp_down_x", kFloat, kOptional},
    {"mlp_down_w", kUInt8, kRequired},    {"mlp_down_copy", kUInt8, kRequired}, {"mlp_down_scales", kFloat, kRequired},
    {"mlp_down_bias", kFloat, kOptional},
};

struct Op {
  static constexpr const char* kName = "DenseDecoderLayer";
  static constexpr bool kHasLayer = false;
  static constexpr bool kTiled = false;  // it is for prompts, and their rows are unpacked once for many tokens
  static constexpr auto kPorts = with_layer_ports(kMlpPorts);
  static constexpr Port kOutputs[] = {
      {"y", kFloat, kRequired}, {"key", kFloat, kOptional}, {"value", kFloat, kOptional}};
  static std::unique_ptr<Part> mlp(const Api& api, const OrtKernelInfo* info, size_t first) {
    return dense_mlp_part(api, info, first);
  }
};

}  // namespace

const Entry kDenseDecoderLayer = entry_of<Layer<Op>>();

}  // namespace shadowllm
