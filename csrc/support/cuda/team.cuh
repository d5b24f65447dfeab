// Teams: the blocks that work on one row, and their sums. A row that one block walks in a few steps has a
// block; a long row has as many as keep the rows in flight within the L2 cache, so that what a sum has read
// is read again from there. Blocks of a team exchange sums through memory and wait for each other, which a
// cooperative launch allows: all its blocks are resident.
//
// Sums are the same bits on every run: each thread adds its packs in order, threads and blocks are added in
// fixed trees. They depend on the launch's shape, and so on the device and on the batch. A pack's terms add
// up in the accumulation type, packs in double.
#pragma once

#include <algorithm>
#include <cstdint>

#include "support/cuda/launch.cuh"
#include "support/cuda/pack.cuh"

namespace blokern {

constexpr int kTeamThreads = 256;
constexpr int kWarpSize = 32, kWarps = kTeamThreads / kWarpSize;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kPacksAThread = 4;  // what a thread does at least, where a row is split

// A launch's teams, and the memory through which their blocks talk: none where a team is one block.
struct Teams {
  int blocks;          // of a team
  int slots;           // doubles that a block can hand over at once
  double* memory;      // [teams][2][blocks][slots]
  unsigned* arrivals;  // [teams], zero
};

template <int K>
struct Sums {
  double v[K];
};

// How the K values of a sum are combined: added up, or, from the kLargest-th on, the largest taken, of
// non-negative values; a NaN is taken, and then stays.
template <int kLargest>
struct Combine {
  template <class A>
  BLOKERN_DEVICE A operator()(int k, A a, A b) const {
    if (k < kLargest) return a + b;
    return a != a || a >= b ? a : b;
  }
  template <int K>
  BLOKERN_DEVICE Sums<K> operator()(Sums<K> a, const Sums<K>& b) const {
#pragma unroll
    for (int k = 0; k < K; ++k) a.v[k] = (*this)(k, a.v[k], b.v[k]);
    return a;
  }
};

// All lanes' values merged, for each of them: merge(a, b) of two.
template <int K, class Merge>
BLOKERN_DEVICE Sums<K> over_warp(Sums<K> value, Merge merge) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    Sums<K> other;
#pragma unroll
    for (int k = 0; k < K; ++k) other.v[k] = __shfl_xor_sync(kFullWarp, value.v[k], lanes);
    value = merge(value, other);
  }
  return value;
}

// What every team can do with its walk of a row, whoever its threads are: Self::reduce(value,
// merge) merges theirs.
template <class Self>
class Summing {
 public:
  // K sums over the row that the team walks, those from kLargest on the largest instead: terms(i, part) gives
  // a pack's, as add(k, s), which adds those of element k to s[0..K).
  template <class A, int K, int kLargest = K, class Walk, class Terms>
  BLOKERN_DEVICE Sums<K> sums(const Walk& walk, Terms terms) {
    const Combine<kLargest> combine;
    Sums<K> mine{};
    walk.sweep([&](int64_t i, auto part) {
      const auto add = terms(i, part);
      A s[K] = {};
#pragma unroll
      for (int k = 0; k < part.size; ++k) {
        if (part.has(k)) add(k, s);
      }
#pragma unroll
      for (int k = 0; k < K; ++k) mine.v[k] = combine(k, mine.v[k], static_cast<double>(s[k]));
    });
    return static_cast<Self*>(this)->reduce(mine, combine);
  }

  // The sum of all that terms(i, part) gives, a pack an A.
  template <class A, class Walk, class Terms>
  BLOKERN_DEVICE double sum(const Walk& walk, Terms terms) {
    const auto one = [&](int64_t i, auto part) {
      return [found = terms(i, part)](int k, A* s) { s[0] += found[k]; };
    };
    return sums<A, 1>(walk, one).v[0];
  }
};

// A warp a row: for rows so short that a block would mostly wait for itself.
class WarpTeam : public Summing<WarpTeam> {
 public:
  BLOKERN_DEVICE explicit WarpTeam(const Teams& /*teams*/) {}

  BLOKERN_DEVICE int64_t index() const {
    return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  }
  BLOKERN_DEVICE int64_t count() const { return static_cast<int64_t>(gridDim.x) * kWarps; }

  // Whether this thread is the one that writes what there is one of.
  BLOKERN_DEVICE bool leads() const { return threadIdx.x % kWarpSize == 0; }

  template <int kSize>
  BLOKERN_DEVICE Walk<kSize> walk(int64_t size, int shift) const {
    return {size, threadIdx.x % kWarpSize, kWarpSize, shift};
  }

  template <int K, class Merge>
  BLOKERN_DEVICE Sums<K> reduce(Sums<K> value, Merge merge) {
    return over_warp(value, merge);
  }
};

class Team : public Summing<Team> {
 public:
  BLOKERN_DEVICE explicit Team(const Teams& teams)
      : blocks_(teams.blocks),
        rank_(static_cast<int>(blockIdx.x % teams.blocks)),
        slots_(teams.slots),
        memory_(teams.memory) {
    if (memory_ == nullptr) return;
    memory_ += index() * 2 * blocks_ * slots_;
    arrivals_ = teams.arrivals + index();
  }

  // The rows that this team takes are index(), index() + count(), …
  BLOKERN_DEVICE int64_t index() const { return blockIdx.x / blocks_; }
  BLOKERN_DEVICE int64_t count() const { return gridDim.x / blocks_; }

  BLOKERN_DEVICE int rank() const { return rank_; }
  BLOKERN_DEVICE bool leads() const { return rank_ == 0 && threadIdx.x == 0; }

