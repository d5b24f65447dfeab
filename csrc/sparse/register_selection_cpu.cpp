// The sparse family's selections on CPU tensors: checks, layout, threads. Arithmetic: topk_mask_cpu.cpp,
// nm_mask_cpu.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isnan.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <vector>

#include "checks.h"
#include "sparse/nm_mask.h"
#include "sparse/topk_mask.h"
#include "support/dispatch.h"

namespace blokern {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 16384;  // elements that are worth a thread's wake-up

Tensor empty_mask(const Tensor& scores) {
  return at::empty(scores.sizes(), scores.options().dtype(at::kBool));
}

void check_no_nan(const Tensor& scores, const std::string& name) {
  const auto nans = at::isnan(scores).sum().item<int64_t>();
  TORCH_CHECK_VALUE(nans == 0, name, " must have no NaN, got ", nans, " in ", scores.numel(), " values");
}

// ---- topk_mask

// One tensor of the list, row-major; its entries are [begin, end) of the whole list's.
struct Layer {
  std::string name;
  Tensor scores, mask;
  int64_t begin, end;
  int64_t selection;  // the one that it takes part in
};

// The list's entries in equal parts, one a thread.
class Parts {
 public:
  explicit Parts(const std::vector<Layer>& layers)
      : layers_(layers), count_(std::min<int64_t>(at::get_num_threads(), 1 + layers.back().end / kGrain)) {}

  int64_t count() const { return count_; }

  // body(part, selection, scores, mask, size) for each part's pieces of layers: those of a part in order, the
  // parts at once. K's keys hold every layer's scores.
  template <class K, class Body>
  void for_each_piece(Body&& body) const {
    at::parallel_for(0, count_, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        for (const Layer& layer : layers_) {
          const int64_t begin = std::max(edge(part), layer.begin), end = std::min(edge(part + 1), layer.end);
          if (begin >= end) continue;
          dispatch_image(layer.scores.scalar_type(), [&]<class T>() {
            if constexpr (sizeof(T) <= sizeof(K)) {
              body(part, layer.selection, layer.scores.const_data_ptr<T>() + begin - layer.begin,
                   layer.mask.mutable_data_ptr<bool>() + begin - layer.begin, end - begin);
            }
          });
        }
      }
    });
  }

 private:
  int64_t edge(int64_t part) const { return layers_.back().end * part / count_; }

  const std::vector<Layer>& layers_;
  int64_t count_;
};

// The counts of one pass: for each selection and part, of each value of the digit.
template <class K>
class Counts {
 public:
  Counts(int64_t selections, int64_t parts)
      : parts_(parts), counts_(selections * parts * Digit<K>::kValues) {}

  void clear() { std::fill(counts_.begin(), counts_.end(), 0); }
  int64_t* of(int64_t selection, int64_t part) {
    return counts_.data() + (selection * parts_ + part) * Digit<K>::kValues;
  }
  int64_t total(int64_t selection, int64_t value) {
    int64_t total = 0;
    for (int64_t part = 0; part < parts_; ++part) total += of(selection, part)[value];
    return total;
  }

 private:
  int64_t parts_;
  std::vector<int64_t> counts_;
};

