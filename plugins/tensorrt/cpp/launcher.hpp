// Runs a program through the CUDA driver; ../launcher.py does the same in Python.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "driver.hpp"
#include "kernel_program.hpp"

namespace shadowllm {

// A kernel loaded in a CUDA context: the driver's handle, and what its image says.
struct Loaded {
  Function function;
  unsigned shared_bytes;
  bool waits;
};

class Launcher {
 public:
  explicit Launcher(std::string packed) : program(std::move(packed)) {}

  // Loads the kernels into the thread's current CUDA context. This may wait for the device, which is not allowed during
  // the capture of a stream. Throws an Error if a kernel has no image for the GPU, or the driver refuses one.
  const std::vector<Loaded>& load();

  // Runs the launches of one call. `dims` is the shape of input 0, which starts with batch and seqlen. The pointers are
  // device addresses. Throws an Error if no plan covers the call, an address is not aligned, or the driver fails.
  void run(const int64_t* dims, int rank, const void* const* inputs, void* const* outputs, void* workspace,
           Stream stream);

  const Program program;

 private:
  void check_addresses(const void* const* inputs, void* const* outputs) const;

  std::mutex mutex_;
  std::map<Context, std::vector<Loaded>> loaded_;
};

// Batch and seqlen of a call from the shape of input 0.
struct CallSize {
  CallSize(const int64_t* dims, int rank) : batch(rank > 0 ? dims[0] : 1), seqlen(rank > 2 ? dims[1] : 1) {}
  int64_t batch, seqlen;
};

}  // namespace shadowllm
