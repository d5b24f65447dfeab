// The emulation tests itself: kernels with planted bugs, each to be caught under at least one schedule, and
// correct twins that must pass under all. One case a process: `test_device CASE SCHEDULE` exits 0 where the
// result is right, 1 where it is wrong (a bug that shows in the numbers), 3 or by a sanitizer where the
// device refused it; without arguments it prints the cases' names.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "support/cuda/launch.cuh"

namespace planted {

constexpr unsigned kThreads = 64;
constexpr unsigned kAll = 0xffffffffu;

struct alignas(16) Four {
  float v[4];
};

template <class... Parameters, class... Arguments>
bool run(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) {
  cudaLaunchConfig_t config{grid, block, 0, nullptr, nullptr, 0};
  return cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess;
}

// An allocation of its own, of exactly its size.
std::unique_ptr<float[]> floats(size_t count) {
  auto memory = std::make_unique<float[]>(count);
  for (size_t i = 0; i < count; ++i) memory[i] = float(i);
  return memory;
}

bool all_are(const float* values, size_t count, float wanted) {
  for (size_t i = 0; i < count; ++i) {
    if (!(values[i] == wanted)) return false;
  }
  return true;
}

// Each thread reads what another wrote.
template <bool barrier>
__global__ void reversal(const float* in, float* out) {
  BLOKERN_SHARED(float, tile, kThreads);
  tile[threadIdx.x] = in[threadIdx.x];
  if (barrier) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}
template <bool barrier>
bool check_reversal() {
  auto in = floats(kThreads), out = floats(kThreads);
  if (!run(reversal<barrier>, 1, kThreads, in.get(), out.get())) return false;
  for (unsigned i = 0; i < kThreads; ++i) {
    if (!(out[i] == in[kThreads - 1 - i])) return false;
  }
  return true;
}

// Two sums by one array: a thread that is early overwrites what another still reads.
template <bool second_barrier>
__global__ void two_rounds(float* out) {
  BLOKERN_SHARED(float, value, kThreads);
  float total = 0;
  for (int round = 0; round < 2; ++round) {
    value[threadIdx.x] = float(round);
    __syncthreads();
    for (unsigned t = 0; t < kThreads; ++t) total += value[t];
    if (second_barrier) __syncthreads();
  }
  out[threadIdx.x] = total;
}
template <bool second_barrier>
bool check_two_rounds() {
  auto out = floats(kThreads);
  return run(two_rounds<second_barrier>, 1, kThreads, out.get()) &&
         all_are(out.get(), kThreads, float(kThreads));
}

template <unsigned mask>
__global__ void half_warp_sum(float* out) {
  if (threadIdx.x < 16) {
    float value = 1;
    for (int lanes = 8; lanes > 0; lanes /= 2) value += __shfl_xor_sync(mask, value, lanes);
    out[threadIdx.x] = value;
  }
}
template <unsigned mask>
bool check_half_warp_sum() {
  auto out = floats(16);
  return run(half_warp_sum<mask>, 1, 32, out.get()) && all_are(out.get(), 16, 16);
}

// The shuffle reads beyond its mask.
__global__ void shuffle_outside_mask(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 16);
}
bool check_shuffle_outside_mask() {
  auto out = floats(16);
  return run(shuffle_outside_mask, 1, 32, out.get()) && all_are(out.get(), 16, 1);
}

