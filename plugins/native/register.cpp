// What the runtime calls when it loads this library.
#include <mutex>
#include <vector>

#include "op.hpp"

namespace shadowllm {
namespace {

// The ops as one runtime knows them. The domain outlives every session that uses it: it goes with the library.
struct Domain {
  Domain(const OrtApi* table, const char* runtime_version) : api(table) {
    const bool infers = infers_despite_absent_inputs(runtime_version);
    ops = {make_select_topk(api), make_sparse_mlp(api, infers), make_sparse_attention(api, infers)};
    api.check(api.create_custom_op_domain("shadowllm", &domain));
    for (const auto& op : ops) api.check(api.custom_op_domain_add(domain, op.get()));
  }
  ~Domain() {
    if (domain != nullptr) api.release_custom_op_domain(domain);
  }

  Api api;
  std::vector<std::shared_ptr<OrtCustomOp>> ops;
  OrtCustomOpDomain* domain = nullptr;
};

const Domain& domain_of(const OrtApi* table, const char* runtime_version) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Domain>> domains;  // more than one where a process holds several runtimes
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& domain : domains)
    if (domain->api.table() == table) return *domain;
  domains.push_back(std::make_unique<Domain>(table, runtime_version));
  return *domains.back();
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
    // Version 1 of the table is the start of every later one, and creating a status is its first function.
    return create_status_of(base->GetApi(1))(kFail,
                                             "the shadowllm ops need ONNX Runtime 1.17 or later (API version 17)");
  }
  try {
    const Domain& domain = domain_of(table, base->GetVersionString());
    return domain.api.add_custom_op_domain(options, domain.domain);
  } catch (const std::exception& error) {
    return create_status_of(table)(kFail, error.what());
  }
}

SHADOWLLM_EXPORT const char* shadowllm_native_kernels() noexcept { return shadowllm::supported_kernels(); }
