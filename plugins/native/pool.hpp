// The threads that an op uses: those of ONNX Runtime, or a team of them that stays together for several ops.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>

#include "ort_api.hpp"

namespace shadowllm {

// Bytes in memory.
struct Bytes {
  const void* data = nullptr;
  size_t size = 0;
};

// Some of ONNX Runtime's threads, between which one of them, the leader, divides one list of tasks after the other. The
// others wait actively for the next list, so a list starts in a fraction of a microsecond.
class Team {
 public:
  // The most tasks of a list.
  static constexpr size_t kMost = (size_t{1} << 20) - 1;

  // Runs lead(team) in one thread, and lets the others help until it returns. Throws what it throws.
  template <class Lead>
  static void gather(const Api& api, const OrtKernelContext* context, size_t threads, Lead lead) {
    Team team(threads);
    std::exception_ptr error;
    auto join = [&] {
      if (team.led_.exchange(true)) return team.help();
      try {
        lead(team);
      } catch (...) {
        error = std::current_exception();
      }
      team.ended_.store(true, std::memory_order_release);
    };
    using Join = decltype(join);
    api.check(api.parallel_for(context, [](void* data, size_t) { (*static_cast<Join*>(data))(); }, threads, 0, &join));
    if (error) std::rethrow_exception(error);
  }

  // Calls task(data, i) for each i below count. For the leader; `count` is at most kMost.
  void run(size_t count, void (*task)(void*, size_t), void* data) {
    task_ = task, data_ = data;
    done_.store(0, std::memory_order_relaxed);
    state_.store(++round_ << 40 | count << 20, std::memory_order_release);
    while (take()) continue;
    Fetch fetch(*this, 0);
    while (done_.load(std::memory_order_acquire) != count)
      if (!fetch.some()) pause();
  }

  // Names the bytes that a later list reads. Threads without a task bring the first of them into their caches. For the
  // leader.
  void ahead(Bytes bytes) {
    ahead_bytes_.store(bytes.size, std::memory_order_relaxed);
    ahead_.store(static_cast<const char*>(bytes.data), std::memory_order_release);
  }

 private:
  explicit Team(size_t threads) : threads_(threads) {}

  // Prefetches the bytes that a thread will probably read of those that `ahead` named: the threads take the tasks of a
  // list in order. If they do not, or if a new name is read in part, this only takes time.
  class Fetch {
   public:
    Fetch(const Team& team, size_t thread) : team_(team), thread_(thread) {}

    // Prefetches some bytes; false if there are none left.
    __attribute__((always_inline)) bool some() {
      constexpr size_t kMostBytes = size_t{1} << 16, kAtOnce = 256, kLine = 64;
      const char* data = team_.ahead_.load(std::memory_order_acquire);
      if (data != data_) {
        const size_t share = team_.ahead_bytes_.load(std::memory_order_relaxed) / team_.threads_;
        data_ = data, next_ = data + thread_ * share, end_ = next_ + std::min(share, kMostBytes);
      }
      if (next_ >= end_) return false;
      for (size_t k = 0; k < kAtOnce; k += kLine) __builtin_prefetch(next_ + k, 0, 2);
      next_ += kAtOnce;
      return true;
    }

   private:
    const Team& team_;
    const size_t thread_;
    const char *data_ = nullptr, *next_ = nullptr, *end_ = nullptr;
  };

  void help() {
    Fetch fetch(*this, 1 + helpers_.fetch_add(1, std::memory_order_relaxed));
    while (!ended_.load(std::memory_order_acquire))
      if (!take() && !fetch.some()) pause();
  }

  // Runs the next task of the list, if one is left. A task that was taken belongs to the present list, because the
  // state, with its round, was the present one.
  bool take() {
    uint64_t state = state_.load(std::memory_order_acquire);
    const uint64_t next = state & kMost;
    if (next >= (state >> 20 & kMost)) return false;
    if (!state_.compare_exchange_strong(state, state + 1, std::memory_order_acq_rel)) return true;
    task_(data_, static_cast<size_t>(next));
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::atomic<bool> led_{false}, ended_{false};
  alignas(64) std::atomic<uint64_t> state_{0};  // the round, the number of tasks, the next one: 24, 20 and 20 bits
  alignas(64) std::atomic<size_t> done_{0};
  std::atomic<const char*> ahead_{nullptr};
  std::atomic<size_t> ahead_bytes_{0}, helpers_{0};
  const size_t threads_;
  uint64_t round_ = 0;
  void (*task_)(void*, size_t) = nullptr;
  void* data_ = nullptr;
};

// The threads of an op. Bodies must not throw.
class Pool {
 public:
  Pool(const Api& api, const OrtKernelContext* context) : api_(&api), context_(context) {}
  explicit Pool(Team& team) : team_(&team) {}
  // See Team::ahead; does nothing without a team.
  void ahead(Bytes bytes) const {
    if (team_ != nullptr) team_->ahead(bytes);
  }
  // Runs everything in this thread, for work inside a task.
  static Pool none() { return Pool(); }

  template <class Body>
  void run(size_t tasks, Body body) const {
    const auto task = [](void* data, size_t i) { (*static_cast<Body*>(data))(i); };
    if (team_ != nullptr && tasks > 1 && tasks <= Team::kMost)
      team_->run(tasks, task, &body);
    else if (api_ != nullptr && tasks > 1)
      api_->check(api_->parallel_for(context_, task, tasks, 0, &body));
    else
      for (size_t i = 0; i < tasks; ++i) body(i);
  }

 private:
  Pool() = default;

  Team* team_ = nullptr;
  const Api* api_ = nullptr;
  const OrtKernelContext* context_ = nullptr;
};

}  // namespace shadowllm
