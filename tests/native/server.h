// A program that runs CUDA kernels under emulation, as a server: calls come in on stdin, results go out on
// stdout, both as server.py packs them. Each tensor is an allocation of its own, so that ASan sees whatever
// lies beyond.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
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

// Addresses of which only those that are touched have memory, zeros at first; nothing can be read
// or written beyond.
class Range {
 public:
  explicit Range(size_t bytes) : size_((bytes + kPage - 1) / kPage * kPage) {
    void* const memory = mmap(nullptr, size_ + kPage, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::perror("mmap"), std::abort();
    begin_ = static_cast<char*>(memory);
    data_ = begin_ + (size_ - bytes) / 256 * 256;
    mprotect(begin_ + size_, kPage, PROT_NONE);
    slack_ = size_ - (data_ - begin_) - bytes;
    __asan_poison_memory_region(begin_ + size_ - slack_, slack_);
  }
  ~Range() {
    if (begin_ == nullptr) return;
    __asan_unpoison_memory_region(begin_ + size_ - slack_, slack_);
    munmap(begin_, size_ + kPage);
  }
  Range(Range&& other) noexcept
      : size_(other.size_),
        slack_(other.slack_),
        begin_(std::exchange(other.begin_, nullptr)),
        data_(other.data_) {}

  char* data() const { return data_; }

 private:
  static constexpr size_t kPage = 4096;
  size_t size_, slack_;
  char *begin_, *data_;
};

// A tensor, of rows perhaps, which begins `offset` bytes past a 256-byte boundary, as CUDA's allocations lie.
// Of a vast one, what comes and goes is windows: parts of it.
class Tensor {
 public:
  Tensor() = default;
  static Tensor received() {
    Tensor t;
    t.name = read_text();
    t.offset_ = read<uint64_t>();
    t.stride = read<int64_t>();
    const auto bytes = read<uint64_t>();
    const auto windows = read<uint32_t>();
    if (windows == 0) {
      // Ends with its last byte: what aligned_alloc rounds up is not the tensor's.
      void* memory = nullptr;
      if (posix_memalign(&memory, 256, t.offset_ + bytes + 1) != 0) std::abort();
      t.memory_.reset(static_cast<char*>(memory));
      t.windows_ = {{0, bytes}};
    } else {
      t.range_.emplace(bytes);
    }
    for (uint32_t i = 0; i < windows; ++i) {
      const auto at = read<uint64_t>();
      t.windows_.push_back({at, read<uint64_t>()});
    }
    for (const Window& w : t.windows_) read(t.data() + w.at, w.bytes);
    return t;
  }
  void send() const {
    for (const Window& w : windows_) std::fwrite(data() + w.at, 1, w.bytes, stdout);
  }

  // Null where the call has no such tensor.
  template <class T>
  T* values() const {
    return is_there() ? reinterpret_cast<T*>(data()) : nullptr;
  }
  bool is_vast() const { return range_.has_value(); }

  std::string name;
  int64_t stride = 0;

 private:
  struct Window {
    size_t at, bytes;
  };
  bool is_there() const { return memory_ != nullptr || is_vast(); }
  char* data() const { return is_vast() ? range_->data() : memory_.get() + offset_; }
  std::unique_ptr<char, Free> memory_;
  std::optional<Range> range_;
  std::vector<Window> windows_;
  size_t offset_ = 0;
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
    const auto is_vast = [](const Tensor& t) { return t.is_vast(); };
    const bool any = std::any_of(call.tensors.begin(), call.tensors.end(), is_vast);
    emulation::device.ends = any ? 2 : 0;
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