// Writes the masks; selection s keeps wanted[s] entries. All selections share the passes, so that a list of
// many small layers wakes the threads no more often than one large tensor does.
template <class K>
void select(const std::vector<Layer>& layers, std::vector<int64_t> wanted) {
  const Parts parts(layers);
  const auto selections = static_cast<int64_t>(wanted.size());
  std::vector<Digit<K>> digits(selections);
  Counts<K> counts(selections, parts.count());
  for (int pass = 0; pass < Digit<K>::kPasses; ++pass) {
    counts.clear();
    parts.for_each_piece<K>([&](int64_t part, int64_t s, const auto* scores, bool*, int64_t size) {
      count_digits<K>(scores, size, digits[s], counts.of(s, part));
    });
    for (int64_t s = 0; s < selections; ++s) {
      int64_t value = Digit<K>::kValues - 1;
      if (pass == 0 && counts.total(s, value) != 0) {
        for (const Layer& layer : layers) check_no_nan(layer.scores, layer.name);  // finds and names it
      }
      for (int64_t count; wanted[s] > (count = counts.total(s, value)); --value) wanted[s] -= count;
      digits[s].fix(value);
    }
  }
  // The last pass counted each part's keys that equal the threshold; the first wanted[s] of them are kept.
  std::vector<int64_t> ties(selections * parts.count());
  for (int64_t s = 0; s < selections; ++s) {
    const K threshold = digits[s].known;
    for (int64_t part = 0; part < parts.count(); ++part) {
      int64_t& kept = ties[s * parts.count() + part];
      kept = std::min(wanted[s], counts.of(s, part)[digits[s].of(threshold)]);
      wanted[s] -= kept;
    }
  }
  parts.for_each_piece<K>([&](int64_t part, int64_t s, const auto* scores, bool* mask, int64_t size) {
    int64_t& left = ties[s * parts.count() + part];
    left = mask_largest<K>(scores, size, digits[s].known, left, mask);
  });
}

// Python's round: to the nearest, halves to even.
int64_t round_product(double density, int64_t entries) {
  return std::llrint(density * static_cast<double>(entries));
}

std::vector<Tensor> topk_mask_op(at::TensorList scores, double density, bool per_layer) {
  TORCH_CHECK_VALUE(density > 0 && density <= 1, "density must be in (0, 1], got ", density);
  std::vector<Layer> layers;
  std::vector<Tensor> masks;
  std::vector<int64_t> kept;
  bool any_double = false;
  int64_t end = 0;
  for (const Tensor& t : scores) {
    const auto index = static_cast<int64_t>(layers.size());
    const std::string name = scores.size() == 1 ? "scores" : "scores[" + std::to_string(index) + "]";
    checks::floating(t, name.c_str());
    any_double |= t.scalar_type() == at::kDouble;
    masks.push_back(empty_mask(t));
    layers.push_back({name, t.contiguous(), masks.back(), end, end + t.numel(), per_layer ? index : 0});
    end += t.numel();
    if (per_layer) kept.push_back(round_product(density, t.numel()));
  }
  if (!per_layer) kept.push_back(round_product(density, end));
  any_double ? select<uint64_t>(layers, kept) : select<uint32_t>(layers, kept);
  return masks;
}

// ---- nm_mask

Tensor nm_mask_op(const Tensor& scores, int64_t n, int64_t m, int64_t dim) {
  checks::floating(scores, "scores");
  TORCH_CHECK_VALUE(m >= 1, "m must be at least 1, got ", m);
  TORCH_CHECK_VALUE(n >= 1 && n <= m, "n must be in [1, m], got n=", n, " and m=", m);
  const int64_t dims = scores.dim();
  TORCH_CHECK_VALUE(-dims <= dim && dim < dims, "dim must be a dimension of scores, which has ", dims,
                    ", got ", dim);
  if (dim < 0) dim += dims;
  TORCH_CHECK_VALUE(scores.size(dim) % m == 0, "scores must have a multiple of m, ", m,
                    ", entries along dim ", dim, ", got shape ", scores.sizes());
  Tensor mask = empty_mask(scores);
  const Tensor dense = scores.contiguous();
  std::atomic<bool> any_nan = false;
  dispatch_image(scores.scalar_type(), [&]<class T>() {
    const NmMask<T> p{dense.const_data_ptr<T>(), mask.mutable_data_ptr<bool>(), n, m,
                      c10::multiply_integers(scores.sizes().slice(dim + 1))};
    at::parallel_for(0, scores.numel() / m, std::max<int64_t>(1, kGrain / m), [&](int64_t b, int64_t e) {
      if (nm_mask(p, b, e)) any_nan = true;
    });
  });
  if (any_nan) check_no_nan(scores, "scores");
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) {
  m.impl("topk_mask", topk_mask_op);
  m.impl("nm_mask", nm_mask_op);
}

}  // namespace blokern