template <bool in_branch>
__global__ void divergent(float* out) {
  if (in_branch && threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}
template <bool in_branch>
bool check_divergent() {
  auto out = floats(kThreads);
  return run(divergent<in_branch>, 1, kThreads, out.get()) && all_are(out.get(), kThreads, 1);
}

__global__ void early_return(float* out) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
bool check_early_return() {
  auto out = floats(kThreads);
  return run(early_return, 1, kThreads, out.get());
}

template <unsigned beyond>
__global__ void write(float* out) {
  out[threadIdx.x + beyond] = 1;
}
template <unsigned beyond>
bool check_write() {
  auto out = floats(kThreads);
  return run(write<beyond>, 1, kThreads, out.get()) && all_are(out.get(), kThreads, 1);
}

template <unsigned beyond>
__global__ void write_shared(float* out) {
  BLOKERN_SHARED(float, tile, 33);
  if (threadIdx.x < 33) tile[threadIdx.x + beyond] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[32];
}
template <unsigned beyond>
bool check_write_shared() {
  auto out = floats(kThreads);
  return run(write_shared<beyond>, 1, kThreads, out.get()) && all_are(out.get(), kThreads, 1);
}

template <unsigned beyond>
__global__ void write_dynamic(float* out) {
  BLOKERN_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + beyond] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x + beyond];
}
template <unsigned beyond>
bool check_write_dynamic() {
  auto out = floats(kThreads);
  cudaLaunchConfig_t config{1, kThreads, kThreads * sizeof(float), nullptr, nullptr, 0};
  return cudaLaunchKernelEx(&config, write_dynamic<beyond>, out.get()) == cudaSuccess &&
         all_are(out.get(), kThreads, 1);
}

template <int shift>
__global__ void copy_fours(const float* in, float* out) {
  const Four four = *reinterpret_cast<const Four*>(in + 4 * threadIdx.x + shift);
  for (int k = 0; k < 4; ++k) out[4 * threadIdx.x + k] = four.v[k];
}
template <int shift>
bool check_copy_fours() {
  std::unique_ptr<Four[]> in(new Four[kThreads + 1]{}), out(new Four[kThreads]);
  return run(copy_fours<shift>, 1, kThreads, in[0].v, out[0].v) && all_are(out[0].v, 4 * kThreads, 0);
}

template <bool written>
__global__ void unwritten(float* out) {
  BLOKERN_SHARED(float, total, 1);
  if (written && threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  atomicAdd(&total[0], 1.0f);
  __syncthreads();
  out[threadIdx.x] = total[0];
}
template <bool written>
bool check_unwritten() {
  auto out = floats(kThreads);
  return run(unwritten<written>, 1, kThreads, out.get()) && all_are(out.get(), kThreads, float(kThreads));
}

template <bool skips_one>
__global__ void votes(float* out) {
  if (skips_one && threadIdx.x == 31) return;
  const unsigned odd = __ballot_sync(kAll, threadIdx.x % 2 == 1);
  __syncwarp();
  out[threadIdx.x] = float(__popc(odd) + __any_sync(kAll, 0) + __all_sync(kAll, 1));
}
template <bool skips_one>
bool check_votes() {
  auto out = floats(32);
  return run(votes<skips_one>, 1, 32, out.get()) && all_are(out.get(), 32, 17);
}

// Blocks that wait for each other run only where they are all there.
__global__ void meet(unsigned* arrived, float* out) {
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1u);
    while (atomicAdd(arrived, 0u) < gridDim.x) __nanosleep(32);
  }
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}
template <bool cooperative>
bool check_meet() {
  auto out = floats(4 * 32);
  unsigned arrived = 0;
  cudaLaunchAttribute attribute{cudaLaunchAttributeCooperative, {cooperative}};
  cudaLaunchConfig_t config{4, 32, 0, nullptr, &attribute, 1};
  return cudaLaunchKernelEx(&config, meet, &arrived, out.get()) == cudaSuccess &&
         all_are(out.get(), 4 * 32, 1);
}

template <unsigned grid_y, unsigned threads, bool cooperative>
bool check_limits() {
  auto out = floats(4096);
  unsigned arrived = 0;
  cudaLaunchAttribute attribute{cudaLaunchAttributeCooperative, {cooperative}};
  cudaLaunchConfig_t config{dim3(4, grid_y), threads, 0, nullptr, &attribute, 1};
  return cudaLaunchKernelEx(&config, meet, &arrived, out.get()) == cudaSuccess;
}

void mark(float* out) { out[blockIdx.x] = 1; }

