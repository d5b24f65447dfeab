#include "sparse/nm_mask.h"

#include <algorithm>
#include <type_traits>

#include "support/dtypes.h"
#include "support/scratch.h"

namespace blokern {

// Groups lie in the vector lanes, whatever the layout: keys[k * lanes + i] is entry k of the block's group i.
// An entry is kept if fewer than n of its group come before it.
template <class T>
bool nm_mask(const NmMask<T>& p, int64_t begin, int64_t end) {
  using K = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;
  constexpr int64_t lanes = 64;
  K* const keys = scratch<K>(p.m * lanes);
  T entries[lanes] = {};  // the last block may leave some lanes with what they had
  K any_nan = 0;
  for (; begin < end; begin += lanes) {
    const int64_t groups = std::min(lanes, end - begin);
    int64_t first[lanes];  // each group's first entry
    for (int64_t i = 0, row = begin / p.inner, column = begin % p.inner; i < groups; ++i) {
      first[i] = row * p.m * p.inner + column;
      if (++column == p.inner) column = 0, ++row;
    }
    for (int64_t k = 0; k < p.m; ++k) {
      for (int64_t i = 0; i < groups; ++i) entries[i] = p.scores[first[i] + k * p.inner];
      for (int64_t i = 0; i < lanes; ++i) keys[k * lanes + i] = order_key<K>(entries[i]);
      for (int64_t i = 0; i < groups; ++i) any_nan |= keys[k * lanes + i] == kNanKey<K>;
    }
    for (int64_t k = 0; k < p.m; ++k) {
      const K* const key = keys + k * lanes;
      K before[lanes] = {};
      for (int64_t j = 0; j < p.m; ++j) {
        const K* const other = keys + j * lanes;
        if (j < k) {
          for (int64_t i = 0; i < lanes; ++i) before[i] += other[i] >= key[i];
        } else {
          for (int64_t i = 0; i < lanes; ++i) before[i] += other[i] > key[i];
        }
      }
      for (int64_t i = 0; i < groups; ++i)
        p.mask[first[i] + k * p.inner] = static_cast<int64_t>(before[i]) < p.n;
    }
  }
  return any_nan != 0;
}

#define INSTANTIATE(T) template bool nm_mask<T>(const NmMask<T>&, int64_t, int64_t);
BLOKERN_FOR_IMAGE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern
