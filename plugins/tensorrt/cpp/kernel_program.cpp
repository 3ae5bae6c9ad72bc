#include "kernel_program.hpp"

#include <algorithm>
#include <cstring>

namespace shadowllm {
namespace {

constexpr std::string_view kMagic = "shadowllm program 4";
constexpr int64_t kInt32 = INT32_MAX, kMaxRank = 8, kNewest = 10000, kDependentLaunchSm = 90;
constexpr std::array<int64_t, 3> kGrid{kInt32, 65535, 65535};  // largest number of blocks along x, y and z

// Reads little-endian int64 numbers and byte strings. Throws instead of reading past the end.
class Reader {
 public:
  explicit Reader(std::string_view data) : data_(data) {}

  int64_t number() {
    uint64_t value = 0;
    const std::string_view bytes = take(8);
    for (size_t i = 0; i < 8; ++i) value |= uint64_t(uint8_t(bytes[i])) << 8 * i;
    return int64_t(value);
  }

  std::string_view blob() {
    const int64_t size = number();
    return take(size < 0 ? SIZE_MAX : size_t(size));
  }

  // `read` consumes at least one number, so a wrong count reaches the end of the data before it uses much memory.
  template <class Read>
  auto many(Read read) {
    std::vector<decltype(read())> found;
    const int64_t count = number();
    if (count < 0) throw Error("the program is damaged");
    for (int64_t i = 0; i < count; ++i) found.push_back(read());
    return found;
  }

  std::string_view rest() const { return data_.substr(place_); }

 private:
  std::string_view take(size_t size) {
    if (size > data_.size() - place_) throw Error("the program is damaged");
    place_ += size;
    return data_.substr(place_ - size, size);
  }

