#include "op.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>

namespace shadowllm {
namespace {

std::string shape_text(const int64_t* dims, size_t rank) {
  std::string text = "(";
  for (size_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + ")";
}

constexpr size_t kLineBytes = 64;

float* first_line(float* memory) {
  constexpr size_t kLine = kLineBytes / sizeof(float);
  const size_t past = reinterpret_cast<uintptr_t>(memory) / sizeof(float) % kLine;
  return memory + (past == 0 ? 0 : kLine - past);
}

size_t scales_bytes(const Tensor& scales) { return static_cast<size_t>(scales.dims[1]) * sizeof(float); }

}  // namespace

size_t Tensor::size() const {
  size_t size = 1;
  for (int i = 0; i < rank; ++i) size *= static_cast<size_t>(dims[i]);
  return size;
}

Node::Node(const Api& api, const OrtKernelInfo* info, const char* op, const Port* ports, size_t count, bool has_layer,
           size_t first)
    : api_(api), info_(info), name_(op), ports_(ports), constants_(count), first_(first) {
  if (has_layer) name_ += " layer " + std::to_string(integer("layer"));
  exact_copies_ = integer_or("exact_copies", 0) != 0;
  for (size_t i = 0; i < count; ++i) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    api.check(api.kernel_info_get_constant_input(info, first + i, &is_constant, &value));
    if (is_constant != 0 && value != nullptr) constants_[i] = view(value);
  }
}

int64_t Node::integer(const char* attribute) const {
  int64_t value = 0;
  api_.check(api_.kernel_info_get_attribute_int64(info_, attribute, &value));
  return value;
}

int64_t Node::integer_or(const char* attribute, int64_t otherwise) const {
  int64_t value = otherwise;
  if (OrtStatus* status = api_.kernel_info_get_attribute_int64(info_, attribute, &value)) {
    api_.release_status(status);
    return otherwise;
  }
  return value;
}

float Node::real_or(const char* attribute, float otherwise) const {
  float value = otherwise;
  if (OrtStatus* status = api_.kernel_info_get_attribute_float(info_, attribute, &value)) {
    api_.release_status(status);
    return otherwise;
  }
  return value;
}

std::string Node::text(const char* attribute) const {
  size_t size = 0;
  api_.check(api_.kernel_info_get_attribute_string(info_, attribute, nullptr, &size));
  std::string value(size, '\0');
  api_.check(api_.kernel_info_get_attribute_string(info_, attribute, value.data(), &size));
  value.resize(size == 0 ? 0 : size - 1);  // the size includes the final zero
  return value;
}

Tensor Node::view(const OrtValue* value) const {
  Tensor tensor;
  const int64_t* dims = nullptr;
  size_t rank = 0;
  api_.check(api_.get_type_and_shape(value, &tensor.type, &dims, &rank));
  if (rank > tensor.dims.size()) fail("an input has " + std::to_string(rank) + " dimensions");
  std::copy_n(dims, rank, tensor.dims.begin());
  tensor.rank = static_cast<int>(rank);
  api_.check(api_.get_tensor_mutable_data(const_cast<OrtValue*>(value), &tensor.data));
  return tensor;
}

std::vector<Tensor> Node::inputs(const OrtKernelContext* context) const {
  std::vector<Tensor> found = constants_;
  size_t count = 0;
  api_.check(api_.kernel_context_get_input_count(context, &count));
  for (size_t i = 0; i < found.size() && first_ + i < count; ++i) {
    if (found[i].present()) continue;
    const OrtValue* value = nullptr;
    api_.check(api_.kernel_context_get_input(context, first_ + i, &value));
    if (value != nullptr) found[i] = view(value);
  }
  return found;
}

Tensor Node::output(OrtKernelContext* context, std::initializer_list<int64_t> dims) const {
  OrtValue* value = nullptr;
  api_.check(api_.kernel_context_get_output(context, 0, dims.begin(), dims.size(), &value));
  return view(value);
}

Tensor Node::optional_output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank) const {
  size_t count = 0;
  api_.check(api_.kernel_context_get_output_count(context, &count));
  if (index >= count) return {};
  OrtValue* value = nullptr;
  api_.check(api_.kernel_context_get_output(context, index, dims, rank, &value));
  return value == nullptr ? Tensor{} : view(value);
}

