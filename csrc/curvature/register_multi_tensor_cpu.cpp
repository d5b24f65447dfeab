// Products and updates of lists of tensors on the CPU: checks, layout, threads. Arithmetic:
// multi_tensor_cpu.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <c10/util/strides.h>
#include <torch/library.h>

#include <string>
#include <utility>
#include <vector>

#include "curvature/multi_tensor.h"
#include "curvature/torch_cpu.h"
#include "support/dispatch.h"

namespace blokern {
namespace {

using checks::element;

// The tensors of a list are stacks [K, ...] of K columns.
void check_list(at::TensorList list, const char* name) {
  TORCH_CHECK_VALUE(!list.empty(), name, " must have at least one tensor, got an empty list");
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string own = element(name, i);
    checks::floating(list[i], own.c_str());
    TORCH_CHECK_VALUE(list[i].dim() >= 1 && list[i].size(0) == list[0].size(0), own,
                      " must be a stack of as many as the others, [K, ...], got shape ", list[i].sizes());
    checks::same_device(list[i], own.c_str(), list[0], element(name, 0).c_str());
    checks::constant(list[i], own.c_str());
  }
}

void check_like(at::TensorList list, const char* name, at::TensorList like, const char* like_name) {
  TORCH_CHECK_VALUE(list.size() == like.size(), name, " must have as many tensors as ", like_name, ", ",
                    like.size(), ", got ", list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    checks::same_images(list[i], element(name, i).c_str(), like[i], element(like_name, i).c_str());
    checks::constant(list[i], element(name, i).c_str());
  }
}

Tensor coefficients(const Tensor& t, const char* name, at::TensorList like) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kDouble, name, " must be float64, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == like[0].size(0), name, " must have shape [", like[0].size(0),
                    "], one value a column, got ", t.sizes());
  checks::same_device(t, name, like[0], "the tensors");
  return t.clone(at::MemoryFormat::Contiguous);  // it may lie in what is written
}

// Where a list's elements lie: the strides of each tensor, its columns dense and one behind another.
using Strides = std::vector<c10::DimVector>;

Strides strides_of(at::TensorList list) {
  Strides all;
  for (const Tensor& t : list) {
    const bool dense =
        t.is_non_overlapping_and_dense() && (t.size(0) < 2 || t.stride(0) == t.numel() / t.size(0));
    all.push_back(dense ? c10::DimVector(t.strides()) : c10::contiguous_strides(t.sizes()));
  }
  return all;
}

// A list's tensors, in copies where they do not lie so.
class Arranged {
 public:
  Arranged(at::TensorList list, const Strides& strides) : list_(list) {
    for (size_t i = 0; i < list.size(); ++i) {
      const Tensor& t = list[i];
      dense_.push_back(t.strides() == at::IntArrayRef(strides[i])
                           ? t
                           : at::empty_strided(t.sizes(), strides[i], t.options()).copy_(t));
    }
  }

  template <class T>
  const T* data(size_t i) const {
    return dense_[i].template const_data_ptr<T>();
  }

 protected:
  at::TensorList list_;
  std::vector<Tensor> dense_;
};

// The same of a list that is written, and what of it is in copies brought back at the end.
class ArrangedInPlace : public Arranged {
 public:
  ArrangedInPlace(at::TensorList list, const Strides& strides) : Arranged(list, strides) {
    for (const Tensor& t : dense_) data_.push_back(t.mutable_data_ptr());
  }

  template <class T>
  T* data(size_t i) const {
    return static_cast<T*>(data_[i]);
  }
  void finish() const {
    for (size_t i = 0; i < list_.size(); ++i) {
      if (!dense_[i].is_same(list_[i])) list_[i].copy_(dense_[i]);
      if (!list_[i].is_inference()) list_[i].unsafeGetTensorImpl()->bump_version();
    }
  }

 private:
  std::vector<void*> data_;
};

struct Block {
  size_t tensor;
  int64_t column, begin, end;
};

std::vector<Block> blocks_of(at::TensorList list) {
  std::vector<Block> blocks;
  for (size_t i = 0; i < list.size(); ++i) {
    const int64_t columns = list[i].size(0), size = columns == 0 ? 0 : list[i].numel() / columns;
    for (int64_t k = 0; k < columns; ++k) {
      for (int64_t begin = 0; begin < size; begin += kMultiTensorBlock)
        blocks.push_back({i, k, k * size + begin, k * size + std::min(size, begin + kMultiTensorBlock)});
    }
  }
  return blocks;
}

