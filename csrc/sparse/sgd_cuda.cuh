// The pruning steps on CUDA: one launch for many layers.
// Threads: a block 1024 packs of one layer, a pack the 16 bytes of neighbouring values, on the boundaries of
//   what is written. No shared memory. The CPU's bits.
// Memory: values and momentum are read and written once, gradients, weights and the mask's bits read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "sparse/mask_bits.cuh"
#include "sparse/sgd.h"
#include "support/cuda/grid.cuh"
#include "support/cuda/pack.cuh"

namespace blokern {

constexpr int kSgdLayers = 56;
constexpr int64_t kSgdPacks = int64_t{kTeamThreads} * kPacksAThread;  // a block

template <class T>
struct SgdTensors {
  T* value;
  const T* weight;
  const T* grad;
  T* buffer;
  const uint64_t* words;
  int64_t cols, size;
};

template <class T>
struct SgdList {
  SgdTensors<T> layers[kSgdLayers];
  BlockRanges<kSgdLayers> blocks;
};

// gradient(value, weight, grad, kept) of one entry; Gradient::kReadsWeight and kReadsMask say what
// it looks at.
template <class T, class Gradient>
__global__ void __launch_bounds__(kTeamThreads) descend(SgdList<T> list, SgdRates rates, Gradient gradient) {
  constexpr int pack = kPackSize<T>;
  const int index = list.blocks.owner(blockIdx.x);
  const SgdTensors<T> p = list.layers[index];
  const int64_t first = (blockIdx.x - list.blocks.begin[index]) * kSgdPacks;
  const int shift = misalignment(p.value);
  const int64_t end = (first + kSgdPacks) * pack - shift;
  const T lr = static_cast<T>(rates.lr), momentum = static_cast<T>(rates.momentum),
          weight_decay = static_cast<T>(rates.weight_decay);
  const Walk<pack> walk{end < p.size ? end : p.size, first + threadIdx.x, kTeamThreads, shift};
  walk.sweep([&](int64_t i, auto part) {
    const auto old = load<T>(p.value + i, part), grad = load<T>(p.grad + i, part);
    Pack<T, pack> weight{}, before{};
    if constexpr (Gradient::kReadsWeight) weight = load<T>(p.weight + i, part);
    if (p.buffer != nullptr) before = load<T>(p.buffer + i, part);
    unsigned kept = 0;
    if constexpr (Gradient::kReadsMask) kept = mask_bits(p.words, p.cols, i, part);
    Pack<T, pack> value, buffer;
#pragma unroll
    for (int k = 0; k < pack; ++k) {
      const T direction = gradient(old[k], weight[k], grad[k], (kept >> k & 1) != 0);
      const auto step = sgd_step(old[k], direction, before[k], lr, momentum, weight_decay);
      value[k] = step.value;
      buffer[k] = step.buffer;
    }
    store(p.value + i, value, part);
    if (p.buffer != nullptr) store(p.buffer + i, buffer, part);
  });
}

template <class T, class Gradient>
void launch_descend(std::span<const SgdLayer<T>> layers, Gradient gradient, const CudaCall& call) {
  for (size_t first = 0; first < layers.size(); first += kSgdLayers) {
    SgdList<T> list{};
    for (const SgdLayer<T>& p : layers.subspan(first, std::min<size_t>(kSgdLayers, layers.size() - first))) {
      const int64_t size = p.rows * p.cols;
      list.layers[list.blocks.count] = {p.value, p.weight, p.grad, p.buffer, p.words, p.cols, size};
      // A pack more where the first begins before the layer.
      list.blocks.append(size / kPackSize<T> / kSgdPacks + 1);
    }
    launch(descend<T, Gradient>, list.blocks.blocks(), kTeamThreads, false, call, list, layers[first].rates,
           gradient);
  }
}

}  // namespace blokern
