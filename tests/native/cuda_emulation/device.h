// The emulated device: blocks of fibers, one a thread, on one core. A fiber runs until it waits (for its
// block, its warp, or by spinning), so a schedule is the order in which waiting threads go on; tests run
// under several. What CUDA leaves undefined is an error here, told with kernel, block and thread: barriers
// that some threads miss or reach from different calls, lanes absent from a mask, launches beyond sm_80's
// limits. ASan and UBSan see memory: out of bounds (each tensor and each shared array is an allocation of its
// own) and misaligned vectors. Shared memory begins as 0xff bytes: NaN to whoever reads before writing. Not
// seen: memory ordering between threads that run at once, coalescing, speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

enum class Schedule { forward, reverse, shuffled };

// What host code can ask for and tests can set. Small, so that small tests fill it.
struct Device {
  Schedule schedule = Schedule::forward;
  unsigned seed = 0;  // of the shuffled schedule
  int multiprocessors = 2;
  int blocks_a_multiprocessor = 2;
  int l2_bytes = 1 << 16;
  // Of a grid that has more, so many blocks run at either end, the others not; 0: all. For tensors that are
  // too large to be worked on, whose kernels' blocks do not wait for each other.
  uint64_t ends = 0;
};
extern Device device;

struct Place {
  dim3 thread, block, block_size, grid_size;
};
// Of the thread that is running.
const Place& place();

// sm_80's.
constexpr unsigned kMaxThreads = 1024, kWarp = 32;
constexpr size_t kStaticShared = 48 << 10, kOptInShared = 163 << 10;

// Runs a grid; false where the launch's configuration is refused. cooperative: all of its blocks at once.
bool launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared, bool cooperative,
            const std::function<void()>& body);
void allow_dynamic_shared(const void* kernel, size_t bytes);

void wait_for_block(const std::source_location& site);

// A warp's exchange: once every lane of `mask` has come to this call, each is given combine(lane, words),
// where words are what the lanes brought (of lanes in the mask alone).
enum class WarpCall { sync, shuffle, ballot };
using Combine = uint64_t (*)(unsigned lane, unsigned mask, const uint64_t* words, int argument);
uint64_t exchange(WarpCall call, unsigned mask, uint64_t word, int argument, Combine combine,
                  const std::source_location& site);

// Lets the others run: in a loop that waits for another thread's write.
void yield();

// This block's array of a declaration; `key` is the declaration's.
void* shared(const void* key, size_t bytes);
void* dynamic_shared();

// "kernel K, block (x, y, z), thread (x, y, z)".
std::string where();
// Ends the process with `what` and where it happened.
[[noreturn]] void fail(const std::string& what);

}  // namespace emulation