Tensor Node::output_like(OrtKernelContext* context, const Tensor& tensor) const {
  Tensor output = tensor;
  OrtValue* value = nullptr;
  api_.check(api_.kernel_context_get_output(context, 0, tensor.dims.data(), static_cast<size_t>(tensor.rank), &value));
  api_.check(api_.get_tensor_mutable_data(value, &output.data));
  return output;
}

int64_t Node::width_of(const Tensor& x) const {
  if (x.rank != 2 && x.rank != 3) fail("x has " + std::to_string(x.rank) + " dimensions, not 2 or 3");
  return x.dims[static_cast<size_t>(x.rank) - 1];
}

void Node::expect(const std::vector<Tensor>& inputs, size_t port, std::initializer_list<int64_t> dims) const {
  const Tensor& tensor = inputs[port];
  if (!tensor.present()) return;
  if (tensor.rank == static_cast<int>(dims.size()) && std::equal(dims.begin(), dims.end(), tensor.dims.begin())) return;
  fail(std::string(ports_[port].name) + " has shape " + shape_text(tensor.dims.data(), tensor.rank) + ", not " +
       shape_text(dims.begin(), dims.size()));
}

void Node::bound(const std::string& what, int64_t value, int64_t low, int64_t high) const {
  if (value < low || value > high)
    fail(what + " " + std::to_string(value) + " is outside " + std::to_string(low) + ".." + std::to_string(high));
}

size_t Node::selections(const Tensor& count, const Tensor& x) const {
  const int64_t found = static_cast<int64_t>(count.size()), tokens = x.rank == 3 ? x.dims[0] * x.dims[1] : x.dims[0];
  const bool fits = x.rank == 3 ? found == x.dims[0] : found > 0 && tokens % found == 0;
  if (count.rank > 1 || !(found == 1 || (found > 0 && fits)))
    fail("count has " + std::to_string(found) + " elements, not 1" +
         (x.rank == 3 && x.dims[0] > 1 ? " or " + std::to_string(x.dims[0]) : ""));
  return static_cast<size_t>(found);
}

void Node::expect_one_each(const std::vector<Tensor>& inputs, size_t port, size_t selections) const {
  const Tensor& tensor = inputs[port];
  if (tensor.present() && tensor.size() != 1 && tensor.size() != selections)
    fail(std::string(ports_[port].name) + " has " + std::to_string(tensor.size()) + " elements, not " +
         std::to_string(selections));
}

Picks Node::active(const Tensor& indices, const Tensor& count, size_t selection, int64_t rows) const {
  const int rank = count.rank + 1;
  if (indices.rank != rank)
    fail("indices has " + std::to_string(indices.rank) + " dimensions, not " + std::to_string(rank));
  if (rank == 2 && indices.dims[0] != count.dims[0])
    fail("indices has " + std::to_string(indices.dims[0]) + " rows, and count has " + std::to_string(count.dims[0]));
  const int64_t width = indices.dims[static_cast<size_t>(rank) - 1];
  const int32_t n = number(count, selection);
  bound("count", n, 0, width);
  const int32_t* ids = indices.as<int32_t>() + (count.size() == 1 ? 0 : selection * static_cast<size_t>(width));
  bool bad = false;
  for (int32_t i = 0; i < n; ++i) bad |= static_cast<uint32_t>(ids[i]) >= static_cast<uint64_t>(rows);
  if (bad)
    for (int32_t i = 0; i < n; ++i) bound("index", ids[i], 0, rows - 1);
  return {ids, static_cast<size_t>(n)};
}

Tensor Node::chosen_output(const Outputs& outputs, const Tensor& count, int64_t width) const {
  if (count.rank == 0) return outputs.get(1, {width});
  return outputs.get(1, {count.dims[0], width});
}