// Ten blocks, of which those at the ends run.
template <bool cooperative>
bool check_ends() {
  auto out = floats(10);
  for (int i = 0; i < 10; ++i) out[i] = 0;
  emulation::device.ends = 2;
  emulation::device.blocks_a_multiprocessor = 5;
  cudaLaunchAttribute attribute{cudaLaunchAttributeCooperative, {cooperative}};
  cudaLaunchConfig_t config{10, 1, 0, nullptr, &attribute, 1};
  if (cudaLaunchKernelEx(&config, mark, out.get()) != cudaSuccess) return false;
  return all_are(out.get(), 2, 1) && all_are(out.get() + 2, 6, 0) && all_are(out.get() + 8, 2, 1);
}

// By the kernels' own launch, which counts in 64 bits.
template <int64_t blocks>
bool check_launch() {
  auto out = floats(1);
  try {
    blokern::launch(mark, blocks, 1, false, blokern::CudaCall{}, out.get());
  } catch (const std::runtime_error&) {
    return false;
  }
  return all_are(out.get(), 1, 1);
}

struct Case {
  std::string name;  // a "bug: ..." is to be caught, an "ok: ..." to pass
  std::function<bool()> passes;
};

const Case kCases[] = {
    {"ok: barrier", check_reversal<true>},
    {"bug: deleted barrier", check_reversal<false>},
    {"ok: two barriers", check_two_rounds<true>},
    {"bug: deleted second barrier", check_two_rounds<false>},
    {"ok: mask of half a warp", check_half_warp_sum<0xffffu>},
    {"bug: mask of lanes that do not come", check_half_warp_sum<0xffffffffu>},
    {"bug: mask without its own lanes", check_half_warp_sum<0xffu>},
    {"bug: shuffle from outside its mask", check_shuffle_outside_mask},
    {"ok: barrier outside branches", check_divergent<false>},
    {"bug: barriers in two branches", check_divergent<true>},
    {"bug: return before a barrier", check_early_return},
    {"ok: write", check_write<0>},
    {"bug: off by one", check_write<1>},
    {"ok: shared array", check_write_shared<0>},
    {"bug: shared array overflows", check_write_shared<1>},
    {"ok: dynamic shared memory", check_write_dynamic<0>},
    {"bug: dynamic shared memory overflows", check_write_dynamic<1>},
    {"ok: aligned vectors", check_copy_fours<0>},
    {"bug: misaligned vectors", check_copy_fours<1>},
    {"ok: shared memory written first", check_unwritten<true>},
    {"bug: shared memory read before it is written", check_unwritten<false>},
    {"ok: votes", check_votes<false>},
    {"bug: vote of a lane that has returned", check_votes<true>},
    {"ok: blocks that wait for each other", check_meet<true>},
    {"bug: blocks that wait for blocks yet to start", check_meet<false>},
    {"bug: more threads than a block has", check_limits<1, 1025, false>},
    {"bug: more blocks than a cooperative launch can hold", check_limits<2, 32, true>},
    {"bug: more rows of blocks than a grid has", check_limits<65536, 32, false>},
    {"ok: the ends of a grid", check_ends<false>},
    {"bug: the ends of a grid whose blocks may wait", check_ends<true>},
    {"ok: a launch", check_launch<1>},
    {"bug: a launch of no blocks", check_launch<0>},
    {"bug: more blocks than 32 bits count", check_launch<(int64_t{1} << 32) + 1>},
};

}  // namespace planted

int main(int count, char** arguments) {
  if (count < 3) {
    for (const planted::Case& c : planted::kCases) std::puts(c.name.c_str());
    return 0;
  }
  const std::map<std::string, emulation::Schedule> schedules = {{"forward", emulation::Schedule::forward},
                                                                {"reverse", emulation::Schedule::reverse},
                                                                {"shuffled", emulation::Schedule::shuffled}};
  emulation::device.schedule = schedules.at(arguments[2]);
  for (const planted::Case& c : planted::kCases) {
    if (c.name == arguments[1]) return c.passes() ? 0 : 1;
  }
  return 2;
}