  std::string_view data_;
  size_t place_ = 0;
};

int64_t read_dtype(Reader& from) {
  const int64_t dtype = from.number();
  if (dtype != 0 && dtype != 1 && dtype != 3 && dtype != 7) throw Error("the program is damaged");
  return dtype;
}

Size read_size(Reader& from) {
  Size size{};
  size.factor = from.number();
  size.batch = from.number() != 0;
  size.seqlen = from.number() != 0;
  size.divisor = from.number();
  return size;
}

Argument read_argument(Reader& from) {
  const int64_t kind = from.number(), value = from.number();
  if (kind < 0 || kind >= kKinds) throw Error("the program is damaged");
  const Size size = read_size(from);
  return {Kind(kind), value, size, from.number()};
}

Launch read_launch(Reader& from) {
  Launch launch{};
  launch.kernel = from.number();
  for (Size& size : launch.grid) size = read_size(from);
  launch.arguments = from.many([&] { return read_argument(from); });
  return launch;
}

Plan read_plan(Reader& from) {
  Plan plan{};
  plan.max_batch = from.number();
  plan.max_seqlen = from.number();
  plan.workspace_bytes = from.number();
  plan.launches = from.many([&] { return read_launch(from); });
  return plan;
}

Image read_image(Reader& from) {
  const int64_t sm = from.number(), shared_bytes = from.number(), waits = from.number();
  if (waits != 0 && waits != 1) throw Error("the program is damaged");
  return {sm, shared_bytes, from.blob(), waits == 1};
}

Kernel read_kernel(Reader& from) {
  Kernel kernel{};
  kernel.name = std::string(from.blob());
  kernel.threads = from.number();
  kernel.hidden = from.number();
  kernel.images = from.many([&] { return read_image(from); });
  return kernel;
}

Dimension read_dimension(Reader& from) {
  const int64_t first = from.number(), axis = from.number();
  if (axis >= 0 && first < 0) throw Error("a dimension refers to no input");
  return axis < 0 ? Dimension{-1, first} : Dimension{first, axis};
}

Output read_output(Reader& from) {
  const int64_t dtype = read_dtype(from);
  return {dtype, from.many([&] { return read_dimension(from); })};
}

void within(const char* what, int64_t number, int64_t low, int64_t high = kInt32) {
  if (number < low || number > high)
    throw Error(std::string(what) + " is " + std::to_string(number) + ", and should be " + std::to_string(low) + ".." +
                std::to_string(high));
}

// Sizes grow with the call: if the largest one fits into an int32, all do. The factors were checked before.
void check_largest(const Size& size, const Plan& plan) {
  int64_t product = size.factor;
  for (const int64_t more : {size.batch ? plan.max_batch : 1, size.seqlen ? plan.max_seqlen : 1}) {
    if (product > kInt32 / more) throw Error("a size does not fit into an int32");
    product *= more;
  }
  within("size", (product + size.divisor - 1) / size.divisor * size.divisor, 0);
}

void check_size(const Size& size, const Plan& plan, int64_t least) {
  within("factor", size.factor, least);
  within("divisor", size.divisor, 1);
  check_largest(size, plan);
}

bool printable(const std::string& name) {
  return !name.empty() && std::all_of(name.begin(), name.end(), [](char c) { return c >= '!' && c <= '~'; });
}

}  // namespace

const Image* Kernel::serving(int64_t sm) const {
  const Image *own = nullptr, *older = nullptr, *ptx = nullptr;
  for (const Image& image : images) {
    if (image.sm == sm) own = &image;
    if (image.sm == kPtx && sm >= kPtxSm) ptx = &image;
    // From 9.0 on, compilers make a cubin for only one GPU.
    const bool compatible = image.sm != kPtx && image.sm / 10 == sm / 10 && image.sm < sm && sm < 90;
    if (compatible && (older == nullptr || image.sm >= older->sm)) older = &image;
  }
  return own ? own : older ? older : ptx;
}

Program::Program(std::string packed) : packed_(std::move(packed)) {
  Reader from(packed_);
  if (from.blob() != kMagic) throw Error("not a program of this version: build the engine again");
  inputs = from.many([&] { return read_dtype(from); });
  outputs = from.many([&] { return read_output(from); });
  kernels = from.many([&] { return read_kernel(from); });
  plans = from.many([&] { return read_plan(from); });
  // TensorRT's ONNX parser ends an attribute with a zero byte.
  if (!from.rest().empty() && from.rest() != std::string_view("\0", 1))
    throw Error("the program is longer than it should be");
  packed_.resize(packed_.size() - from.rest().size());
  check();
}

void Program::check() const {
  within("inputs", int64_t(inputs.size()), 1);
  within("plans", int64_t(plans.size()), 1);
  for (const Output& output : outputs) {
    within("dimensions", int64_t(output.shape.size()), 0, kMaxRank);
    for (const Dimension& dim : output.shape) {
      within("dimension", dim.input, -1, int64_t(inputs.size()) - 1);
      within("dimension", dim.value, 0, dim.input < 0 ? kInt32 : kMaxRank - 1);
    }
  }
  for (const Kernel& kernel : kernels) {
    within("threads", kernel.threads, 1, 1024);
    within("hidden", kernel.hidden, 0, 64);
    if (!printable(kernel.name)) throw Error("a kernel has no proper name");
    for (const Image& image : kernel.images) {
      within("capability", image.sm, 0, kNewest);
      within("shared_bytes", image.shared_bytes, 0);
      within("waits", image.waits, 0, image.sm >= kDependentLaunchSm);
    }
  }
  for (const Plan& plan : plans) check(plan);
}

void Program::check(const Plan& plan) const {
  within("largest call", plan.max_batch, 1);
  within("largest call", plan.max_seqlen, 1);
  within("workspace_bytes", plan.workspace_bytes, 0, int64_t(1) << 62);
  const std::array<int64_t, kKinds> limits{int64_t(inputs.size()) - 1, int64_t(outputs.size()) - 1,
                                           plan.workspace_bytes, 0};
  for (const Launch& launch : plan.launches) {
    within("kernel", launch.kernel, 0, int64_t(kernels.size()) - 1);
    for (size_t i = 0; i < launch.grid.size(); ++i) {
      check_size(launch.grid[i], plan, 1);
      within("grid", launch.grid[i](plan.max_batch, plan.max_seqlen), 1, kGrid[i]);
    }
    for (const Argument& argument : launch.arguments) {
      check_size(argument.size, plan, 0);
      within("argument", argument.value, 0, limits[argument.kind]);
      const bool movable = argument.kind == kInput && inputs[argument.value] == kInt32Type;
      within("offset", argument.offset, 0, movable ? kInt32 : 0);
    }
  }
}

const Plan& Program::plan(int64_t batch, int64_t seqlen) const {
  for (const Plan& plan : plans)
    if (batch <= plan.max_batch && seqlen <= plan.max_seqlen) return plan;
  throw Error("no plan serves batch " + std::to_string(batch) + ", seqlen " + std::to_string(seqlen));
}

int64_t Program::workspace_bytes() const {
  int64_t most = 0;
  for (const Plan& plan : plans) most = std::max(most, plan.workspace_bytes);
  return most;
}

int64_t Program::dtype(size_t position) const {
  return position < inputs.size() ? inputs[position] : outputs.at(position - inputs.size()).dtype;
}

}  // namespace shadowllm
