// multi_tensor_dot, multi_tensor_axpby_ and cg_update_ on CUDA: one launch for many tensors.
// Threads: a block 4096 neighbouring elements of one column of one tensor, a thread a few packs of 16 bytes,
//   from the column's first element on; columns that 16 bytes do not divide are accessed by elements.
// Shared memory: the warps' sums, 64 bytes.
// Numerics: a pack's terms in the accumulation type, packs in double, threads in a fixed tree; blocks in
//   another, by a launch of their own. A column's sums depend on the sizes of its tensors alone: the same
//   bits on every run, whatever lies beside it.
// Memory: each element once; 8 bytes a block for its sum.
#pragma once

#include <algorithm>
#include <cstdint>

#include "curvature/multi_tensor.h"
#include "support/cuda/grid.cuh"
#include "support/cuda/pack.cuh"
#include "support/cuda/team.cuh"

namespace blokern {

constexpr int kListTensors = 56;

template <class P>
struct TensorList {
  ListTensor<P> tensors[kListTensors];
  BlockRanges<kListTensors> blocks;
};

// Op::block(p, column, begin, walk, team) for a block's elements, which `walk` counts from `begin` on; what
// it gives is their sum, where the op has one.
template <class Op, class P>
__global__ void __launch_bounds__(kTeamThreads) each_block(TensorList<P> list, BlockSums sums) {
  const int index = list.blocks.owner(blockIdx.x);
  const ListTensor<P> tensor = list.tensors[index];
  const int64_t block = blockIdx.x - list.blocks.begin[index], blocks = multi_tensor_cuda_blocks(tensor.size);
  const int64_t column = block / blocks, part = block % blocks;
  const int64_t rest = tensor.size - part * kMultiTensorCudaBlock;
  const int64_t begin = column * tensor.size + part * kMultiTensorCudaBlock;
  const int64_t size = rest < kMultiTensorCudaBlock ? rest : kMultiTensorCudaBlock;
  Team team(Teams{1, 0, nullptr, nullptr});
  const double sum = Op::block(tensor.p, column, begin, team.walk<Op::kPack>(size, 0), team);
  if (sums.values != nullptr && team.leads()) sums.values[column * sums.count + tensor.place + part] = sum;
}

template <class T>
struct DotBlock {
  static constexpr int kPack = kPackSize<T>;

  template <class Walk>
  static BLOKERN_DEVICE double block(const Dot<T>& p, int64_t /*column*/, int64_t begin, const Walk& walk,
                                     Team& team) {
    using A = Accum<T>;
    const T *const a = p.a + begin, *const b = p.b + begin;
    return team.template sum<A>(walk, [=](int64_t i, auto part) {
      const auto first = load<A>(a + i, part), second = load<A>(b + i, part);
      return each<A>(part, [&](int k) { return first[k] * second[k]; });
    });
  }
};

template <class T>
struct AxpbyBlock {
  static constexpr int kPack = kPackSize<T>;

  template <class Walk>
  static BLOKERN_DEVICE double block(const Axpby<T>& p, int64_t column, int64_t begin, const Walk& walk,
                                     Team& /*team*/) {
    using A = Accum<T>;
    const double of_x = p.a[column], of_y = p.b[column];
    const bool reads_x = of_x != 0, reads_y = of_y != 0;
    if (!reads_x && of_y == 1) return 0;
    const A a = static_cast<A>(of_x), b = static_cast<A>(of_y);
    T* const y = p.y + begin;
    const T* const x = p.x + begin;
    walk.sweep([=](int64_t i, auto part) {
      const auto from_x = reads_x ? load<A>(x + i, part) : Pack<A, kPack>{};
      const auto from_y = reads_y ? load<A>(y + i, part) : Pack<A, kPack>{};
      store(y + i, each<A>(part, [&](int k) { return axpby_formula(from_y[k], from_x[k], a, b); }), part);
    });
    return 0;
  }
};

template <class T>
struct CgUpdateBlock {
  static constexpr int kPack = kPackSize<T>;

  template <class Walk>
  static BLOKERN_DEVICE double block(const CgUpdate<T>& p, int64_t column, int64_t begin, const Walk& walk,
                                     Team& team) {
    using A = Accum<T>;
    const double step_size = p.alpha[column];
    const bool steps = step_size != 0;
    const A alpha = static_cast<A>(step_size);
    T *const x = p.x + begin, *const r = p.r + begin;
    const T *const along = p.p + begin, *const image = p.ap + begin;
    return team.template sum<A>(walk, [=](int64_t i, auto part) {
      auto residual = load<A>(r + i, part);
      if (steps) {
        const auto direction = load<A>(along + i, part), product = load<A>(image + i, part);
        auto solution = load<A>(x + i, part);
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          const auto step = cg_update_formula(solution[k], residual[k], direction[k], product[k], alpha);
          solution[k] = step.x;
          residual[k] = step.r;
        }
        store(x + i, solution, part);
        store(r + i, residual, part);
      }
      return each<A>(part, [&](int k) { return residual[k] * residual[k]; });
    });
  }
};

__global__ void __launch_bounds__(kTeamThreads) add_blocks(BlockSums sums, double* total) {
  Team team(Teams{1, 0, nullptr, nullptr});
  const double* const values = sums.values + blockIdx.x * sums.count;
  const auto walk = team.walk<kPackSize<double>>(sums.count, 0);
  const double sum =
      team.sum<double>(walk, [=](int64_t i, auto part) { return load<double>(values + i, part); });
  if (team.leads()) total[blockIdx.x] = sum;
}

}  // namespace blokern