Tensor Outputs::get(size_t index, const int64_t* dims, size_t rank) const {
  const size_t output = places_.empty() ? index : places_[index].output;
  if (places_.empty() || places_[index].memory == nullptr) return node_.optional_output(context_, output, dims, rank);
  Tensor tensor;
  tensor.data = places_[index].memory, tensor.type = kFloat, tensor.rank = static_cast<int>(rank);
  std::copy_n(dims, rank, tensor.dims.begin());
  return tensor;
}

RowType Node::row_type(const Tensor& tensor, const char* name) const {
  switch (tensor.type) {
    case kFloat: return RowType::f32;
    case kBFloat16: return RowType::bf16;
    case kFloat16: return RowType::f16;
    default: fail(std::string(name) + " is of none of the types float32, bfloat16, float16 and, for a matrix, uint8");
  }
}

Rows Node::matrix(const std::vector<Tensor>& in, size_t port, size_t scales_port, int64_t rows, int64_t width) const {
  const Tensor &tensor = in[port], &scales = in[scales_port];
  const size_t elements = static_cast<size_t>(width);
  if (tensor.type != kUInt8) {
    expect(in, port, {rows, width});
    if (scales.present()) fail(std::string(ports_[scales_port].name) + " stands without integer weights");
    const RowType type = row_type(tensor, ports_[port].name);
    return {tensor.data, elements * element_size(type), elements, type};
  }
  const bool packed = tensor.rank == 2 && tensor.dims[1] * 2 == width;
  expect(in, port, {rows, packed ? width / 2 : width});
  const int64_t blocks = scales.rank == 2 ? scales.dims[1] : 0;
  if (width < 1 || blocks < 1 || width % blocks != 0 || width / blocks % static_cast<int64_t>(kLeastQuantBlock) != 0)
    fail(std::string(ports_[scales_port].name) + " must have shape (" + std::to_string(rows) + ", blocks), with " +
         std::to_string(width) + " elements in equal blocks of a multiple of " + std::to_string(kLeastQuantBlock));
  expect(in, scales_port, {rows, blocks});
  const size_t bytes = static_cast<size_t>(tensor.dims[1]), block = static_cast<size_t>(width / blocks);
  const RowType type = packed ? RowType::i4 : RowType::i8;
  Rows found{tensor.data, bytes, elements, type, scales.as<char>(), scales_bytes(scales), block};
  found.exact = exact_copies_;
  const auto own = constants_[scales_port].present() ? packed_.find(port) : packed_.end();
  if (own != packed_.end()) {  // the scales follow the row; without constant ones, it was packed as a residual
    found.data = own->second.data, found.stride = found.scales_stride = own->second.stride;
    found.scales = own->second.data + bytes;
  }
  return found;
}

Rows Node::copy(const std::vector<Tensor>& in, size_t port, size_t scales_port, int64_t rows, int64_t width) const {
  const Tensor &tensor = in[port], &scales = in[scales_port];
  const int64_t bytes = tensor.rank == 3 ? tensor.dims[2] : 0, block = bytes * 2;
  if (bytes < 1 || block % static_cast<int64_t>(kLeastQuantBlock) != 0)
    fail(std::string(ports_[port].name) + " has shape " + shape_text(tensor.dims.data(), tensor.rank) +
         ", not (rows, blocks, bytes) with bytes of a multiple of " + std::to_string(kLeastQuantBlock / 2));
  const int64_t blocks = (width + block - 1) / block;
  expect(in, port, {rows, blocks, bytes});
  expect(in, scales_port, {rows, blocks});
  Rows found{tensor.data,
             static_cast<size_t>(blocks * bytes),
             static_cast<size_t>(blocks * block),
             RowType::i4,
             scales.as<char>(),
             scales_bytes(scales),
             static_cast<size_t>(block)};
  found.exact = exact_copies_;
  if (const auto own = shortened_.find(scales_port); own != shortened_.end()) {
    found.type = RowType::c4, found.short_scales = true;
    found.scales = reinterpret_cast<const char*>(own->second.data());
    found.scales_stride = static_cast<size_t>(blocks) * found.scale_size();
  }
  give_tiles(port, found);
  return found;
}

