// The activation that a node names.
#pragma once

#include "op.hpp"

namespace shadowllm {

inline Activation parse_activation(const Node& node) {
  constexpr const char* kNames[] = {"relu", "relu2", "fatrelu", "drelu", "silu", "gelu", "gelu_tanh", "quick_gelu"};
  const std::string name = node.text("activation");
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (name == kNames[i]) return {static_cast<Activation::Kind>(i), node.real_or("threshold", 0)};
  node.fail("activation '" + name + "' is not supported");
}

}  // namespace shadowllm
