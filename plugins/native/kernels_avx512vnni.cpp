#define SHADOWLLM_VECTOR_BYTES 64
#include "kernels.hpp"

namespace shadowllm {
extern const Kernels kAvx512VnniKernels = SHADOWLLM_KERNELS("avx512vnni");
}
