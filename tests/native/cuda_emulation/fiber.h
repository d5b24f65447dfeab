// A switch between stacks. On x86-64 our own: swapcontext asks the kernel for the signal mask each time, and
// ASan's interceptor clears the shadow of the whole stack, which together took two thirds of a test's time.
#pragma once

#include <cstddef>

#if defined(__x86_64__)

#include <cstdint>

namespace emulation {

struct Context {
  void* stack_pointer = nullptr;
};

// Saves the registers that a call preserves on this stack, and goes on with those that lie on the other.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.weak emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

inline void switch_context(Context& from, const Context& to) {
  emulation_switch(&from.stack_pointer, to.stack_pointer);
}

// A context in which `entry` is about to be called.
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  auto* top = reinterpret_cast<uint64_t*>(stack + size);
  *--top = 0;  // where entry would return to; it keeps the stack aligned as a call does
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = 0;
  context.stack_pointer = top;
}

}  // namespace emulation

#else

#include <ucontext.h>

namespace emulation {

using Context = ucontext_t;

inline void switch_context(Context& from, const Context& to) { swapcontext(&from, &to); }

inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

}  // namespace emulation

#endif
