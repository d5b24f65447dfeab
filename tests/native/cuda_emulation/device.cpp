#include "device.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace emulation {

Device device;

namespace {

constexpr size_t kStack = 128 << 10, kLeft = 4 << 10;
constexpr int kIdleRounds = 100;  // in which threads spin and none goes on

// Stacks are kept between launches.
class Stacks {
 public:
  char* take() {
    if (free_.empty()) {
      void* const stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
      if (stack == MAP_FAILED) std::perror("mmap"), std::abort();
      return static_cast<char*>(stack);
    }
    char* const stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give(char* stack) {
    // What the frames that are never returned from have left, at the top.
    __asan_unpoison_memory_region(stack + kStack - kLeft, kLeft);
    free_.push_back(stack);
  }

 private:
  std::vector<char*> free_;
};

enum class State { ready, spinning, at_block, at_warp, done };

struct Block;

struct Thread {
  Place place;
  Block* block = nullptr;
  unsigned index = 0;  // in its block
  State state = State::ready;
  std::source_location site;
  WarpCall call = WarpCall::sync;
  unsigned mask = 0;
  int argument = 0;
  Combine combine = nullptr;
  uint64_t word = 0;  // brought to an exchange, then taken from it
  char* stack = nullptr;
  Context context{};

  unsigned lane() const { return index % kWarp; }
};

struct FreeBytes {
  void operator()(void* bytes) const { std::free(bytes); }
};
using Bytes = std::unique_ptr<void, FreeBytes>;

Bytes poisoned(size_t bytes) {
  Bytes memory(std::aligned_alloc(16, (bytes + 15) / 16 * 16));
  std::memset(memory.get(), 0xff, bytes);
  // The array's own end, not the allocation's.
  __asan_poison_memory_region(static_cast<char*>(memory.get()) + bytes, (bytes + 15) / 16 * 16 - bytes);
  return memory;
}

struct Block {
  std::vector<Thread> threads;
  std::map<const void*, Bytes> arrays;
  size_t static_bytes = 0;
  Bytes dynamic;
};

struct Run {
  const void* kernel;
  const std::function<void()>* body;
  std::vector<Block> blocks;  // those that are live
  Thread* running = nullptr;
  Context scheduler{};
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};

// Which kernels this program has launched: written at its end to the file that BLOKERN_LAUNCHED names, a line
// each, the program and the address of the kernel's symbol in it.
struct Launched {
  std::set<const void*> kernels;
  ~Launched();
};

Stacks stacks;
Run* run = nullptr;
Launched launched;
std::map<const void*, size_t> dynamic_limits;

std::string text(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::string text(const std::source_location& site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

std::string text(const Thread& thread) {
  const std::string who = "block " + text(thread.place.block) + ", thread " + text(thread.place.thread);
  switch (thread.state) {
    case State::ready:
      return who + " is running";
    case State::spinning:
      return who + " spins";
    case State::at_block:
      return who + " is at the block's barrier of " + text(thread.site);
    case State::at_warp:
      return who + " is at a warp's exchange of " + text(thread.site);
    case State::done:
      return who + " has returned";
  }
  return who;
}

std::string name_of(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "(unnamed)";
  int status = 0;
  const std::unique_ptr<char, FreeBytes> name(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status));
  return status == 0 ? name.get() : info.dli_sname;
}

Launched::~Launched() {
  const char* const path = std::getenv("BLOKERN_LAUNCHED");
  std::FILE* const file = path == nullptr ? nullptr : std::fopen(path, "a");
  if (file == nullptr) return;
  std::string lines;
  for (const void* kernel : kernels) {
    Dl_info info;
    if (dladdr(kernel, &info) == 0) continue;
    const auto address = static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase);
    lines += std::string(info.dli_fname) + " " + std::to_string(address) + "\n";
  }
  std::fwrite(lines.data(), 1, lines.size(), file);
  std::fclose(file);
}

void to_scheduler(bool last) {
  Thread& self = *run->running;
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, run->scheduler_stack, run->scheduler_stack_size);
  switch_context(self.context, run->scheduler);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &run->scheduler_stack, &run->scheduler_stack_size);
  (*run->body)();
  run->running->state = State::done;
  to_scheduler(/*last=*/true);
}

