// The attack family's CUDA kernels under emulation (server.h); emulated.py is the other end.
#include "attack/apgd_step.h"
#include "attack/fast_bat_step.h"
#include "attack/pgd_step.h"
#include "attack/project.h"
#include "attack/random_start.h"
#include "server.h"

namespace blokern {
namespace {

struct Call {
  const server::Call& given;
  const std::string& op = given.op;

  template <class T>
  Box clip() const {
    return box_in<T>({given.number("clip_min"), given.number("clip_max")});
  }

  Batch batch() const {
    return {given.count("samples"), given.count("size"), given.at("active").values<const bool>()};
  }
  PerSample per_sample(const char* name) const {
    return {given.number(name), given.at(name).values<const double>()};
  }
  PerSample steps() const { return per_sample("step_size"); }
  PerSample radii() const { return per_sample("eps"); }
  uint64_t seed() const {
    return static_cast<uint64_t>(given.number("seed_high")) << 32 |
           static_cast<uint64_t>(given.number("seed_low"));
  }

  template <class T>
  Rows<T> rows(const char* name) const {
    const server::Tensor& t = given.at(name);
    return {t.values<T>(), t.stride};
  }
};

// op(params, cuda) with the kernel that the name says.
#define BY_NORM(name)                                        \
  if (call.op == #name "_linf") return name##_linf(p, cuda); \
  if (call.op == #name "_l2") return name##_l2(p, cuda);     \
  if (call.op == #name "_l1") return name##_l1(p, cuda);

template <class T, class G>
void run(const Call& call, const CudaCall& cuda) {
  const auto starts_with = [&](const char* op) { return call.op.rfind(op, 0) == 0; };
  const Rows<const G> grad = call.rows<const G>("grad");
  const Rows<const T> x = call.rows<const T>("x");
  if (starts_with("pgd_step")) {
    const PgdStep<T, G> p{
        call.batch(),  call.rows<const T>("x_adv"), x, grad, call.rows<T>("out"), call.steps(), call.radii(),
        call.clip<T>()};
    BY_NORM(pgd_step)
  }
  if (starts_with("apgd_step")) {
    const ApgdStep<T, G> p{call.batch(),
                           call.rows<T>("x_adv"),
                           call.rows<T>("x_prev"),
                           x,
                           grad,
                           call.steps(),
                           call.radii(),
                           call.given.number("momentum"),
                           call.given.at("keep").values<const int64_t>(),
                           call.clip<T>()};
    BY_NORM(apgd_step)
  }
  if (starts_with("fast_bat_step")) {
    const FastBatStep<T, G> p{call.batch(),
                              call.rows<const T>("z"),
                              x,
                              grad,
                              call.rows<T>("out"),
                              call.rows<bool>("free"),
                              call.steps(),
                              call.radii(),
                              call.clip<T>()};
    return fast_bat_step(p, cuda);
  }
  if constexpr (std::is_same_v<T, G>) {
    if (starts_with("project")) {
      const Project<T> p{call.batch(),  call.rows<const T>("x_adv"), x, call.rows<T>("out"), call.radii(),
                         call.clip<T>()};
      BY_NORM(project)
    }
    if (starts_with("random_start")) {
      const RandomStart<T> p{call.batch(),   x,           call.rows<T>("out"),      call.radii(),
                             call.clip<T>(), call.seed(), call.given.count("first")};
      BY_NORM(random_start)
    }
  }
  emulation::fail("no kernel for " + call.op + " of images of " + server::name_of<T>());
}

void run(const server::Call& call, const CudaCall& cuda) {
#define TRY(T, G)                                                                          \
  if (call.dtypes == std::vector<std::string>{server::name_of<T>(), server::name_of<G>()}) \
    return run<T, G>({call}, cuda);
  BLOKERN_FOR_IMAGE_AND_GRAD(TRY)
#undef TRY
  emulation::fail("no kernel for images of " + call.dtypes[0] + " and gradients of " + call.dtypes[1]);
}

}  // namespace
}  // namespace blokern

int main() {
  server::serve([](const server::Call& call, const blokern::CudaCall& cuda) { blokern::run(call, cuda); });
}
