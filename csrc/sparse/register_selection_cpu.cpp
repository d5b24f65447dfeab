// The sparse family's selections on CPU tensors: passes and threads. Arithmetic:
// topk_mask_cpu.cpp, nm_mask_cpu.cpp.
#include <ATen/ops/isnan.h>

#include <algorithm>
#include <atomic>

#include "sparse/register_selection.h"
#include "threads.h"

namespace blokern {
namespace {

using at::Tensor;
using selection_ops::Layer;

void check_no_nan(const Tensor& scores, const std::string& name) {
  const auto nans = at::isnan(scores).sum().item<int64_t>();
  TORCH_CHECK_VALUE(nans == 0, name, " must have no NaN, got ", nans, " in ", scores.numel(), " values");
}

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

struct CpuSelection {
  static void topk_mask(const std::vector<Layer>& layers, const std::vector<int64_t>& wanted,
                        bool any_double) {
    any_double ? select<uint64_t>(layers, wanted) : select<uint32_t>(layers, wanted);
  }

  template <class T>
  static void nm_mask(const NmMask<T>& p, const Tensor& scores) {
    std::atomic<bool> any_nan = false;
    at::parallel_for(0, p.groups, grain(p.m), [&](int64_t b, int64_t e) {
      if (blokern::nm_mask(p, b, e)) any_nan = true;
    });
    if (any_nan) check_no_nan(scores, "scores");
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) { selection_ops::implement<CpuSelection>(m); }

}  // namespace blokern