void resume(Thread& thread) {
  thread.state = State::ready;
  run->running = &thread;
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, thread.stack, kStack);
  switch_context(run->scheduler, thread.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
  run->running = nullptr;
  if (thread.state == State::done) stacks.give(std::exchange(thread.stack, nullptr));
}

void start(Thread& thread) {
  thread.stack = stacks.take();
  prepare(thread.context, thread.stack, kStack, fiber_main);
}

// Lets a block go on from its barrier where all have come; whether it did.
bool release(Block& block) {
  const Thread& first = block.threads.front();
  for (const Thread& thread : block.threads) {
    if (thread.state != State::at_block) return false;
  }
  for (Thread& thread : block.threads) {
    if (thread.site.line() != first.site.line() || thread.site.column() != first.site.column() ||
        std::strcmp(thread.site.file_name(), first.site.file_name()) != 0) {
      fail("barrier divergence: " + text(first) + ", and " + text(thread));
    }
  }
  for (Thread& thread : block.threads) thread.state = State::ready;
  return true;
}

// The same of a warp's exchange, when the last of its lanes comes.
void complete_exchange(Thread& self) {
  const unsigned warp = self.index / kWarp * kWarp;
  uint64_t words[kWarp] = {};
  Thread* lanes[kWarp] = {};
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((self.mask >> lane & 1) == 0) continue;
    if (warp + lane >= self.block->threads.size()) {
      fail("lane " + std::to_string(lane) + " of the mask is beyond the block");
    }
    Thread& other = self.block->threads[warp + lane];
    if (other.state != State::at_warp) return;  // still to come
    if (other.mask != self.mask || other.call != self.call || other.site.line() != self.site.line()) {
      fail("a warp's lanes meet in different calls: " + text(self) + ", and " + text(other));
    }
    words[lane] = other.word;
    lanes[lane] = &other;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (lanes[lane] == nullptr) continue;
    lanes[lane]->word = lanes[lane]->combine(lane, self.mask, words, lanes[lane]->argument);
    lanes[lane]->state = State::ready;
  }
}

void run_blocks(std::mt19937& random) {
  std::vector<Thread*> order;
  for (Block& block : run->blocks) {
    for (Thread& thread : block.threads) order.push_back(&thread);
  }
  if (device.schedule == Schedule::reverse) std::reverse(order.begin(), order.end());
  for (int idle = 0;;) {
    // A round: each thread that can go on, once; those that spin, where nobody else can.
    if (device.schedule == Schedule::shuffled) std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (Thread* thread : order) {
      if (thread->state == State::ready) resume(*thread), progress = true;
    }
    for (Block& block : run->blocks) progress |= release(block);
    idle = progress ? 0 : idle + 1;
    if (progress) continue;
    const auto in = [](State state) { return [state](const Thread* t) { return t->state == state; }; };
    if (std::all_of(order.begin(), order.end(), in(State::done))) return;
    if (idle < kIdleRounds && std::any_of(order.begin(), order.end(), in(State::spinning))) {
      for (Thread* thread : order) {
        if (thread->state == State::spinning) resume(*thread);
      }
      continue;
    }
    std::string waiting = "no thread can go on (a barrier or an exchange that some do not come to):";
    int told = 0;
    for (Thread* thread : order) {
      if (thread->state != State::done && told++ < 4) waiting += " " + text(*thread) + ";";
    }
    for (Thread* thread : order) {
      if (thread->state == State::done && told++ < 8) waiting += " " + text(*thread) + ";";
    }
    fail(waiting);
  }
}

dim3 unflatten(uint64_t index, dim3 size) {
  return {static_cast<unsigned>(index % size.x), static_cast<unsigned>(index / size.x % size.y),
          static_cast<unsigned>(index / size.x / size.y)};
}

uint64_t volume(dim3 d) { return uint64_t{d.x} * d.y * d.z; }

void add_block(uint64_t index, dim3 grid, dim3 size, size_t dynamic_bytes) {
  Block& block = run->blocks.emplace_back();
  if (dynamic_bytes > 0) block.dynamic = poisoned(dynamic_bytes);
  block.threads.resize(volume(size));
  for (unsigned t = 0; t < block.threads.size(); ++t) {
    Thread& thread = block.threads[t];
    thread.place = {unflatten(t, size), unflatten(index, grid), size, grid};
    thread.block = &block;
    thread.index = t;
    start(thread);
  }
}

}  // namespace

