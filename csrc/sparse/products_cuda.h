// The products of a masked matrix W [rows, cols] as CUDA has them, where the tensor cores' dense product of
// torch is fast: that product's mask, before or after it; few samples; and few entries. A masked weight may
// hold anything. All kernels are queued on the call's stream.
#pragma once

#include <cstdint>

#include "sparse/stream.h"
#include "support/cuda/call.h"
#include "support/math.h"

namespace blokern {

// to ← W ⊙ mask, both row-major.
template <class T>
void apply_mask(const MaskWords& mask, const T* weight, T* to, const CudaCall& call);

// product ← 0 where the mask is 0. Nothing is read but the mask.
template <class T>
void clear_masked(const MaskWords& mask, T* product, const CudaCall& call);

// The most samples that skinny_spmm takes.
constexpr int64_t kFewSamples = 16;

// Y = W X + bias for few samples: W is read as it lies, once, and where its bits are not all zero.
template <class T>
struct SkinnySpmm {
  MaskWords mask;
  const T* weight;
  int64_t weight_stride;  // from row to row, whose elements follow one another
  const T* x;
  int64_t x_stride;  // from sample to sample, likewise
  const T* bias;     // or null
  T* y;
  int64_t row_stride, sample_stride;
  int64_t samples;
};

template <class T>
void skinny_spmm(const SkinnySpmm<T>& p, const CudaCall& call);

// Y = W X + bias by the entries of a stream, of float64 or float32; X [cols, samples] and Y
// [rows, samples] row-major.
template <class T>
struct StreamSpmm {
  Stream stream;
  const T* weight;
  int64_t row_stride, col_stride;
  const T* x;
  const T* bias;  // or null
  T* y;
  int64_t samples;
};

template <class T>
void stream_spmm(const StreamSpmm<T>& p, const CudaCall& call);

// The same types. product ← A Bᵀ at the entries of a stream, and nothing elsewhere; A [rows, samples], B
// [cols, samples] and product [rows, cols] row-major.
template <class T>
struct StreamSddmm {
  Stream stream;
  int64_t entries;
  const T* a;
  const T* b;
  T* product;
  int64_t samples;
};

template <class T>
void stream_sddmm(const StreamSddmm<T>& p, const CudaCall& call);

// A weight's entries by themselves, in the order of a stream, in the type of the arithmetic.
// value ← W at the entries, and back: W ← value there, and nothing elsewhere; W row-major.
template <class T>
void pack_entries(const Stream& stream, const T* weight, int64_t row_stride, int64_t col_stride,
                  Accum<T>* value, const CudaCall& call);
template <class T>
void unpack_entries(const Stream& stream, const Accum<T>* value, T* weight, const CudaCall& call);

// Y = W X + bias of a weight that is packed so; X [cols, samples] row-major.
template <class T>
struct PackedSpmm {
  Stream stream;
  const Accum<T>* value;
  const T* x;
  const T* bias;  // or null
  T* y;
  int64_t row_stride, sample_stride;
  int64_t samples;
};

template <class T>
void packed_spmm(const PackedSpmm<T>& p, const CudaCall& call);

#define BLOKERN_FOR_PRODUCT(DO) DO(double) DO(float) DO(c10::BFloat16) DO(c10::Half)

}  // namespace blokern
