// DecoderLayer: a layer whose MLP is SparseMLP.
#include "layer.hpp"

namespace shadowllm {
namespace {

constexpr Port kMlpPorts[] = {
    {"mlp_x", kFloat, kOptional},          {"mlp_indices", kInt32, kOptional},    {"mlp_count", kInt32, kRequired},
    {"mlp_w_gate", kUndefined, kOptional}, {"mlp_b_gate", kUndefined, kOptional}, {"mlp_w_up", kUndefined, kRequired},
    {"mlp_b_up", kUndefined, kOptional},   {"mlp_w_down", kUndefined, kRequired}, {"mlp_b_down", kUndefined, kOptional},
    {"mlp_s_gate", kFloat, kOptional},     {"mlp_s_up", kFloat, kOptional},       {"mlp_s_down", kFloat, kOptional},
    {"mlp_rest", kInt32, kOptional},       {"mlp_c_gate", kUInt8, kOptional},     {"mlp_c_up", kUInt8, kOptional},
    {"mlp_c_down", kUInt8, kOptional},     {"mlp_cs_gate", kFloat, kOptional},    {"mlp_cs_up", kFloat, kOptional},
    {"mlp_cs_down", kFloat, kOptional},    {"mlp_down_norms", kFloat, kOptional},
};

struct Op {
  static constexpr const char* kName = "DecoderLayer";
  static constexpr bool kHasLayer = true;
  static constexpr bool kTiled = true;
  static constexpr auto kPorts = with_layer_ports(kMlpPorts);
  static constexpr Port kOutputs[] = {{"y", kFloat, kRequired},
                                      {"key", kFloat, kOptional},
                                      {"value", kFloat, kOptional},
                                      {"chosen", kInt32, kOptional}};
  static std::unique_ptr<Part> mlp(const Api& api, const OrtKernelInfo* info, size_t first) {
    return sparse_mlp_part(api, info, first);
  }
};

}  // namespace

const Entry kDecoderLayer = entry_of<Layer<Op>>();

}  // namespace shadowllm