const Place& place() { return run->running->place; }

bool launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, bool cooperative,
            const std::function<void()>& body) {
  const auto allowed = dynamic_limits.find(kernel);
  const size_t limit = allowed == dynamic_limits.end() ? kStaticShared : allowed->second;
  const uint64_t resident = uint64_t(device.multiprocessors) * unsigned(device.blocks_a_multiprocessor);
  if (volume(grid) == 0 || volume(block) == 0 || volume(block) > kMaxThreads || block.z > 64 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || dynamic_bytes > limit ||
      (cooperative && volume(grid) > resident)) {
    return false;
  }
  if (run != nullptr) fail("a launch from within a kernel");
  launched.kernels.insert(kernel);
  std::mt19937 random(device.seed);
  if (device.ends != 0 && cooperative) fail("a cooperative launch of which some blocks do not run");
  // Blocks do not know of each other, so that their order is free.
  const uint64_t skipped = device.ends == 0 ? 0 : volume(grid) - std::min(volume(grid), 2 * device.ends);
  std::vector<uint64_t> order(volume(grid) - skipped);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i < device.ends ? i : i + skipped;
  if (device.schedule == Schedule::reverse) std::reverse(order.begin(), order.end());
  if (device.schedule == Schedule::shuffled) std::shuffle(order.begin(), order.end(), random);
  const size_t at_once = cooperative ? order.size() : 1;
  for (size_t first = 0; first < order.size(); first += at_once) {
    Run current{};
    current.kernel = kernel;
    current.body = &body;
    current.blocks.reserve(at_once);  // threads point to their blocks
    run = &current;
    for (size_t i = first; i < first + at_once; ++i) add_block(order[i], grid, block, dynamic_bytes);
    run_blocks(random);
    run = nullptr;
  }
  return true;
}

void allow_dynamic_shared(const void* kernel, size_t bytes) { dynamic_limits[kernel] = bytes; }

void wait_for_block(const std::source_location& site) {
  Thread& self = *run->running;
  self.site = site;
  self.state = State::at_block;
  to_scheduler(false);
}

uint64_t exchange(WarpCall call, unsigned mask, uint64_t word, int argument, Combine combine,
                  const std::source_location& site) {
  Thread& self = *run->running;
  self.site = site;
  if ((mask >> self.lane() & 1) == 0) fail("a lane that is not in its own mask, at " + text(site));
  self.call = call;
  self.mask = mask;
  self.word = word;
  self.argument = argument;
  self.combine = combine;
  self.state = State::at_warp;
  complete_exchange(self);
  // Also where all are here: the others may run first.
  to_scheduler(false);
  return self.word;
}

void yield() {
  run->running->state = State::spinning;
  to_scheduler(false);
}

void* shared(const void* key, size_t bytes) {
  Block& block = *run->running->block;
  Bytes& memory = block.arrays[key];
  if (memory == nullptr) {
    memory = poisoned(bytes);
    block.static_bytes += bytes;
    if (block.static_bytes > kStaticShared) fail("more than 48 KiB of static shared memory");
  }
  return memory.get();
}

void* dynamic_shared() {
  void* const memory = run->running->block->dynamic.get();
  if (memory == nullptr) fail("dynamic shared memory, and the launch gave none");
  return memory;
}

std::string where() {
  if (run == nullptr) return "outside kernels";
  std::string told = "kernel " + name_of(run->kernel);
  if (run->running != nullptr) {
    told += ", block " + text(run->running->place.block) + ", thread " + text(run->running->place.thread);
  }
  return told;
}

void fail(const std::string& what) {
  std::fprintf(stderr, "cuda emulation: %s\n  in %s\n", what.c_str(), where().c_str());
  std::fflush(nullptr);
  std::_Exit(3);
}

}  // namespace emulation

// The sanitizers' own hooks: their reports end with where the kernel was.
extern "C" {
__attribute__((no_sanitize("address"))) void __asan_on_error() {
  std::fprintf(stderr, "cuda emulation: in %s\n", emulation::where().c_str());
}
__attribute__((no_sanitize("address"))) void __ubsan_on_report() {
  std::fprintf(stderr, "cuda emulation: in %s\n", emulation::where().c_str());
}
}