// work<T>(block, its number) for each block, T its tensor's type, the threads' beside one another.
template <class Work>
void over(const std::vector<Block>& blocks, at::TensorList list, Work&& work) {
  int64_t elements = 0;
  for (const Block& block : blocks) elements += block.end - block.begin;
  const auto count = static_cast<int64_t>(blocks.size());
  at::parallel_for(0, count, grain(elements / std::max<int64_t>(1, count)), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      dispatch_image(list[blocks[i].tensor].scalar_type(),
                     [&]<class T>() { work.template operator()<T>(blocks[i], i); });
    }
  });
}

// The sum of work's numbers for each column, added up in the blocks' order.
template <class Work>
Tensor summed_over(at::TensorList list, Work&& work) {
  const std::vector<Block> blocks = blocks_of(list);
  std::vector<double> found(blocks.size());
  over(blocks, list,
       [&]<class T>(const Block& block, int64_t i) { found[i] = work.template operator()<T>(block); });
  Tensor total = at::zeros({list[0].size(0)}, list[0].options().dtype(at::kDouble));
  auto* const sum = total.mutable_data_ptr<double>();
  for (size_t i = 0; i < blocks.size(); ++i) sum[blocks[i].column] += found[i];
  return total;
}

Tensor multi_tensor_dot_cpu(at::TensorList a, at::TensorList b) {
  check_list(a, "a");
  check_like(b, "b", a, "a");
  const Strides strides = strides_of(a);
  const Arranged first(a, strides), second(b, strides);
  return summed_over(a, [&]<class T>(const Block& at) {
    return dot(Dot<T>{first.data<T>(at.tensor), second.data<T>(at.tensor)}, at.begin, at.end);
  });
}

void multi_tensor_axpby_cpu(at::TensorList y, at::TensorList x, const Tensor& a, const Tensor& b) {
  check_list(y, "y");
  check_like(x, "x", y, "y");
  checks::writable_and_apart({{y, "y", true}, {x, "x", false}}, /*or_same=*/true);
  const Tensor of_x = coefficients(a, "a", y), of_y = coefficients(b, "b", y);
  const auto *const first = of_x.const_data_ptr<double>(), *const second = of_y.const_data_ptr<double>();
  const Strides strides = strides_of(y);
  const Arranged from(x, strides);
  const ArrangedInPlace to(y, strides);
  over(blocks_of(y), y, [&]<class T>(const Block& at, int64_t) {
    const Axpby<T> p{to.data<T>(at.tensor), from.data<T>(at.tensor), first + at.column, second + at.column};
    axpby(p, at.begin, at.end);
  });
  to.finish();
}

Tensor cg_update_cpu(at::TensorList x, at::TensorList r, at::TensorList p, at::TensorList ap,
                     const Tensor& alpha) {
  check_list(x, "x");
  check_like(r, "r", x, "x");
  check_like(p, "p", x, "x");
  check_like(ap, "ap", x, "x");
  checks::writable_and_apart({{x, "x", true}, {r, "r", true}, {p, "p", false}, {ap, "ap", false}},
                             /*or_same=*/true);
  const Tensor steps = coefficients(alpha, "alpha", x);
  const auto* const step = steps.const_data_ptr<double>();
  const Strides strides = strides_of(x);
  const Arranged along(p, strides), image(ap, strides);
  const ArrangedInPlace solution(x, strides), residual(r, strides);
  Tensor squares = summed_over(x, [&]<class T>(const Block& at) {
    const size_t i = at.tensor;
    const CgUpdate<T> update{solution.data<T>(i), residual.data<T>(i), along.data<T>(i), image.data<T>(i),
                             step + at.column};
    return cg_update(update, at.begin, at.end);
  });
  solution.finish();
  residual.finish();
  return squares;
}

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) {
  m.impl("multi_tensor_dot", multi_tensor_dot_cpu);
  m.impl("multi_tensor_axpby_", multi_tensor_axpby_cpu);
  m.impl("cg_update_", cg_update_cpu);
}

}  // namespace blokern
