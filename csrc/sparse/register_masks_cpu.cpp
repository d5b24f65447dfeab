// Masks as bits on CPU tensors. Arithmetic: stream_cpu.cpp.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <numeric>

#include "sparse/clear_masked.h"
#include "sparse/register_masks.h"
#include "sparse/torch_cpu.h"

namespace blokern {
namespace {

struct CpuMasks : Cpu {
  static Tensor count(const Tensor& words) {
    const auto* const data = static_cast<const uint64_t*>(words.const_data_ptr());
    Tensor count = at::empty({}, words.options());
    *count.mutable_data_ptr<int64_t>() =
        std::accumulate(data, data + words.numel(), int64_t(0),
                        [](int64_t sum, uint64_t word) { return sum + std::popcount(word); });
    return count;
  }

  static int64_t sum_up(const Tensor& start) {
    int32_t* const starts = start.mutable_data_ptr<int32_t>();
    std::partial_sum(starts, starts + start.numel(), starts);
    return starts[start.numel() - 1];
  }
};

// What a mask's bits are known by. Any single word that differs changes it; two contents agree
// by chance alone.
uint64_t hash(const uint64_t* words, int64_t size) {
  constexpr int kLanes = 8;
  constexpr uint64_t kPrime = 0x9e3779b185ebca87ull;  // xxHash's first
  uint64_t lane[kLanes];
  for (int k = 0; k < kLanes; ++k) lane[k] = kPrime * (k + 1);
  const auto take = [&](int k, uint64_t word) { lane[k] = std::rotl(lane[k] ^ word, 27) * kPrime; };
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) take(k, words[i + k]);
  }
  for (int k = 0; i + k < size; ++k) take(k, words[i + k]);
  uint64_t all = static_cast<uint64_t>(size);
  for (const uint64_t part : lane) all = std::rotl(all ^ (part ^ part >> 29), 31) * kPrime;
  return all ^ all >> 32;
}

const uint64_t* read_words(const Tensor& words) {
  TORCH_CHECK_TYPE(words.scalar_type() == at::kLong, "words must be int64, got ", words.scalar_type());
  TORCH_CHECK_VALUE(words.is_cpu() && words.is_contiguous(),
                    "words must be contiguous and on the CPU device, got ", words.device(), " and strides ",
                    words.strides());
  return static_cast<const uint64_t*>(words.const_data_ptr());
}

// The hash with its first and last bit set, so that it has more digits than any float: where buffers are
// averaged, which passes them through floats, it is another number afterwards, whatever it was.
int64_t mask_check(const Tensor& words) {
  const uint64_t all = hash(read_words(words), words.numel());
  return static_cast<int64_t>((all >> 1) | uint64_t{1} << 62 | 1);
}

// Of the words' end, the more of them the better, as long as they cost less than a call, and of their check.
constexpr int64_t kFingerprinted = 2048;

int64_t mask_fingerprint(const Tensor& words, const Tensor& check) {
  const uint64_t* const data = read_words(words);
  TORCH_CHECK_VALUE(check.scalar_type() == at::kLong && check.numel() == 1 && check.is_cpu(),
                    "check must be one int64 on the CPU device, got ", check.scalar_type(), " ",
                    check.sizes(), " on ", check.device());
  const int64_t size = std::min(words.numel(), kFingerprinted);
  const uint64_t all = hash(data + words.numel() - size, size);
  return static_cast<int64_t>(all ^ static_cast<uint64_t>(*check.const_data_ptr<int64_t>()));
}

void clear_masked_(const Tensor& weight, const Tensor& words) {
  if (weight.numel() == 0) return;
  checks::same_device(words, "words", weight, "weight");
  checks::writable(weight, "weight");
  TORCH_CHECK_VALUE(weight.is_contiguous(), "weight must be contiguous, got strides ", weight.strides());
  const MaskWords mask = words_of(words, weight.size(0), weight.numel() / weight.size(0));
  const auto clear = [&]<class U>(U* values) {
    CpuMasks::run(weight, mask.rows, mask.cols,
                  [&](int64_t begin, int64_t end) { clear_masked(mask, values, begin, end); });
  };
  void* const values = weight.mutable_data_ptr();
  switch (weight.element_size()) {
    case 2:
      return clear(static_cast<uint16_t*>(values));
    case 4:
      return clear(static_cast<uint32_t*>(values));
    case 8:
      return clear(static_cast<uint64_t*>(values));
    default:
      TORCH_CHECK_TYPE(false, "weight must have values of 2, 4 or 8 bytes, got ", weight.scalar_type());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(blokern, CPU, m) {
  mask_ops::implement<CpuMasks>(m);
  m.impl("mask_check", &mask_check);
  m.impl("mask_fingerprint", &mask_fingerprint);
  m.impl("clear_masked_", &clear_masked_);
}

}  // namespace blokern
