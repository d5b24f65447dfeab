// What every attack kernel is told of its batch. Plain structs: no torch, host and device alike.
#pragma once

#include <cstdint>

#include "support/math.h"

namespace blokern {

// `samples` samples of `size` elements. Within a sample the elements lie dense and in the same order in every
// tensor of the call; from sample to sample each tensor has its own stride.
struct Batch {
  int64_t samples;
  int64_t size;
  const bool* active;  // [samples], or null: all are

  BLOKERN_INLINE bool skips(int64_t n) const { return active != nullptr && !active[n]; }
};

template <class T>
struct Rows {
  T* data;
  int64_t stride;

  BLOKERN_INLINE T* operator[](int64_t n) const { return data + n * stride; }
};

// One value for the batch, or one a sample.
struct PerSample {
  double value;
  const double* values;  // [samples], or null

  BLOKERN_INLINE double operator[](int64_t n) const { return values != nullptr ? values[n] : value; }
};

// The interval that images live in.
struct Box {
  double min;
  double max;
};

}  // namespace blokern
