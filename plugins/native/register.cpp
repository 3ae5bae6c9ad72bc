// The functions that ONNX Runtime calls when it loads this library, and the list of the ops.
#include <mutex>
#include <vector>

#include "op.hpp"

namespace shadowllm {
namespace {

constexpr const Entry* kEntries[] = {&kSelectTopK,      &kSparseMlp,       &kSparseAttention,
                                     &kShortlistLogits, &kCachedAttention, &kNestedLinear,
                                     &kDenseMlp,        &kDecoderLayer,    &kDenseDecoderLayer};

// The ops, registered with one runtime. The domain lives as long as the library, and so longer than any session.
struct Domain {
  explicit Domain(const OrtApi* table) : api(table) {
    for (const Entry* op : kEntries) ops.push_back(op->make(api));
    OrtCustomOpDomain* created = nullptr;
    api.check(api.create_custom_op_domain("shadowllm", &created));
    domain = {created, api.release_custom_op_domain};
    for (const auto& op : ops) api.check(api.custom_op_domain_add(created, op.get()));
  }

  Api api;
  std::vector<std::shared_ptr<OrtCustomOp>> ops;
  std::unique_ptr<OrtCustomOpDomain, void (*)(OrtCustomOpDomain*)> domain{nullptr, nullptr};
};

const Domain& domain_of(const OrtApi* table) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Domain>> domains;  // more than one if a process has several runtimes
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& domain : domains)
    if (domain->api.table() == table) return *domain;
  domains.push_back(std::make_unique<Domain>(table));
  return *domains.back();
}

std::string ports_text(const Port* ports, size_t count) {
  std::string text;
  for (size_t i = 0; i < count; ++i)
    text += " " + std::string(ports[i].name) + ":" + std::to_string(ports[i].type) + ":" +
            std::to_string(int(ports[i].characteristic));
  return text;
}

// One line per op: its name, its inputs, "->", its outputs. Each port has its name, type and characteristic.
std::string signatures_text() {
  std::string text;
  for (const Entry* op : kEntries)
    text += op->name + ports_text(op->ports, op->port_count) + " ->" + ports_text(op->outputs, op->output_count) + "\n";
  return text;
}

using CreateStatus = OrtStatus*(int, const char*);

CreateStatus* create_status_of(const OrtApi* table) { return reinterpret_cast<CreateStatus*>(table[0]); }

}  // namespace
}  // namespace shadowllm

#define SHADOWLLM_EXPORT extern "C" __attribute__((visibility("default")))

SHADOWLLM_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) noexcept {
  using namespace shadowllm;
  const OrtApi* table = base->GetApi(kApiVersion);
  if (table == nullptr) {
    // Every later table starts with version 1, whose first function creates a status.
    return create_status_of(base->GetApi(1))(kFail,
                                             "the shadowllm ops need ONNX Runtime 1.24 or later (API version 24)");
  }
  try {
    const Domain& domain = domain_of(table);
    return domain.api.add_custom_op_domain(options, domain.domain.get());
  } catch (const std::exception& error) {
    return create_status_of(table)(kFail, error.what());
  }
}

SHADOWLLM_EXPORT const char* shadowllm_native_kernels() noexcept { return shadowllm::supported_kernels(); }

// The ops' signatures, with the runtime's numbers for types and characteristics. A test compares them with the schemas.
SHADOWLLM_EXPORT const char* shadowllm_native_signatures() noexcept {
  static const std::string text = shadowllm::signatures_text();
  return text.c_str();
}
