#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

// swapcontext asks the kernel for the signal mask at every switch, hundreds of nanoseconds of which a few do; it is left
// to the processors that nothing better is written for here.
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kPage = 64 * 1024;  // a multiple of every page size in use
constexpr size_t kStack = 4 * kPage;

}  // namespace

#if defined(__x86_64__)

// Saves what a function must preserve on the stack, leaves the stack pointer at *from, and goes on where `to` left off.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.pushsection .text
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
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
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
.popsection
)");

void Fiber::resume() { cuda_on_cpu_switch(&outside_, inside_); }
void Fiber::suspend() { cuda_on_cpu_switch(&inside_, outside_); }

#else

void Fiber::resume() { swapcontext(static_cast<ucontext_t*>(outside_), static_cast<ucontext_t*>(inside_)); }
void Fiber::suspend() { swapcontext(static_cast<ucontext_t*>(inside_), static_cast<ucontext_t*>(outside_)); }

#endif

Fiber::Fiber(void (*body)()) {
  void* const memory =
      mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kPage, PROT_NONE);
  memory_ = static_cast<std::byte*>(memory);
#if defined(__x86_64__)
  // As if `body` had been called, by nobody, and had been interrupted at once: six registers, where to go on, and a
  // return address that leaves the stack aligned as a call does.
  auto** top = reinterpret_cast<void**>(memory_ + kPage + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(body);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  inside_ = top;
#else
  auto* const inside = new ucontext_t;
  getcontext(inside);
  inside->uc_stack.ss_sp = memory_ + kPage;
  inside->uc_stack.ss_size = kStack;
  makecontext(inside, body, 0);
  inside_ = inside;
  outside_ = new ucontext_t;
#endif
}

Fiber::~Fiber() {
#if !defined(__x86_64__)
  delete static_cast<ucontext_t*>(inside_);
  delete static_cast<ucontext_t*>(outside_);
#endif
  munmap(memory_, kPage + kStack);
}

}  // namespace cuda_on_cpu