  template <int kSize>
  BLOKERN_DEVICE Walk<kSize> walk(int64_t size, int shift) const {
    return {size, static_cast<int64_t>(rank_) * blockDim.x + threadIdx.x,
            static_cast<int64_t>(blocks_) * blockDim.x, shift};
  }

  // All threads' values merged, for every thread of the team the same bits; merge(Sums{}, v) is v.
  template <int K, class Merge>
  BLOKERN_DEVICE Sums<K> reduce(Sums<K> value, Merge merge) {
    BLOKERN_SHARED(double, of_warp, K* kWarps);
    value = over_warp(value, merge);
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    if (threadIdx.x % kWarpSize == 0) {
      for (int k = 0; k < K; ++k) of_warp[k * kWarps + warp] = value.v[k];
    }
    __syncthreads();
    for (int other = 0; other < kWarps; ++other) {
      Sums<K> next;
      for (int k = 0; k < K; ++k) next.v[k] = of_warp[k * kWarps + other];
      value = other == 0 ? next : merge(value, next);
    }
    __syncthreads();  // of_warp is free again
    if (blocks_ == 1) return value;
    if (threadIdx.x == 0) {
      for (int k = 0; k < K; ++k) slot(rank_)[k] = value.v[k];
    }
    wait_for_blocks();
    // Every warp reads all blocks' values, so that no further barrier is needed.
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    value = Sums<K>{};
    for (int block = lane; block < blocks_; block += kWarpSize) {
      Sums<K> next;
      for (int k = 0; k < K; ++k) next.v[k] = __ldcg(slot(block) + k);
      value = merge(value, next);
    }
    value = over_warp(value, merge);
    turn_ ^= 1;
    return value;
  }

  // The sum over blocks of what their threads of this number have: kTeamThreads slots.
  BLOKERN_DEVICE double sum_of_blocks(double mine) {
    if (blocks_ == 1) return mine;
    slot(rank_)[threadIdx.x] = mine;
    wait_for_blocks();
    double total = 0;
    for (int block = 0; block < blocks_; ++block) total += __ldcg(slot(block) + threadIdx.x);
    turn_ ^= 1;
    return total;
  }

 private:
  // Two sets, in turns: a block may hand over its next values while another still reads the last.
  BLOKERN_DEVICE double* slot(int block) const { return memory_ + (turn_ * blocks_ + block) * slots_; }

  // Until every block of the team is here; what they wrote before is then to be seen (read by __ldcg: the
  // first level's caches do not know of each other).
  BLOKERN_DEVICE void wait_for_blocks() {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      awaited_ += static_cast<unsigned>(blocks_);
      atomicAdd(arrivals_, 1u);
      // A difference, for the count may wrap around.
      while (static_cast<int>(atomicAdd(arrivals_, 0u) - awaited_) < 0) __nanosleep(32);
      __threadfence();
    }
    __syncthreads();
  }

  int blocks_, rank_, slots_;
  double* memory_;
  unsigned* arrivals_ = nullptr;
  unsigned awaited_ = 0;
  int turn_ = 0;
};

// Launches kernel(p, teams), whose teams are warps, on `rows` rows.
template <class P>
void launch_warps(void (*kernel)(P, Teams), const P& p, int64_t rows, const CudaCall& call) {
  if (rows == 0) return;
  const int64_t blocks = std::min<int64_t>((rows - 1) / kWarps + 1, 1 << 20);
  launch(kernel, blocks, kTeamThreads, false, call, p, Teams{1, 0, nullptr, nullptr});
}

// Launches kernel(p, teams) on `rows` rows of `size` elements, of which a pack has `pack`; row_bytes is what
// a row's tensors take. sums: the kernel's blocks wait for each other; `slots` as in Teams.
template <class P>
void launch_teams(void (*kernel)(P, Teams), const P& p, int64_t rows, int64_t size, int pack,
                  int64_t row_bytes, int slots, const CudaCall& call) {
  if (rows == 0 || size == 0) return;
  const int64_t useful = (size - 1) / (int64_t{kTeamThreads} * kPacksAThread * pack) + 1;
  if (useful == 1 || slots == 0) {
    // One block a row, or blocks that do not know of each other.
    const int64_t most = 1 << 20;
    const int64_t blocks = std::min(useful, most);
    const int64_t teams = std::min(rows, std::max<int64_t>(1, most / blocks));
    return launch(kernel, teams * blocks, kTeamThreads, false, call, p,
                  Teams{static_cast<int>(blocks), 0, nullptr, nullptr});
  }
  int a_multiprocessor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&a_multiprocessor, kernel, kTeamThreads, 0),
        "blokern: a CUDA kernel cannot be launched");
  const int64_t resident = a_multiprocessor * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t cache = device_attribute(cudaDevAttrL2CacheSize) / 2;
  const int64_t wanted = std::max(resident / rows, resident * row_bytes / std::max<int64_t>(cache, 1));
  const int64_t blocks = std::clamp<int64_t>(wanted, 1, std::min(useful, resident));
  const int64_t teams = std::min(rows, resident / blocks);
  if (blocks == 1) {
    return launch(kernel, std::min<int64_t>(rows, 1 << 20), kTeamThreads, false, call, p,
                  Teams{1, 0, nullptr, nullptr});
  }
  const int64_t doubles = teams * 2 * blocks * slots;
  void* const memory = call.zeros(doubles * sizeof(double) + teams * sizeof(unsigned));
  auto* const values = static_cast<double*>(memory);
  launch(kernel, teams * blocks, kTeamThreads, true, call, p,
         Teams{static_cast<int>(blocks), slots, values, reinterpret_cast<unsigned*>(values + doubles)});
}

}  // namespace blokern
