// The CUDA driver, loaded at its first use. So this library can be loaded, and build engines, without a GPU.
#pragma once

#include <cstdint>
#include <string>

namespace shadowllm {

// Handles of the driver's API.
using Context = struct CUctx_st*;
using Module = struct CUmod_st*;
using Function = struct CUfunc_st*;
using Stream = struct CUstream_st*;

// A launch with attributes, in the layout of CUlaunchAttribute and CUlaunchConfig.
struct LaunchAttribute {
  int id, padding;
  union {
    int programmatic_stream_serialization;
    uint64_t bytes[8];
  };
};

struct LaunchConfig {
  unsigned grid[3], block[3], shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "the layout is not that of CUDA");

// The driver's functions under their own names. Comments at the constants give their names in CUDA's headers.
struct Driver {
  int (*cuCtxGetCurrent)(Context*);
  int (*cuCtxGetDevice)(int*);
  int (*cuDeviceGetAttribute)(int*, int attribute, int device);
  int (*cuModuleLoadData)(Module*, const void* image);
  int (*cuModuleGetFunction)(Function*, Module, const char* name);
  int (*cuFuncSetAttribute)(Function, int attribute, int value);
  int (*cuLaunchKernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared_bytes,
                        Stream, void** parameters, void** extra);
  int (*cuLaunchKernelEx)(const LaunchConfig*, Function, void** parameters, void** extra);
  int (*cuGetErrorName)(int, const char**);

  // Throws an Error unless the status is success.
  void check(int status) const;
};

constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
constexpr int kProgrammaticStreamSerialization = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
constexpr int kMaxDynamicSharedBytes = 8;            // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

// The driver of this machine. Throws an Error if there is none.
const Driver& driver();

}  // namespace shadowllm
