// Runs the calls in a file with the C++ launcher. Each call is int64 batch, seqlen and length of the program, then the
// program. With PROBE_CAPTURES, each call is made again while a stream is under capture. Inputs begin PROBE_INPUT
// bytes, and outputs PROBE_OUTPUT bytes, after an aligned address. probe.py does the same in Python.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>

#include "launcher.hpp"

using shadowllm::Error;
using shadowllm::Launcher;

namespace {

int64_t number(std::istream& from) {
  int64_t value = 0;
  from.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

size_t offset(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? 0 : size_t(std::atoi(text));
}

std::unique_ptr<Launcher> open(std::string packed) {
  try {
    return std::make_unique<Launcher>(std::move(packed));
  } catch (const Error&) {
    std::printf("refused\n");
    return nullptr;
  }
}

void run(Launcher& launcher, int64_t batch, int64_t seqlen) {
  const int64_t dims[] = {batch, seqlen, 576};
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  for (size_t i = 0; i < launcher.program.inputs.size(); ++i)
    inputs.push_back(reinterpret_cast<void*>(0x100000000 * (i + 1) + offset("PROBE_INPUT")));
  for (size_t i = 0; i < launcher.program.outputs.size(); ++i)
    outputs.push_back(reinterpret_cast<void*>(0x1000000000 * (i + 1) + offset("PROBE_OUTPUT")));
  const auto launch = [&] {
    launcher.run(dims, 3, inputs.data(), outputs.data(), reinterpret_cast<void*>(0x7f0000000000),
                 reinterpret_cast<shadowllm::Stream>(0x55));
  };
  try {
    launch();
    if (std::getenv("PROBE_CAPTURES") != nullptr) {
      setenv("FAKE_CAPTURES", "1", 1);
      launch();
    }
  } catch (const Error& error) {
    std::printf("error: %s\n", error.what());
  }
}

}  // namespace

int main(int, char** arguments) {
  std::ifstream calls(arguments[1], std::ios::binary);
  for (int i = 0; calls.peek() != EOF; ++i) {
    const int64_t batch = number(calls), seqlen = number(calls);
    std::string packed(size_t(number(calls)), '\0');
    calls.read(packed.data(), std::streamsize(packed.size()));
    std::printf("call %d\n", i);
    if (const auto launcher = open(std::move(packed))) run(*launcher, batch, seqlen);
    std::fflush(stdout);
  }
}
