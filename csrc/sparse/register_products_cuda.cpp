// The masked products on CUDA tensors: which kernel. Arithmetic: skinny_spmm_cuda.cuh,
// stream_products_cuda.cuh, packed_spmm_cuda.cuh, and between them torch's dense product of a weight that
// apply_mask_cuda.cuh masks. The host never waits for the device: of a stream it knows the number of entries
// alone. A mask that keeps more than products by entries pay for comes without one (blokern/ops/mask.py).
#include <ATen/Context.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "sparse/products_cuda.h"
#include "sparse/register_products.h"
#include "sparse/torch_cuda.h"

namespace blokern {
namespace {

using namespace product_ops;

// The types that products by entries exist for: of others the dense product always is faster.
template <class F>
void dispatch_entries(at::ScalarType type, F&& f) {
  if (type == at::kDouble) return f.template operator()<double>();
  f.template operator()<float>();
}

// Estimates (docs/gpu.md): the densities up to which products by entries are faster than the dense one.
bool entries_pay(const Tensor& start, const Tensor& column, const Tensor& weight) {
  if (start.numel() == 0 || checks::is_half(weight.scalar_type())) return false;
  const bool tf32 = weight.scalar_type() == at::kFloat && at::globalContext().allowTF32CuBLAS();
  return static_cast<double>(column.numel()) <= (tf32 ? 0.01 : 0.04) * static_cast<double>(weight.numel());
}

const Tensor& given(const OptionalTensor& words) {
  TORCH_CHECK_VALUE(words.has_value(), "words must be given on CUDA");
  return *words;
}

template <class T>
const T* data_or_null(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

// Y of few samples, written in x's layout.
Tensor few_samples(const Tensor& weight, const Tensor& words, const Tensor& x, const Tensor& bias) {
  const MaskWords mask = words_of(words, weight.size(0), weight.size(1));
  const Tensor rows = x.stride(0) == 1 ? x.t() : x.t().contiguous();  // samples
  Tensor y = empty_product(mask.rows, x);
  dispatch(weight.scalar_type(), [&]<class T>() {
    Cuda::run(weight, 0, 0, [&](const CudaCall& call) {
      skinny_spmm(SkinnySpmm<T>{mask, weight.const_data_ptr<T>(), weight.stride(0), rows.const_data_ptr<T>(),
                                rows.stride(0), data_or_null<T>(bias), y.mutable_data_ptr<T>(), y.stride(0),
                                y.stride(1), x.size(1)},
                  call);
    });
  });
  return y;
}

Tensor by_entries(const Stream& stream, const Tensor& weight, const Tensor& x, const Tensor& bias) {
  const Tensor dense = x.contiguous();
  Tensor y = at::empty({stream.rows, x.size(1)}, x.options());
  dispatch_entries(weight.scalar_type(), [&]<class T>() {
    Cuda::run(weight, 0, 0, [&](const CudaCall& call) {
      stream_spmm(
          StreamSpmm<T>{stream, weight.const_data_ptr<T>(), weight.stride(0), weight.stride(1),
                        dense.const_data_ptr<T>(), data_or_null<T>(bias), y.mutable_data_ptr<T>(), x.size(1)},
          call);
    });
  });
  const bool is_batch = x.stride(0) == 1 && x.stride(1) != 1;
  return is_batch ? y.t().contiguous().t() : y;
}

Tensor spmm(const Tensor& weight, const Tensor& x, const OptionalTensor& bias, const Tensor& start,
            const Tensor& column, int64_t block, const OptionalTensor& words, const OptionalTensor& start_t,
            const OptionalTensor& column_t, int64_t /*block_t*/, const OptionalTensor& words_t,
            bool /*dense_grad*/) {
  check_spmm(weight, x, bias);
  check_mask_device(weight, start, column, words, start_t, column_t, words_t);
  const Tensor& mask = given(words);
  const int64_t rows = weight.size(0), cols = weight.size(1), samples = x.size(1);
  if (rows == 0 || samples == 0) return empty_product(rows, x);
  if (cols == 0) {
    Tensor y = empty_product(rows, x);
    return bias.has_value() ? y.copy_(bias->unsqueeze(1)) : y.zero_();
  }
  const Tensor offsets = bias.has_value() ? bias->contiguous() : Tensor();
  if (samples <= kFewSamples && weight.stride(1) == 1) return few_samples(weight, mask, x, offsets);
  if (entries_pay(start, column, weight))
    return by_entries(shaped_stream(start, column, rows, cols, block), weight, x, offsets);
  if (words_t.has_value() && weight.stride(0) == 1)
    return dense_spmm(masked_weight<Cuda>(weight.t(), *words_t).t(), x, bias);
  return dense_spmm(masked_weight<Cuda>(weight, mask), x, bias);
}

Tensor sddmm(const Tensor& a, const Tensor& b, const Tensor& start, const Tensor& column, int64_t block,
             const OptionalTensor& words, const OptionalTensor& start_t, const OptionalTensor& column_t,
             int64_t /*block_t*/, const OptionalTensor& words_t) {
  check_sddmm(a, b);
  check_mask_device(a, start, column, words, start_t, column_t, words_t);
  const int64_t rows = a.size(0), cols = b.size(0), samples = a.size(1);
  const Tensor& bits = given(words);
  const MaskWords mask = words_of(bits, rows, cols);
  Tensor product = at::empty({rows, cols}, a.options());
  if (samples == 0 || product.numel() == 0) return product.zero_();
  if (entries_pay(start, column, product)) {
    const Stream stream = shaped_stream(start, column, rows, cols, block);
    const Tensor a_rows = a.contiguous(), b_rows = b.contiguous();
    product.zero_();
    dispatch_entries(a.scalar_type(), [&]<class T>() {
      Cuda::run(a, 0, 0, [&](const CudaCall& call) {
        stream_sddmm(StreamSddmm<T>{stream, column.numel(), a_rows.const_data_ptr<T>(),
                                    b_rows.const_data_ptr<T>(), product.mutable_data_ptr<T>(), samples},
                     call);
      });
    });
    return product;
  }
  const NoAutocast guard(kAutocast);
  product = at::mm(a, b.t()).contiguous();
  dispatch(a.scalar_type(), [&]<class T>() {
    Cuda::run(a, 0, 0,
              [&](const CudaCall& call) { clear_masked(mask, product.mutable_data_ptr<T>(), call); });
  });
  return product;
}

// The kept weights, in the stream's order.
Tensor packed_values_op(const Tensor& weight, const Tensor& start, const Tensor& column, int64_t block) {
  check_matrix(weight, "weight");
  check_mask_device(weight, start, column);
  const Stream stream = shaped_stream(start, column, weight.size(0), weight.size(1), block);
  const Tensor values = at::empty({column.numel()}, weight.options().dtype(sum_type(weight.scalar_type())));
  dispatch(weight.scalar_type(), [&]<class T>() {
    Cuda::run(weight, 0, 0, [&](const CudaCall& call) {
      pack_entries(stream, weight.const_data_ptr<T>(), weight.stride(0), weight.stride(1),
                   values.mutable_data_ptr<Accum<T>>(), call);
    });
  });
  return values;
}

// Estimates: whether the entries' product is faster than to unpack them and multiply densely. Each entry
// fetches a row of samples from cache; the dense product is on tensor cores but for float64, and float32
// without TF32.
bool packed_pays(const Stream& stream, int64_t entries, const Tensor& x) {
  const bool tensor_cores = checks::is_half(x.scalar_type()) ||
                            (x.scalar_type() == at::kFloat && at::globalContext().allowTF32CuBLAS());
  return static_cast<double>(entries) * static_cast<double>(x.size(1)) <=
         (tensor_cores ? 3.0 : 6.0) * static_cast<double>(stream.rows) * static_cast<double>(stream.cols);
}

Tensor packed_spmm_op(const Tensor& values, const Tensor& x, const OptionalTensor& bias, const Tensor& start,
                      const Tensor& column, int64_t block, int64_t rows) {
  check_packed(values, x, bias, start, column, rows);
  const int64_t cols = x.size(0), samples = x.size(1);
  Tensor y = empty_product(rows, x);
  if (y.numel() == 0) return y;
  if (cols == 0) return bias.has_value() ? y.copy_(bias->unsqueeze(1)) : y.zero_();
  const Stream stream = shaped_stream(start, column, rows, cols, block);
  const Tensor offsets = bias.has_value() ? bias->contiguous() : Tensor();
  if (!packed_pays(stream, column.numel(), x)) {
    const Tensor weight = at::zeros({rows, cols}, x.options());
    dispatch(x.scalar_type(), [&]<class T>() {
      Cuda::run(x, 0, 0, [&](const CudaCall& call) {
        unpack_entries(stream, values.const_data_ptr<Accum<T>>(), weight.mutable_data_ptr<T>(), call);
      });
    });
    return dense_spmm(weight, x, bias);
  }
  const Tensor dense = x.contiguous();
  dispatch(x.scalar_type(), [&]<class T>() {
    Cuda::run(x, 0, 0, [&](const CudaCall& call) {
      packed_spmm(
          PackedSpmm<T>{stream, values.const_data_ptr<Accum<T>>(), dense.const_data_ptr<T>(),
                        data_or_null<T>(offsets), y.mutable_data_ptr<T>(), y.stride(0), y.stride(1), samples},
          call);
    });
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CUDA, m) {
  m.impl("spmm", spmm);
  m.impl("sddmm", sddmm);
  m.impl("packed_values", packed_values_op);
  m.impl("packed_spmm", packed_spmm_op);
}

}  // namespace blokern
