// The curvature family's CUDA kernels under emulation (server.h); emulated_curvature.py is the other end.
#include "curvature/activation.h"
#include "curvature/batch_norm.h"
#include "curvature/layer_norm.h"
#include "curvature/multi_tensor.h"
#include "curvature/softmax_cross_entropy_hvp.h"
#include "server.h"

namespace blokern {
namespace {

// The tensors of a call by their names in the kernels' parameters; null where it has none.
struct Call {
  const server::Call& given;

  template <class T>
  T* at(const std::string& name) const {
    return given.at(name).values<T>();
  }
  double number(const std::string& name) const { return given.number(name); }
  int64_t count(const std::string& name) const { return given.count(name); }
};

LabelWeights labels(const Call& call) {
  return {call.at<const int64_t>("labels"), call.count("rows"), call.count("classes"),
          call.at<const double>("weight"), call.count("ignore_index")};
}

template <class T>
void softmax_cross_entropy_hvp(const Call& call, const CudaCall& cuda) {
  const SoftmaxCrossEntropyHvp<T> p{call.count("rows"),
                                    call.count("classes"),
                                    call.at<const T>("logits"),
                                    call.at<const T>("tangent"),
                                    call.at<const T>("target"),
                                    call.at<const int64_t>("labels"),
                                    call.at<const Accum<T>>("weight"),
                                    call.count("ignore_index"),
                                    call.number("label_smoothing"),
                                    call.number("factor"),
                                    call.at<const double>("count"),
                                    call.at<T>("grad"),
                                    call.at<T>("hvp"),
                                    call.at<double>("loss")};
  blokern::softmax_cross_entropy_hvp(p, cuda);
}

template <class T>
void activation_adjoint_tangent(const Call& call, const CudaCall& cuda) {
  const Activation<T> p{call.count("size"),       call.at<const T>("saved"),    call.at<const T>("x_dot"),
                        call.at<const T>("grad"), call.at<const T>("grad_dot"), call.at<T>("x_bar"),
                        call.at<T>("x_bar_dot")};
  const auto run = [&](auto phi) { blokern::activation_adjoint_tangent(p, phi, cuda); };
  const std::string name = call.given.op.substr(0, call.given.op.find("_adjoint_tangent"));
  if (name == "tanh") return run(Tanh{});
  if (name == "sigmoid") return run(Sigmoid{});
  if (name == "silu") return run(Silu{});
  if (name == "gelu") return run(Gelu{});
  if (name == "gelu_tanh") return run(GeluTanh{});
  if (name == "softplus") return run(Softplus{call.number("beta"), call.number("threshold")});
  if (name == "elu") {
    return run(Elu{call.number("alpha"), call.number("scale"), call.number("input_scale")});
  }
  emulation::fail("no activation " + name);
}

Channels channels(const Call& call) {
  return {call.count("samples"), call.count("channels"), call.count("pixels"),
          call.number("channels_inner") != 0};
}

ChannelValues values(const Call& call) {
  return {call.at<const double>("mean"), call.at<const double>("rstd"), call.at<const double>("weight"),
          call.at<const double>("weight_dot"), call.at<const double>("bias_dot")};
}

template <class T>
void batch_norm_tangent(const Call& call, const CudaCall& cuda) {
  const BatchNormTangent<T> p{channels(call),
                              values(call),
                              call.number("train") != 0,
                              call.at<const T>("x"),
                              call.at<const T>("x_dot"),
                              call.at<const T>("gate"),
                              call.at<T>("y_dot")};
  blokern::batch_norm_tangent(p, cuda);
}

template <class T>
void batch_norm_adjoint(const Call& call, const CudaCall& cuda) {
  const BatchNormAdjoint<T> p{channels(call),
                              values(call),
                              call.number("train") != 0,
                              call.at<const T>("x"),
                              call.at<const T>("x_dot"),
                              call.at<const T>("grad"),
                              call.at<const T>("grad_dot"),
                              call.at<const T>("gate"),
                              call.at<T>("x_bar"),
                              call.at<T>("x_bar_dot"),
                              call.at<double>("weight_bar"),
                              call.at<double>("bias_bar")};
  blokern::batch_norm_adjoint(p, cuda);
}

template <class T>
NormRows<T> norm_rows(const Call& call) {
  using A = Accum<T>;
  return {call.count("rows"),
          call.count("size"),
          call.count("kinds"),
          call.at<const T>("x"),
          call.at<const double>("mean"),
          call.at<const double>("rstd"),
          call.at<const A>("weight"),
          call.at<const A>("weight_dot"),
          call.at<const A>("bias_dot")};
}

template <class T>
void layer_norm_tangent(const Call& call, const CudaCall& cuda) {
  const LayerNormTangent<T> p{norm_rows<T>(call), call.at<const T>("x_dot"), call.at<T>("y_dot")};
  blokern::layer_norm_tangent(p, cuda);
}

template <class T>
void layer_norm_adjoint_tangent(const Call& call, const CudaCall& cuda) {
  using A = Accum<T>;
  const LayerNormAdjointTangent<T> p{
      norm_rows<T>(call),       call.count("blocks"),         call.at<const T>("x_dot"),
      call.at<const T>("grad"), call.at<const T>("grad_dot"), call.at<T>("x_bar"),
      call.at<T>("x_bar_dot"),  call.at<A>("weight_bar_dot"), call.at<A>("bias_bar_dot")};
  blokern::layer_norm_adjoint_tangent(p, cuda);
}

// The tensors of a list of one type, make(i) being the i-th's parameters.
template <class Make>
auto list_of(const Call& call, Make make) {
  std::vector<ListTensor<decltype(make(0))>> list;
  for (int64_t i = 0; i < call.count("tensors"); ++i) {
    const std::string index = std::to_string(i);
    list.push_back({make(i), call.count("size" + index), call.count("place" + index)});
  }
  return list;
}

template <class T>
void multi_tensor(const Call& call, const CudaCall& cuda) {
  const auto at = [&](const char* name, int64_t i) { return call.at<T>(name + std::to_string(i)); };
  const auto number = [&](const char* name) { return call.at<const double>(name); };
  const BlockSums sums{call.at<double>("sums"), call.count("columns"), call.count("places")};
  if (call.given.op == "multi_tensor_dot") {
    const auto list = list_of(call, [&](int64_t i) { return Dot<T>{at("a", i), at("b", i)}; });
    return dot(std::span<const ListTensor<Dot<T>>>(list), sums, cuda);
  }
  if (call.given.op == "multi_tensor_axpby_") {
    const auto list = list_of(
        call, [&](int64_t i) { return Axpby<T>{at("y", i), at("x", i), number("of_x"), number("of_y")}; });
    return axpby(std::span<const ListTensor<Axpby<T>>>(list), sums.columns, cuda);
  }
  const auto list = list_of(call, [&](int64_t i) {
    return CgUpdate<T>{at("x", i), at("r", i), at("p", i), at("ap", i), number("alpha")};
  });
  cg_update(std::span<const ListTensor<CgUpdate<T>>>(list), sums, cuda);
}

template <class T>
void run(const Call& call, const CudaCall& cuda) {
  const std::string& op = call.given.op;
  if (op == "cg_update_" || op.starts_with("multi_tensor")) return multi_tensor<T>(call, cuda);
  if (op == "softmax_cross_entropy_hvp") return softmax_cross_entropy_hvp<T>(call, cuda);
  if (op == "batch_norm_tangent") return batch_norm_tangent<T>(call, cuda);
  if (op == "batch_norm_adjoint") return batch_norm_adjoint<T>(call, cuda);
  if (op == "layer_norm_tangent") return layer_norm_tangent<T>(call, cuda);
  if (op == "layer_norm_adjoint_tangent") return layer_norm_adjoint_tangent<T>(call, cuda);
  activation_adjoint_tangent<T>(call, cuda);
}

void run(const Call& call, const CudaCall& cuda) {
  if (call.given.op == "label_weights") return label_weights(labels(call), call.at<double>("total"), cuda);
  if (call.given.op == "total_of_blocks") {
    const BlockSums sums{call.at<double>("sums"), call.count("columns"), call.count("places")};
    return total_of_blocks(sums, call.at<double>("total"), cuda);
  }
  if (call.given.op == "layer_norm_blocks") {
    *call.at<double>("blocks") =
        static_cast<double>(layer_norm_blocks(call.count("rows"), call.count("kinds")));
    return;
  }
#define TRY(T) \
  if (call.given.dtypes[0] == server::name_of<T>()) return run<T>(call, cuda);
  BLOKERN_FOR_IMAGE(TRY)
#undef TRY
  emulation::fail("no kernel for " + call.given.op + " of " + call.given.dtypes[0]);
}

}  // namespace
}  // namespace blokern

int main() {
  server::serve([](const server::Call& call, const blokern::CudaCall& cuda) { blokern::run({call}, cuda); });
}
