#include "driver.hpp"

#include <dlfcn.h>

#include "kernel_program.hpp"

namespace shadowllm {
namespace {

template <class F>
void find(void* library, const char* name, F*& function) {
  function = reinterpret_cast<F*>(dlsym(library, name));
  if (function == nullptr) throw Error(std::string("libcuda.so.1 lacks ") + name);
}

Driver load() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  if (library == nullptr) throw Error("there is no CUDA driver: libcuda.so.1 cannot be loaded");
  Driver found{};
  find(library, "cuCtxGetCurrent", found.cuCtxGetCurrent);
  find(library, "cuCtxGetDevice", found.cuCtxGetDevice);
  find(library, "cuDeviceGetAttribute", found.cuDeviceGetAttribute);
  find(library, "cuModuleLoadData", found.cuModuleLoadData);
  find(library, "cuModuleGetFunction", found.cuModuleGetFunction);
  find(library, "cuFuncSetAttribute", found.cuFuncSetAttribute);
  find(library, "cuLaunchKernel", found.cuLaunchKernel);
  find(library, "cuLaunchKernelEx", found.cuLaunchKernelEx);
  find(library, "cuGetErrorName", found.cuGetErrorName);
  return found;
}

}  // namespace

void Driver::check(int status) const {
  if (status == 0) return;
  const char* name = nullptr;
  if (cuGetErrorName(status, &name) != 0 || name == nullptr) name = "an error without a name";
  throw Error(std::string("CUDA driver: ") + name);
}

const Driver& driver() {
  static const Driver found = load();
  return found;
}

}  // namespace shadowllm
