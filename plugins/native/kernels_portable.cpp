#define SHADOWLLM_VECTOR_BYTES 16
#include "kernels.hpp"

namespace shadowllm {
extern const Kernels kPortableKernels = SHADOWLLM_KERNELS("portable");
}
