#define SHADOWLLM_VECTOR_BYTES 32
#include "kernels.hpp"

namespace shadowllm {
extern const Kernels kAvx2Kernels = SHADOWLLM_KERNELS("avx2");
}
