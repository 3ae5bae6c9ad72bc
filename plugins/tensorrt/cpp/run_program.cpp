// Runs one call of a program, for programs that have no engine: benchmarks/gpu/programs.py loads this with ctypes.
#include <algorithm>
#include <cstring>
#include <memory>

#include "launcher.hpp"

namespace {

// Kept, so that a call under capture loads nothing.
shadowllm::Launcher& launcher_of(std::string packed) {
  static std::mutex mutex;
  static std::map<std::string, std::unique_ptr<shadowllm::Launcher>> made;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& found = made[packed];
  if (found == nullptr) found = std::make_unique<shadowllm::Launcher>(std::move(packed));
  return *found;
}

}  // namespace

// Launches a packed program on a stream. `dims` is the shape of input 0. Returns 0, or -1 with a message in `error`.
extern "C" __attribute__((visibility("default"))) int shadowllm_run_program(
    const char* packed, int64_t size, const int64_t* dims, int rank, const void* const* inputs, void* const* outputs,
    void* workspace, void* stream, char* error, int64_t error_size) noexcept {
  try {
    launcher_of(std::string(packed, size_t(size)))
        .run(dims, rank, inputs, outputs, workspace, static_cast<shadowllm::Stream>(stream));
    return 0;
  } catch (const std::exception& caught) {
    std::strncpy(error, caught.what(), size_t(std::max<int64_t>(error_size, 1)) - 1);
  }
  return -1;
}
