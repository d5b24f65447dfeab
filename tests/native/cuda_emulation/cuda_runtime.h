// In place of CUDA's own header where g++ or clang compile kernels for the emulation (device.h): the subset
// that blokern's kernels use.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>

#include "device.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulation {

template <dim3 Place::* which, unsigned dim3::* axis>
struct Coordinate {
  operator unsigned() const { return place().*which.*axis; }  // NOLINT: a number wherever one is wanted
};
template <dim3 Place::* which>
struct Coordinates {
  Coordinate<which, &dim3::x> x;
  Coordinate<which, &dim3::y> y;
  Coordinate<which, &dim3::z> z;
};

}  // namespace emulation

inline constexpr emulation::Coordinates<&emulation::Place::thread> threadIdx{};
inline constexpr emulation::Coordinates<&emulation::Place::block> blockIdx{};
inline constexpr emulation::Coordinates<&emulation::Place::block_size> blockDim{};
inline constexpr emulation::Coordinates<&emulation::Place::grid_size> gridDim{};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// An array of the block, at a declaration's own key. The count is a constant, as it is for nvcc.
#define BLOKERN_SHARED(type, name, count) \
  static const char name##_key = 0;       \
  static_assert((count) > 0);             \
  type* const name = static_cast<type*>(::emulation::shared(&name##_key, (count) * sizeof(type)))
#define BLOKERN_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::emulation::dynamic_shared())

using Site = std::source_location;

inline void __syncthreads(Site site = Site::current()) { emulation::wait_for_block(site); }

inline void __syncwarp(unsigned mask = 0xffffffffu, Site site = Site::current()) {
  const auto nothing = [](unsigned, unsigned, const uint64_t*, int) -> uint64_t { return 0; };
  emulation::exchange(emulation::WarpCall::sync, mask, 0, 0, nothing, site);
}

namespace emulation {

inline uint64_t lane_word(unsigned source, unsigned mask, const uint64_t* words) {
  if ((mask >> source & 1) == 0)
    fail("a shuffle from lane " + std::to_string(source) + ", which is not in the mask");
  return words[source];
}

template <class T>
T shuffle(unsigned mask, T value, int argument, Combine combine, const Site& site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = exchange(WarpCall::shuffle, mask, word, argument, combine, site);
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, Site site = Site::current()) {
  return emulation::shuffle(
      mask, value, source,
      [](unsigned, unsigned mask, const uint64_t* words, int source) {
        return emulation::lane_word(unsigned(source) % 32, mask, words);
      },
      site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, Site site = Site::current()) {
  return emulation::shuffle(
      mask, value, lanes,
      [](unsigned lane, unsigned mask, const uint64_t* words, int lanes) {
        return emulation::lane_word((lane ^ unsigned(lanes)) % 32, mask, words);
      },
      site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, Site site = Site::current()) {
  return emulation::shuffle(
      mask, value, int(delta),
      [](unsigned lane, unsigned mask, const uint64_t* words, int delta) {
        const unsigned source = lane + unsigned(delta);
        return source < 32 ? emulation::lane_word(source, mask, words) : words[lane];
      },
      site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, Site site = Site::current()) {
  return emulation::shuffle(
      mask, value, int(delta),
      [](unsigned lane, unsigned mask, const uint64_t* words, int delta) {
        return lane >= unsigned(delta) ? emulation::lane_word(lane - unsigned(delta), mask, words)
                                       : words[lane];
      },
      site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Site site = Site::current()) {
  const auto votes = [](unsigned, unsigned, const uint64_t* words, int) {
    uint64_t set = 0;
    for (unsigned lane = 0; lane < 32; ++lane) set |= words[lane] << lane;
    return set;
  };
  return unsigned(
      emulation::exchange(emulation::WarpCall::ballot, mask, predicate != 0 ? 1 : 0, 0, votes, site));
}

inline int __any_sync(unsigned mask, int predicate, Site site = Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, Site site = Site::current()) {
  return __ballot_sync(mask, predicate, site) == mask;
}

// One thread runs at a time: a plain read and write cannot be torn apart.
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  *at = old + value;
  return old;
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  *at = std::max(old, value);
  return old;
}
template <class T>
T atomicOr(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  *at = old | value;
  return old;
}
template <class T>
T atomicExch(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  *at = value;
  return old;
}
template <class T>
T atomicCAS(T* at, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  const T old = *at;
  if (old == compare) *at = value;
  return old;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulation::yield(); }
template <class T>
T __ldcg(const T* at) {
  return *at;
}
template <class T>
void __stcg(T* at, T value) {
  *at = value;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(unsigned(bits)); }

// ---- The host's side.

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrL2CacheSize = 38 };

inline cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*index*/) {
  *value =
      attribute == cudaDevAttrL2CacheSize ? emulation::device.l2_bytes : emulation::device.multiprocessors;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int /*threads*/,
                                                          size_t /*shared*/) {
  *blocks = emulation::device.blocks_a_multiprocessor;
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > emulation::kOptInShared) return cudaErrorInvalidValue;
  emulation::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), size_t(bytes));
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// A stream is in order, and the host's call is the work itself.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> values(arguments...);
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    cooperative |=
        config->attrs[i].id == cudaLaunchAttributeCooperative && config->attrs[i].val.cooperative != 0;
  }
  const bool valid =
      emulation::launch(reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim,
                        config->dynamicSmemBytes, cooperative, [&] { std::apply(kernel, values); });
  return valid ? cudaSuccess : cudaErrorInvalidConfiguration;
}
