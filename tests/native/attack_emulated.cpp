// The attack family's CUDA kernels under emulation, as a server: calls come in on stdin, results go out on
// stdout, both as emulated.py packs them. Each tensor is an allocation of its own, so that ASan sees whatever
// lies beyond.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "attack/apgd_step.h"
#include "attack/fast_bat_step.h"
#include "attack/pgd_step.h"
#include "attack/project.h"
#include "attack/random_start.h"
#include "device.h"
#include "support/dtypes.h"

namespace blokern {
namespace {

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) std::exit(std::feof(stdin) ? 0 : 4);
}
template <class V>
V read() {
  V value;
  read(&value, sizeof(V));
  return value;
}
std::string read_text() {
  std::string text(read<uint32_t>(), '\0');
  read(text.data(), text.size());
  return text;
}

struct Free {
  void operator()(char* bytes) const { std::free(bytes); }
};

// A tensor of rows, which begins `offset` bytes past a 256-byte boundary, as CUDA's allocations lie.
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

  template <class T>
  Rows<T> rows() const {
    return {reinterpret_cast<T*>(data()), stride};
  }
  template <class T>
  const T* values() const {
    return memory_ == nullptr ? nullptr : reinterpret_cast<const T*>(data());
  }

  std::string name;
  int64_t stride = 0;

 private:
  char* data() const { return memory_.get() + offset_; }
  std::unique_ptr<char, Free> memory_;
  size_t offset_ = 0, bytes_ = 0;
};

struct Call {
  std::string op, image, grad;
  int64_t samples, size;
  double step_size, eps, momentum;
  Box clip;
  uint64_t seed;
  int64_t first;
  std::vector<Tensor> tensors;
  Tensor none;

  const Tensor& at(const std::string& name) const {
    for (const Tensor& t : tensors) {
      if (t.name == name) return t;
    }
    return none;
  }
  Batch batch() const { return {samples, size, at("active").values<bool>()}; }
  PerSample steps() const { return {step_size, at("step_size").values<double>()}; }
  PerSample radii() const { return {eps, at("eps").values<double>()}; }
};

Call received() {
  Call call{};
  emulation::device.schedule = static_cast<emulation::Schedule>(read<int32_t>());
  emulation::device.seed = read<uint32_t>();
  call.op = read_text();
  call.image = read_text();
  call.grad = read_text();
  call.samples = read<int64_t>();
  call.size = read<int64_t>();
  call.step_size = read<double>();
  call.eps = read<double>();
  call.momentum = read<double>();
  call.clip.min = read<double>();
  call.clip.max = read<double>();
  call.seed = read<uint64_t>();
  call.first = read<int64_t>();
  const auto count = read<uint32_t>();
  for (uint32_t i = 0; i < count; ++i) call.tensors.push_back(Tensor::received());
  return call;
}

// op(params, cuda) with the kernel that the name says.
#define BY_NORM(name)                                        \
  if (call.op == #name "_linf") return name##_linf(p, cuda); \
  if (call.op == #name "_l2") return name##_l2(p, cuda);     \
  if (call.op == #name "_l1") return name##_l1(p, cuda);

template <class T, class G>
void run(const Call& call, const CudaCall& cuda) {
  const auto starts_with = [&](const char* op) { return call.op.rfind(op, 0) == 0; };
  const Rows<const G> grad = call.at("grad").rows<const G>();
  const Rows<const T> x = call.at("x").rows<const T>();
  if (starts_with("pgd_step")) {
    const PgdStep<T, G> p{call.batch(),
                          call.at("x_adv").rows<const T>(),
                          x,
                          grad,
                          call.at("out").rows<T>(),
                          call.steps(),
                          call.radii(),
                          call.clip};
    BY_NORM(pgd_step)
  }
  if (starts_with("apgd_step")) {
    const ApgdStep<T, G> p{call.batch(),
                           call.at("x_adv").rows<T>(),
                           call.at("x_prev").rows<T>(),
                           x,
                           grad,
                           call.steps(),
                           call.radii(),
                           call.momentum,
                           call.at("keep").values<int64_t>(),
                           call.clip};
    BY_NORM(apgd_step)
  }
  if (starts_with("fast_bat_step")) {
    const FastBatStep<T, G> p{call.batch(),
                              call.at("z").rows<const T>(),
                              x,
                              grad,
                              call.at("out").rows<T>(),
                              call.at("free").rows<bool>(),
                              call.steps(),
                              call.radii(),
                              call.clip};
    return fast_bat_step(p, cuda);
  }
  if constexpr (std::is_same_v<T, G>) {
    if (starts_with("project")) {
      const Project<T> p{
          call.batch(), call.at("x_adv").rows<const T>(), x, call.at("out").rows<T>(), call.radii(),
          call.clip};
      BY_NORM(project)
    }
    if (starts_with("random_start")) {
      const RandomStart<T> p{call.batch(), x,         call.at("out").rows<T>(), call.radii(), call.clip,
                             call.seed,    call.first};
      BY_NORM(random_start)
    }
  }
  emulation::fail("no kernel for " + call.op + " of " + call.image + " and " + call.grad);
}

template <class T>
const char* name_of() {
  if (std::is_same_v<T, double>) return "float64";
  if (std::is_same_v<T, float>) return "float32";
  return std::is_same_v<T, c10::Half> ? "float16" : "bfloat16";
}

void run(const Call& call, const CudaCall& cuda) {
#define TRY(T, G) \
  if (call.image == name_of<T>() && call.grad == name_of<G>()) return run<T, G>(call, cuda);
  BLOKERN_FOR_IMAGE_AND_GRAD(TRY)
#undef TRY
  emulation::fail("no kernel for images of " + call.image + " and gradients of " + call.grad);
}

}  // namespace
}  // namespace blokern

int main() {
  using namespace blokern;
  for (;;) {
    const Call call = received();
    std::vector<std::unique_ptr<char, Free>> zeros;
    const CudaCall cuda{nullptr, [&](size_t bytes) {
                          zeros.emplace_back(static_cast<char*>(std::calloc(1, bytes)));
                          return static_cast<void*>(zeros.back().get());
                        }};
    run(call, cuda);
    for (const Tensor& t : call.tensors) t.send();
    std::fflush(stdout);
  }
}