Rows Node::nested(const std::vector<Tensor>& in, size_t port, size_t copy_port, size_t scales_port, int64_t rows,
                  int64_t width) const {
  Rows found = copy(in, copy_port, scales_port, rows, width);
  const Tensor& tensor = in[port];
  const size_t elements = static_cast<size_t>(rows) * found.width, bytes = tensor.size();
  if (bytes * 2 != elements && bytes * 4 != elements)
    fail(std::string(ports_[port].name) + " has " + std::to_string(bytes) + " bytes, not 4 or 2 bits for each of " +
         std::to_string(elements) + " elements");
  found.type = bytes * 2 == elements ? RowType::n8 : RowType::n6;
  found.residual = tensor.data, found.residual_stride = found.width * (found.type == RowType::n8 ? 4 : 2) / 8;
  give_tiles(copy_port, found);
  return found;
}

Rows Node::residual(const std::vector<Tensor>& in, size_t port, const Rows& copy, int64_t rows) const {
  const Tensor& tensor = in[port];
  const int64_t width = static_cast<int64_t>(copy.width);
  const bool two = tensor.rank == 2 && tensor.dims[1] * 4 == width;
  expect(in, port, {rows, two ? width / 4 : width / 2});
  Rows found = copy;
  found.tiles = nullptr;
  const bool rounded = copy.type == RowType::c4;
  found.type = two ? (rounded ? RowType::c2 : RowType::i2) : copy.type;
  found.step = two ? 1.0f / 4 : 1.0f / 16;
  const auto own = packed_.find(port);
  found.data = own == packed_.end() ? tensor.data : own->second.data;
  found.stride = own == packed_.end() ? static_cast<size_t>(tensor.dims[1]) : own->second.stride;
  return found;
}

