// A program that runs CUDA kernels under emulation, as a server: calls come in on stdin, results go out on
// stdout, both as server.py packs them. Each tensor is an allocation of its own, so that ASan sees whatever
// lies beyond.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "device.h"
#include "support/cuda/call.h"
#include "support/dtypes.h"

namespace server {

inline void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) std::exit(std::feof(stdin) ? 0 : 4);
}
template <class V>
V read() {
  V value;
  read(&value, sizeof(V));
  return value;
}
inline std::string read_text() {
  std::string text(read<uint32_t>(), '\0');
  read(text.data(), text.size());
  return text;
}

struct Free {
  void operator()(char* bytes) const { std::free(bytes); }
};

// A tensor, of rows perhaps, which begins `offset` bytes past a 256-byte boundary, as CUDA's allocations lie.
class Tensor {
 public:
  Tensor() = default;
  static Tensor received() {
    Tensor t;
    t.name = read_text();
    t.offset_ = read<uint64_t>();
    t.stride = read<int64_t>();
    t.bytes_ = read<uint64_t>();
    // Ends with its last byte: what aligned_alloc rounds up is not the tensor's.
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, t.offset_ + t.bytes_ + 1) != 0) std::abort();
    t.memory_.reset(static_cast<char*>(memory));
    read(t.data(), t.bytes_);
    return t;
  }
  void send() const { std::fwrite(data(), 1, bytes_, stdout); }

  // Null where the call has no such tensor.
  template <class T>
  T* values() const {
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(data());
  }

  std::string name;
  int64_t stride = 0;

 private:
  char* data() const { return memory_.get() + offset_; }
  std::unique_ptr<char, Free> memory_;
  size_t offset_ = 0, bytes_ = 0;
};

struct Call {
  std::string op;
  std::vector<std::string> dtypes;
  std::map<std::string, double> numbers;
  std::vector<Tensor> tensors;
  Tensor none;

  static Call received() {
    Call call;
    emulation::device.schedule = static_cast<emulation::Schedule>(read<int32_t>());
    emulation::device.seed = read<uint32_t>();
    call.op = read_text();
    for (auto count = read<uint32_t>(); count > 0; --count) call.dtypes.push_back(read_text());
    for (auto count = read<uint32_t>(); count > 0; --count) {
      const std::string name = read_text();
      call.numbers[name] = read<double>();
    }
    for (auto count = read<uint32_t>(); count > 0; --count) call.tensors.push_back(Tensor::received());
    return call;
  }

  const Tensor& at(const std::string& name) const {
    for (const Tensor& t : tensors) {
      if (t.name == name) return t;
    }
    return none;
  }
  double number(const std::string& name) const {
    if (numbers.count(name) == 0) emulation::fail("no number " + name + " for " + op);
    return numbers.at(name);
  }
  int64_t count(const std::string& name) const { return static_cast<int64_t>(number(name)); }
};

template <class T>
const char* name_of() {
  if (std::is_same_v<T, double>) return "float64";
  if (std::is_same_v<T, float>) return "float32";
  return std::is_same_v<T, c10::Half> ? "float16" : "bfloat16";
}

// run(call, cuda) for every call, until there are no more.
template <class Run>
[[noreturn]] void serve(Run run) {
  for (;;) {
    const Call call = Call::received();
    std::vector<std::unique_ptr<char, Free>> zeros;
    run(call, blokern::CudaCall{nullptr, [&](size_t bytes) {
                                  zeros.emplace_back(static_cast<char*>(std::calloc(1, bytes)));
                                  return static_cast<void*>(zeros.back().get());
                                }});
    for (const Tensor& t : call.tensors) t.send();
    std::fflush(stdout);
  }
}

}  // namespace server
