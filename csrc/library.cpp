// Every op's schema, on one page. Kernels: <family>/register_<device>.cpp; fakes: blokern/ops/<family>.py.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <string>
#include <vector>

namespace {

// Images are [N, ...]. step_size and eps are float64 [N]; where they are none, all samples have the uniform
// one. norm: its p, 0 for infinity. active is bool [N], and a sample where it is false stays as it is.
constexpr const char* kAttack[] = {
    "pgd_step(Tensor x_adv, Tensor x, Tensor grad, float uniform_step_size, float uniform_eps,"
    " Tensor? step_size, Tensor? eps, int norm, float clip_min, float clip_max, Tensor? active) -> Tensor",
    "pgd_step_(Tensor(a!) x_adv, Tensor x, Tensor grad, float uniform_step_size, float uniform_eps,"
    " Tensor? step_size, Tensor? eps, int norm, float clip_min, float clip_max, Tensor? active) -> ()",
    "project(Tensor x_adv, Tensor x, float uniform_eps, Tensor? eps, int norm, float clip_min,"
    " float clip_max, Tensor? active) -> Tensor",
    "project_(Tensor(a!) x_adv, Tensor x, float uniform_eps, Tensor? eps, int norm, float clip_min,"
    " float clip_max, Tensor? active) -> ()",
    "apgd_step_(Tensor(a!) x_adv, Tensor(b!) x_prev, Tensor x, Tensor grad, float uniform_step_size,"
    " float uniform_eps, Tensor? step_size, Tensor? eps, float momentum, int norm, float clip_min,"
    " float clip_max, Tensor? keep, Tensor? active) -> ()",
    "random_start(Tensor x, float uniform_eps, Tensor? eps, int norm, float clip_min, float clip_max,"
    " int first, Generator? generator) -> Tensor",
    "fast_bat_step(Tensor z, Tensor x, Tensor grad, float uniform_step_size, float uniform_eps,"
    " Tensor? step_size, Tensor? eps, float clip_min, float clip_max) -> (Tensor delta, Tensor free)",
};

// Masks are words, int64 [rows, ⌈cols / 64⌉]; a stream is (start, column, block, words), see sparse/stream.h,
// and the products also carry that of the transposed mask, for their derivatives: none where no derivative is
// wanted. dense_grad is for the derivatives too: a weight's gradient whatever the mask.
#define STREAMS                                                                                \
  "Tensor start, Tensor column, int block, Tensor? words, Tensor? start_t, Tensor? column_t, " \
  "int block_t, Tensor? words_t"
// A convolution's Plan, see ops/convolution.py.
#define PLANS \
  "Tensor[] streams, Tensor[] streams_t, int[] geometry, int[] geometry_t, int[] numbers, Tensor words"
constexpr const char* kMasks[] = {
    "mask_words(Tensor mask) -> Tensor",
    "words_mask(Tensor words, int cols) -> Tensor",
    "transpose_words(Tensor words, int cols) -> Tensor",
    "mask_stream(Tensor words, int cols, int block) -> (Tensor start, Tensor column)",
    "conv2d_entries(Tensor words, int[] weight, int groups, int[] place, int plane, int block, bool "
    "transposed)"
    " -> (Tensor start, Tensor source, Tensor offset)",
    "count_words(Tensor words) -> Tensor",
    // Of words on the host: what their content is known by, see ops/mask.py; and a weight's masked entries to
    // zero, which no autograd graph may notice: whoever has saved the weight has seen zeros there.
    "mask_check(Tensor words) -> int",
    "mask_fingerprint(Tensor words, Tensor check) -> int",
    "clear_masked_(Tensor(a!) weight, Tensor words) -> ()",
};
constexpr const char* kProducts[] = {
    "spmm(Tensor weight, Tensor x, Tensor? bias, " STREAMS ", bool dense_grad=False) -> Tensor",
    "sddmm(Tensor a, Tensor b, " STREAMS ") -> Tensor",
    "masked_conv2d(Tensor x, Tensor weight, Tensor? bias, " PLANS ", bool dense_grad) -> Tensor",
    "masked_conv2d_input(Tensor grad, Tensor weight, " PLANS ", bool dense_grad) -> Tensor",
    "masked_conv2d_weight(Tensor grad, Tensor x, " PLANS ", int[] weight_shape) -> Tensor",
    "conv2d_weight(Tensor grad, Tensor x, int[] geometry, int[] weight_shape, int[] numbers) -> Tensor",
};
constexpr const char* kPacked[] = {
    "packed_values(Tensor weight, Tensor start, Tensor column, int block) -> Tensor",
    "packed_spmm(Tensor values, Tensor x, Tensor? bias, Tensor start, Tensor column, int block, int rows)"
    " -> Tensor",
};
#undef STREAMS
#undef PLANS

// One mask a tensor, of its shape; a selection is over the whole list, or over each tensor by itself.
constexpr const char* kSelections[] = {
    "topk_mask(Tensor[] scores, float density, bool per_layer) -> Tensor[]",
    "nm_mask(Tensor scores, int n, int m, int dim) -> Tensor",
};

// Steps over a list of layers, in place; words are the layers' masks, momentum_buffers none or one a layer.
constexpr const char* kSteps[] = {
    "bip_score_step_(Tensor(a!)[] scores, Tensor[] weights, Tensor[] grads, Tensor[] words,"
    " Tensor(b!)[] momentum_buffers, float lr, float gamma, float momentum, float weight_decay) -> ()",
    "bip_released_step_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momentum_buffers, float lr, float "
    "gamma, float momentum, float weight_decay) -> ()",
    "masked_sgd_step_(Tensor(a!)[] weights, Tensor[] grads, Tensor[] words, Tensor(b!)[] momentum_buffers,"
    " float lr, float momentum, float weight_decay) -> ()",
};

// Batch normalisation's derivatives; statistics and γ are [C]. Tangents, or the adjoint alone, may be
// stacks of vectors, and results then are; gate: the output of a ReLU that follows; weight_bar and
// bias_bar are float64.
#define ACTIVATION "Tensor grad, Tensor grad_dot, Tensor saved, Tensor x_dot, bool adjoint"
#define STATISTICS "Tensor mean, Tensor rstd, Tensor? weight"
constexpr const char* kCurvature[] = {
    // saved: the activation's input, or for tanh and sigmoid its output.
    "tanh_adjoint_tangent(" ACTIVATION ") -> (Tensor x_bar, Tensor x_bar_dot)",
    "sigmoid_adjoint_tangent(" ACTIVATION ") -> (Tensor x_bar, Tensor x_bar_dot)",
    "silu_adjoint_tangent(" ACTIVATION ") -> (Tensor x_bar, Tensor x_bar_dot)",
    "gelu_adjoint_tangent(" ACTIVATION ") -> (Tensor x_bar, Tensor x_bar_dot)",
    "gelu_tanh_adjoint_tangent(" ACTIVATION ") -> (Tensor x_bar, Tensor x_bar_dot)",
    "softplus_adjoint_tangent(" ACTIVATION
    ", float beta, float threshold) -> (Tensor x_bar, Tensor x_bar_dot)",
    "elu_adjoint_tangent(" ACTIVATION
    ", float alpha, float scale, float input_scale)"
    " -> (Tensor x_bar, Tensor x_bar_dot)",
    // target: int64 labels [N], or [N, C] like logits; mean, or the sum.
    "softmax_cross_entropy_hvp(Tensor logits, Tensor tangent, Tensor target, Tensor? weight, int "
    "ignore_index,"
    " bool mean, float label_smoothing) -> (Tensor loss, Tensor grad, Tensor hvp)",
    "batch_norm_tangent(Tensor x, Tensor x_dot, " STATISTICS
    ", Tensor? weight_dot, Tensor? bias_dot,"
    " Tensor? gate, bool train) -> Tensor",
    "batch_norm_adjoint(Tensor grad, Tensor x, " STATISTICS
    ", Tensor? gate, bool train)"
    " -> (Tensor x_bar, Tensor weight_bar, Tensor bias_bar)",
    "batch_norm_adjoint_tangent(Tensor grad, Tensor grad_dot, Tensor x, Tensor x_dot, " STATISTICS
    ", Tensor? weight_dot, Tensor? gate, bool train, bool adjoint)"
    " -> (Tensor x_bar, Tensor x_bar_dot, Tensor weight_bar_dot, Tensor bias_bar_dot)",
    // The same of rows [M, D], statistics [M]; weights are [kinds, D], row m with those of m mod kinds.
    "layer_norm_tangent(Tensor x, Tensor x_dot, " STATISTICS
    ", Tensor? weight_dot, Tensor? bias_dot) -> Tensor",
    "layer_norm_adjoint_tangent(Tensor grad, Tensor grad_dot, Tensor x, Tensor x_dot, " STATISTICS
    ", Tensor? weight_dot, bool adjoint)"
    " -> (Tensor x_bar, Tensor x_bar_dot, Tensor weight_bar_dot, Tensor bias_bar_dot)",
};
#undef STATISTICS
#undef ACTIVATION

// Vectors are lists of stacks [K, ...], a row a column; coefficients and sums are float64 [K].
constexpr const char* kVectors[] = {
    "multi_tensor_dot(Tensor[] a, Tensor[] b) -> Tensor",
    "multi_tensor_axpby_(Tensor(a!)[] y, Tensor[] x, Tensor a, Tensor b) -> ()",
    "cg_update_(Tensor(a!)[] x, Tensor(b!)[] r, Tensor[] p, Tensor[] ap, Tensor alpha) -> Tensor",
};

// Torch turns signs lazily (Tensor.is_neg). Its own way with ops that know nothing of it takes an in-place
// op's result from the stack, where ours leave none, and corrupts a reference count. So those have this.
void resolve_negative(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto resolved = [](const at::Tensor& t, const c10::Argument& argument) {
    const auto* const alias = argument.alias_info();
    TORCH_CHECK_VALUE(!t.is_neg() || alias == nullptr || !alias->isWrite(), argument.name(),
                      " is written in place and is a negative view (Tensor.is_neg): clone it first");
    return t.resolve_neg();
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = torch::jit::peek(*stack, i, arguments.size());
    if (value.isTensor()) {
      value = resolved(value.toTensor(), arguments[i]);
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list = value.toTensorVector();
      for (at::Tensor& t : list) t = resolved(t, arguments[i]);
      value = list;
    }
  }
  op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::Negative),
                     stack);
}