void PackedRows::reserve(size_t rows, size_t bytes) {
  stride = (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
  memory.resize((rows * stride + kLineBytes) / sizeof(float));
  data = reinterpret_cast<char*>(first_line(memory.data()));
}

void Node::pack_records(std::initializer_list<std::pair<size_t, size_t>> ports_and_scales) {
  std::vector<size_t> ports;
  size_t bytes = 0;
  for (const auto& [port, scales] : ports_and_scales) {
    const Tensor& tensor = constants_[port];
    if (!tensor.present()) continue;
    if (!is_residual(tensor, constants_[scales]) || tensor.rank != 2) return;
    if (!ports.empty() && tensor.dims[0] != constants_[ports.front()].dims[0]) return;
    ports.push_back(port);
    bytes += static_cast<size_t>(tensor.dims[1]);
  }
  if (ports.empty()) return;
  const size_t rows = static_cast<size_t>(constants_[ports.front()].dims[0]);
  PackedRows& first = packed_[ports.front()];
  first.reserve(rows, bytes);
  char* data = first.data;
  for (const size_t port : ports) {
    const size_t width = static_cast<size_t>(constants_[port].dims[1]);
    PackedRows& own = packed_[port];
    own.data = data, own.stride = first.stride;
    for (size_t i = 0; i < rows; ++i)
      std::memcpy(data + i * first.stride, constants_[port].as<char>() + i * width, width);
    data += width;
  }
}

void Node::pack(size_t port, size_t scales_port) {
  const Tensor &tensor = constants_[port], &scales = constants_[scales_port];
  if (tensor.type != kUInt8 || tensor.rank != 2 || scales.rank != 2 || tensor.dims[0] != scales.dims[0]) return;
  const size_t rows = static_cast<size_t>(tensor.dims[0]), bytes = static_cast<size_t>(tensor.dims[1]);
  const size_t beside = scales_bytes(scales);
  if (bytes % alignof(float) != 0) return;
  PackedRows& own = packed_[port];
  own.reserve(rows, bytes + beside);
  for (size_t i = 0; i < rows; ++i) {
    std::memcpy(own.data + i * own.stride, tensor.as<char>() + i * bytes, bytes);
    std::memcpy(own.data + i * own.stride + bytes, scales.as<char>() + i * beside, beside);
  }
}

void Node::shorten(std::initializer_list<size_t> scales_ports) {
  for (const size_t port : scales_ports) {
    const Tensor& scales = constants_[port];
    if (exact_copies_ || !scales.present()) continue;
    const uint32_t* bits = scales.as<uint32_t>();
    const size_t size = scales.size();
    if (std::any_of(bits, bits + size, [](uint32_t scale) { return (scale & 0xffff) != 0; })) continue;
    std::vector<uint16_t>& own = shortened_[port];
    own.resize(size + kLineBytes / sizeof(uint16_t));  // kernels read whole vectors
    std::transform(bits, bits + size, own.begin(), [](uint32_t scale) { return static_cast<uint16_t>(scale >> 16); });
  }
}

void Node::tile(const Kernels& kernels, size_t copy_port, size_t scales_port, std::optional<size_t> residual_port) {
  const Tensor &copied = constants_[copy_port], &scales = constants_[scales_port];
  if (shortened_.count(scales_port) == 0 || copied.rank != 3 || copied.size() == 0) return;
  if (copied.dims[2] % (kLeastQuantBlock / 2) != 0) return;
  if (scales.rank != 2 || scales.dims[0] != copied.dims[0] || scales.dims[1] != copied.dims[1]) return;
  const int64_t count = copied.dims[0], width = copied.dims[1] * copied.dims[2] * 2;
  if (residual_port) {
    const size_t bytes = constants_[*residual_port].size();
    if (!is_constant(*residual_port) || (bytes != copied.size() && bytes * 2 != copied.size())) return;
  }
  const Rows rows = residual_port ? nested(constants_, *residual_port, copy_port, scales_port, count, width)
                                  : copy(constants_, copy_port, scales_port, count, width);
  const size_t bytes = kernels.tile_bytes(rows), size = static_cast<size_t>(count);
  if (bytes == 0) return;
  Tiles& own = tiles_[copy_port];
  own.type = rows.type;
  own.memory.reserve((size + kTileRows - 1) / kTileRows, bytes);
  kernels.write_tiles(rows, size, own.memory.data);
}

void Node::give_tiles(size_t copy_port, Rows& rows) const {
  const auto own = tiles_.find(copy_port);
  const bool there = own != tiles_.end() && own->second.type == rows.type;
  rows.tiles = there ? own->second.memory.data : nullptr;
  rows.tile_stride = there ? own->second.memory.stride : 0;
}

Bytes Node::first_bytes(size_t copy_port) const {
  const auto own = tiles_.find(copy_port);
  if (own != tiles_.end()) return {own->second.memory.data, own->second.memory.size()};
  return {constants_[copy_port].data, is_constant(copy_port) ? constants_[copy_port].size() : 0};
}

namespace {
// Of all threads, because any of them may lead a team. The last one is that of the outermost use.
std::mutex kept_mutex;
std::vector<std::vector<float>> kept;
}  // namespace

Scratch::Scratch() {
  const std::lock_guard<std::mutex> lock(kept_mutex);
  if (kept.empty()) return;
  memory_ = std::move(kept.back());
  kept.pop_back();
}
Scratch::~Scratch() {
  constexpr size_t kMostKept = size_t{1} << 24;  // floats; only long prompts need more
  if (memory_.size() > kMostKept) return;
  const std::lock_guard<std::mutex> lock(kept_mutex);
  kept.push_back(std::move(memory_));
}

float* Scratch::take(size_t floats) {
  constexpr size_t kLine = kLineBytes / sizeof(float);
  if (memory_.size() < floats + kLine) {
    memory_.clear();  // so that resize copies nothing
    memory_.resize(floats + kLine);
  }
  return first_line(memory_.data());
}

// Two megabytes per chunk make the cost of starting one negligible, and about six chunks per core even out the speed of
// the cores. Less work gets about one chunk per core. The counts have many divisors, which suits any number of
// threads. With many tokens, the partial sums of each chunk are expensive, so there are at most 12 chunks.
Chunks::Chunks(size_t items, size_t bytes_each, size_t tokens) : items_(items), count_(1) {
  static const size_t cores = std::max(1u, std::thread::hardware_concurrency());
  const size_t most = tokens > 4 ? 12 : std::clamp<size_t>(6 * cores, 12, 48), bytes = items * bytes_each * tokens;
  const size_t wanted = std::min({most, items / kTileRows, std::max(bytes >> 21, std::min(cores, bytes >> 16))});
  for (const size_t count : {1, 2, 4, 6, 12, 24, 48})
    if (count <= wanted) count_ = count;
}

Chunk Chunks::operator[](size_t i) const {
  const auto edge = [&](size_t k) { return k == count_ ? items_ : items_ * k / count_ / kTileRows * kTileRows; };
  return {edge(i), edge(i + 1)};
}

void add_up(const Pool& pool, const Kernels& kernels, const float* parts, size_t count, size_t tokens, size_t width,
            const float* start, float* y) {
  const size_t stride = tokens * width;
  const size_t tasks = count * stride < (size_t{1} << 16) ? 1 : tokens;
  pool.run(tasks, [&](size_t task) {
    for (size_t t = tokens * task / tasks; t < tokens * (task + 1) / tasks; ++t)
      kernels.reduce(parts + t * width, count, stride, start, y + t * width, width);
  });
}

void infer_output(const Api& api, OrtShapeInferContext* context, size_t output, int type, const int64_t* dims,
                  const char** names, size_t rank) {
  OrtTensorTypeAndShapeInfo* shape = nullptr;
  api.check(api.create_tensor_type_and_shape_info(&shape));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api.release_tensor_type_and_shape_info)> owner(
      shape, api.release_tensor_type_and_shape_info);
  api.check(api.set_tensor_element_type(shape, type));
  api.check(api.set_dimensions(shape, dims, rank));
  api.check(api.set_symbolic_dimensions(shape, names, rank));
  api.check(api.shape_infer_set_output(context, output, shape));
}

