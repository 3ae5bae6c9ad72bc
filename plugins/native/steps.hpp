// Steps that the threads of a pool do together, one after the other, in one visit to the pool. Each visit costs several
// microseconds, in which a small step would be done.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <thread>

#include "op.hpp"

namespace shadowllm {

// Lets the other thread of a core run, in a loop that waits.
inline void pause_thread() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Steps {
 public:
  // Adds a step of tasks, which may run at the same time. It starts when the step before has ended. Tasks must not
  // throw, and must not wait for each other.
  template <class Body>
  void add(size_t tasks, Body body) {
    if (tasks > 0) steps_.emplace_back(tasks, body);
  }

  // Each thread takes tasks of a step until none is left, and then waits for those that other threads took. So no
  // thread waits for one that has not started: if the pool has one free thread, it does everything.
  void run(const Pool& pool) {
    static const size_t cores = std::max(1u, std::thread::hardware_concurrency());
    size_t most = 0;
    for (const Step& step : steps_) most = std::max(most, step.tasks);
    pool.run(std::min(cores, most), [&](size_t) {
      for (Step& step : steps_) step.take_part();
    });
  }

 private:
  struct Step {
    template <class Body>
    Step(size_t tasks, Body body) : tasks(tasks), body(body) {}

    void take_part() {
      for (size_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        body(task);
        done.fetch_add(1, std::memory_order_release);
      }
      for (size_t turns = 0; done.load(std::memory_order_acquire) < tasks; ++turns)
        turns < kTurns ? pause_thread() : std::this_thread::yield();
    }

    static constexpr size_t kTurns = 4096;  // of a loop that waits, before it lets other threads of the machine run

    const size_t tasks;
    const std::function<void(size_t)> body;
    std::atomic<size_t> next{0}, done{0};
  };

  std::deque<Step> steps_;
};

// Adds a step that calls body(part, c) for each chunk c of each of the parts, which have `chunks`. Chunk c of all parts
// is one task, so that what they read together is read from memory once. Each part is computed as it would be alone.
template <class Part, class Body>
void add_chunks(Steps& steps, const std::vector<Part>& parts, Body body) {
  size_t most = 0;
  for (const Part& part : parts) most = std::max(most, part.chunks.count());
  steps.add(most, [&parts, body](size_t c) {
    for (const Part& part : parts)
      if (c < part.chunks.count()) body(part, c);
  });
}

}  // namespace shadowllm
