// Chooses the kernels, once per op: the best that the CPU can run, or those that SHADOWLLM_NATIVE_ISA names.
#include <cstdlib>
#include <string>
#include <vector>

#include "ort_api.hpp"
#include "rows.hpp"

namespace shadowllm {
namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(&kAvx512VnniKernels);
  if (avx2 && avx512) found.push_back(&kAvx512Kernels);
  if (avx2) found.push_back(&kAvx2Kernels);
#endif
  found.push_back(&kPortableKernels);
  return found;
}

std::string joined() {
  std::string names;
  for (const Kernels* kernels : supported()) names += (names.empty() ? "" : ",") + std::string(kernels->name);
  return names;
}

}  // namespace

const char* supported_kernels() {
  static const std::string names = joined();
  return names.c_str();
}

const Kernels& choose_kernels() {
  const char* wanted = std::getenv("SHADOWLLM_NATIVE_ISA");
  const std::vector<const Kernels*> found = supported();
  if (wanted == nullptr || *wanted == '\0') return *found.front();
  for (const Kernels* kernels : found)
    if (kernels->name == std::string(wanted)) return *kernels;
  throw Error("SHADOWLLM_NATIVE_ISA is '" + std::string(wanted) + "', but this CPU runs " + supported_kernels());
}

}  // namespace shadowllm