namespace {

// The dimensions of an input. ONNX Runtime would treat one without size and name as size -1, so it gets a name.
struct Dimensions {
  Dimensions(const Api& api, OrtShapeInferContext* context, size_t input) {
    static std::atomic<size_t> unnamed{0};
    OrtTensorTypeAndShapeInfo* info = nullptr;  // owned by the context
    api.check(api.shape_infer_get_input(context, input, &info));
    size_t rank = 0;
    api.check(api.get_dimensions_count(info, &rank));
    sizes.resize(rank), names.resize(rank), own.resize(rank);
    api.check(api.get_dimensions(info, sizes.data(), rank));
    api.check(api.get_symbolic_dimensions(info, names.data(), rank));
    for (size_t i = 0; i < rank; ++i) {
      if (sizes[i] >= 0 || *names[i] != '\0') continue;
      own[i] = "shadowllm_" + std::to_string(++unnamed);
      names[i] = own[i].c_str();
    }
  }

  std::vector<int64_t> sizes;
  std::vector<const char*> names;
  std::vector<std::string> own;
};

}  // namespace

void infer_rows(const Api& api, OrtShapeInferContext* context, std::initializer_list<size_t> inputs, size_t output,
                int type) {
  std::vector<Dimensions> found;
  std::vector<int64_t> sizes;
  std::vector<const char*> names;
  for (const size_t input : inputs) {
    found.emplace_back(api, context, input);
    if (found.back().sizes.empty()) return;
  }
  for (const Dimensions& of : found) sizes.push_back(of.sizes[0]), names.push_back(of.names[0]);
  infer_output(api, context, output, type, sizes.data(), names.data(), sizes.size());
}

void infer_like_input(const Api& api, OrtShapeInferContext* context, size_t input, size_t output) {
  Dimensions of(api, context, input);
  if (!of.sizes.empty()) infer_output(api, context, output, kFloat, of.sizes.data(), of.names.data(), of.sizes.size());
}

}  // namespace shadowllm
