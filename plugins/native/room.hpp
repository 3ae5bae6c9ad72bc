// Divides one stretch of memory into pieces.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace shadowllm {

// Rounds up to whole cache lines, which are also whole vectors.
constexpr size_t whole_lines(size_t floats) { return (floats + 15) / 16 * 16; }

// Takes pieces of memory one after the other, each from a cache line on. Without memory, it only measures.
class Room {
 public:
  explicit Room(float* start) : start_(start) {}
  float* floats(size_t count) {
    float* piece = start_ == nullptr ? nullptr : start_ + used_;
    used_ += whole_lines(count);
    return piece;
  }
  int32_t* integers(size_t count) { return reinterpret_cast<int32_t*>(floats(count)); }
  size_t used() const { return used_; }

 private:
  float* start_;
  size_t used_ = 0;
};

}  // namespace shadowllm
