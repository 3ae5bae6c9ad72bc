#include "launcher.hpp"

namespace shadowllm {
namespace {

// Dynamic shared memory that a kernel may use without a setting that allows more.
constexpr int64_t kUsualSharedBytes = 48 * 1024;

int64_t capability() {
  const Driver& cuda = driver();
  int device = 0, major = 0, minor = 0;
  cuda.check(cuda.cuCtxGetDevice(&device));
  cuda.check(cuda.cuDeviceGetAttribute(&major, kComputeCapabilityMajor, device));
  cuda.check(cuda.cuDeviceGetAttribute(&minor, kComputeCapabilityMinor, device));
  return 10 * major + minor;
}

// What the driver says about an image that is newer than itself: CUDA_ERROR_INVALID_IMAGE, _NO_BINARY_FOR_GPU and
// _UNSUPPORTED_PTX_VERSION.
bool unknown_image(int status) { return status == 200 || status == 209 || status == 222; }

// Modules are loaded once per context and image and never unloaded, because the layers of a model share kernels. A
// module is null if the driver is too old for the image's format.
Module module_of(Context context, std::string image) {
  static std::mutex mutex;
  static std::map<std::pair<Context, std::string>, Module> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = loaded.find({context, image});
  if (known != loaded.end()) return known->second;
  Module found = nullptr;
  // PTX must end with a zero byte, which c_str() provides.
  const int status = driver().cuModuleLoadData(&found, image.c_str());
  if (unknown_image(status))
    found = nullptr;
  else
    driver().check(status);
  return loaded[{context, std::move(image)}] = found;
}

std::string carried(const Kernel& kernel) {
  std::string text;
  for (const Image& image : kernel.images)
    text += (text.empty() ? "" : ", ") + (image.sm == kPtx ? "PTX" : "sm_" + std::to_string(image.sm));
  return text.empty() ? "nothing" : text;
}

Loaded load_kernel(Context context, int64_t sm, const Kernel& kernel) {
  const Image* image = kernel.serving(sm);
  if (image == nullptr)
    throw Error("kernel " + kernel.name + " is compiled for " + carried(kernel) + "; none of it runs on this GPU, sm_" +
                std::to_string(sm));
  Module module = module_of(context, std::string(image->data));
  const Image* ptx = kernel.serving(kPtxOnly);
  if (module == nullptr && ptx != nullptr) {
    image = ptx;
    module = module_of(context, std::string(image->data));
  }
  if (module == nullptr)
    throw Error("the driver does not know the image of kernel " + kernel.name + " for sm_" + std::to_string(sm) +
                "; images for sm_90 and later need driver 580");
  const Driver& cuda = driver();
  Function found = nullptr;
  cuda.check(cuda.cuModuleGetFunction(&found, module, kernel.name.c_str()));
  if (image->shared_bytes > kUsualSharedBytes)
    cuda.check(cuda.cuFuncSetAttribute(found, kMaxDynamicSharedBytes, int(image->shared_bytes)));
  return {found, unsigned(image->shared_bytes), image->waits};
}

// A kernel that waits by itself may start before the launch in front of it has ended.
void launch_kernel(const Loaded& kernel, const unsigned (&grid)[3], unsigned threads, Stream stream, void** places) {
  const Driver& cuda = driver();
  if (!kernel.waits) {
    cuda.check(cuda.cuLaunchKernel(kernel.function, grid[0], grid[1], grid[2], threads, 1, 1, kernel.shared_bytes,
                                   stream, places, nullptr));
    return;
  }
  LaunchAttribute attribute{kProgrammaticStreamSerialization, 0, {1}};
  const LaunchConfig config{{grid[0], grid[1], grid[2]}, {threads, 1, 1}, kernel.shared_bytes, stream, &attribute, 1};
  cuda.check(cuda.cuLaunchKernelEx(&config, kernel.function, places, nullptr));
}

}  // namespace

const std::vector<Loaded>& Launcher::load() {
  Context context = nullptr;
  driver().check(driver().cuCtxGetCurrent(&context));
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto known = loaded_.find(context);
  if (known != loaded_.end()) return known->second;
  std::vector<Loaded> loaded;
  const int64_t sm = capability();
  for (const Kernel& kernel : program.kernels) loaded.push_back(load_kernel(context, sm, kernel));
  return loaded_[context] = std::move(loaded);
}

// Kernels load 16 bytes at a time. An unaligned load is a GPU fault, which destroys the CUDA context.
void Launcher::check_addresses(const void* const* inputs, void* const* outputs) const {
  const size_t count = program.inputs.size();
  for (size_t i = 0; i < count + program.outputs.size(); ++i) {
    const auto address = uint64_t(i < count ? inputs[i] : outputs[i - count]);
    if (program.dtype(i) != kInt32Type && address % kAligned != 0)
      throw Error((i < count ? "input " + std::to_string(i) : "output " + std::to_string(i - count)) +
                  " does not begin at a multiple of " + std::to_string(kAligned) + " bytes");
  }
}

void Launcher::run(const int64_t* dims, int rank, const void* const* inputs, void* const* outputs, void* workspace,
                   Stream stream) {
  const CallSize call(dims, rank);
  const Plan& plan = program.plan(call.batch, call.seqlen);
  check_addresses(inputs, outputs);
  const std::vector<Loaded>& loaded = load();
  const auto value = [&](const Argument& argument) -> uint64_t {
    switch (argument.kind) {
      case kInput: return uint64_t(inputs[argument.value]) + uint64_t(argument.offset);
      case kOutput: return uint64_t(outputs[argument.value]);
      case kWorkspace: return uint64_t(workspace) + uint64_t(argument.value);
      default: return uint64_t(argument.size(call.batch, call.seqlen));
    }
  };
  for (const Launch& launch : plan.launches) {
    const Kernel& kernel = program.kernels[launch.kernel];
    // A parameter has at most eight bytes, little-endian, so an int32 is read from the first four bytes of its cell.
    std::vector<uint64_t> cells;
    for (const Argument& argument : launch.arguments) cells.push_back(value(argument));
    cells.resize(cells.size() + size_t(kernel.hidden), 0);
    std::vector<void*> places;
    for (uint64_t& cell : cells) places.push_back(&cell);
    unsigned grid[3];
    for (int i = 0; i < 3; ++i) grid[i] = unsigned(launch.grid[i](call.batch, call.seqlen));
    launch_kernel(loaded[launch.kernel], grid, unsigned(kernel.threads), stream, places.data());
  }
}

}  // namespace shadowllm