// What an op says of derivatives.
enum class Derivatives {
  python,  // it has some, registered by blokern/ops; or no argument that could have one
  masks,   // its results are bool: nothing comes back by reverse mode, as of a comparison
  none,
};

// An op without derivatives refuses what would silently be lost: a gradient, or a tangent of forward mode, be
// it of torch.func or of torch.autograd.forward_ad.
template <Derivatives kind>
void refuse_derivatives(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto check = [](const at::Tensor& t, const std::string& name) {
    TORCH_CHECK_VALUE(
        kind == Derivatives::masks || !(t.requires_grad() && at::GradMode::is_enabled()), name,
        " requires grad, and this op has no derivative: call it under torch.no_grad(), or detach ", name);
    TORCH_CHECK_VALUE(
        !t._fw_grad(0).defined(), name,
        " has a tangent of forward mode, and this op has no derivative: give it the primal alone, by"
        " detach() or torch.func.stop_gradient");
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = torch::jit::peek(*stack, i, arguments.size());
    if (value.isTensor()) {
      check(value.toTensor(), arguments[i].name());
    } else if (value.isTensorList()) {
      const std::vector<at::Tensor> list = value.toTensorVector();
      for (size_t k = 0; k < list.size(); ++k)
        check(list[k], arguments[i].name() + "[" + std::to_string(k) + "]");
    }
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

torch::CppFunction refusal(Derivatives kind) {
  return kind == Derivatives::masks
             ? torch::CppFunction::makeFromBoxedFunction<&refuse_derivatives<Derivatives::masks>>()
             : torch::CppFunction::makeFromBoxedFunction<&refuse_derivatives<Derivatives::none>>();
}

void define(torch::Library& m, const std::string& schema, Derivatives derivatives) {
  const bool is_random = schema.find("Generator") != std::string::npos;
  const std::vector<at::Tag> tags =
      is_random ? std::vector{at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded}
                : std::vector{at::Tag::pt2_compliant_tag};
  m.def(schema.c_str(), tags);
  const std::string name = schema.substr(0, schema.find('('));
  if (derivatives != Derivatives::python)
    m.impl(name.c_str(), torch::dispatch(c10::DispatchKey::Autograd, refusal(derivatives)));
  if (schema.find('!') == std::string::npos) return;
  m.impl(name.c_str(), torch::dispatch(c10::DispatchKey::Negative,
                                       torch::CppFunction::makeFromBoxedFunction<&resolve_negative>()));
}

}  // namespace

TORCH_LIBRARY(blokern, m) {
  for (const char* schema : kAttack) define(m, schema, Derivatives::none);
  for (const char* schema : kMasks) define(m, schema, Derivatives::python);
  for (const char* schema : kProducts) define(m, schema, Derivatives::python);
  for (const char* schema : kPacked) define(m, schema, Derivatives::none);
  for (const char* schema : kSelections) define(m, schema, Derivatives::masks);
  for (const char* schema : kCurvature) define(m, schema, Derivatives::none);
  for (const char* schema : kVectors) define(m, schema, Derivatives::none);
  for (const char* schema : kSteps) define(m, schema, Derivatives::none);
}
