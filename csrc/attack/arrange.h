// How a call's tensors are walked: as samples of densely lying elements, in the memory order of the output.
// Any layout whose samples are dense (NCHW, channels_last, every second sample of either) is walked where it
// lies; a tensor in another order is copied into that of the output first.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include "attack/batch.h"

namespace blokern {

class Arrangement {
 public:
  // flat: the op treats all elements alike, so that the whole batch may be walked as one sample of
  // any dense layout.
  Arrangement(const at::Tensor& out, bool flat)
      : flat_(flat && out.is_non_overlapping_and_dense()),
        strides_(flat_ || has_dense_samples(out) ? out.strides().vec() : contiguous_strides(out)),
        samples_(flat_ ? 1 : out.size(0)),
        size_(flat_ || out.size(0) == 0 ? out.numel() : out.numel() / out.size(0)) {}

  Batch batch(const bool* active) const { return {samples_, size_, active}; }

  at::Tensor input(const at::Tensor& t) const { return is_arranged(t) ? t : empty_like(t).copy_(t); }
  at::Tensor in_place(const at::Tensor& t) const { return input(t); }
  at::Tensor output(const at::Tensor& t) const { return is_arranged(t) ? t : empty_like(t); }

  // Brings a result back to where it belongs.
  void finish(const at::Tensor& arranged, const at::Tensor& t) const {
    if (!arranged.is_same(t)) t.copy_(arranged);
  }

  template <class T>
  Rows<const T> read(const at::Tensor& t) const {
    return {t.const_data_ptr<T>(), flat_ ? 0 : t.stride(0)};
  }
  template <class T>
  Rows<T> write(const at::Tensor& t) const {
    return {t.mutable_data_ptr<T>(), flat_ ? 0 : t.stride(0)};
  }

 private:
  static bool has_dense_samples(const at::Tensor& t) {
    return t.size(0) == 0 || t.select(0, 0).is_non_overlapping_and_dense();
  }

  static std::vector<int64_t> contiguous_strides(const at::Tensor& t) {
    std::vector<int64_t> strides(t.dim());
    int64_t stride = 1;
    for (int64_t d = t.dim() - 1; d >= 0; --d) {
      strides[d] = stride;
      stride *= t.size(d);
    }
    return strides;
  }

  at::Tensor empty_like(const at::Tensor& t) const {
    return at::empty_strided(t.sizes(), strides_, t.options());
  }

  bool is_arranged(const at::Tensor& t) const {
    for (int64_t d = flat_ ? 0 : 1; d < t.dim(); ++d) {
      if (t.size(d) != 1 && t.stride(d) != strides_[d]) return false;
    }
    return true;
  }

  bool flat_;
  std::vector<int64_t> strides_;
  int64_t samples_, size_;
};

}  // namespace blokern
