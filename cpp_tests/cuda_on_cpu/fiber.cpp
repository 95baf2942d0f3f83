#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

// swapcontext asks the kernel for the signal mask at every switch, hundreds of nanoseconds of which a few do; it is
// left to the processors that nothing better is written for here.
#if defined(__x86_64__)
#define CUDA_ON_CPU_X86_64 1
#else
#define CUDA_ON_CPU_X86_64 0
#include <ucontext.h>
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kPage = 64 * 1024;  // a multiple of every page size in use
constexpr size_t kStack = 4 * kPage;

}  // namespace

#if CUDA_ON_CPU_X86_64

// Goes on by a jump: a processor foresees no return that does not match a call.
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
  popq %rcx
  jmp *%rcx
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
.popsection
)");

#else

extern "C" void cuda_on_cpu_switch(Context* from, Context to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

#endif

Fiber::Fiber(void (*body)()) {
  void* const memory =
      mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kPage, PROT_NONE);
  memory_ = static_cast<std::byte*>(memory);
#if CUDA_ON_CPU_X86_64
  // Not at the same place of every page: hundreds of stacks would share a few lines of the cache.
  static size_t number = 0;
  const size_t shift = number++ % 128 * 640;
  // As if `body` had been called, by nobody, and had been interrupted at once: six registers, where to go on, and a
  // return address that leaves the stack aligned as a call does.
  auto** top = reinterpret_cast<void**>(memory_ + kPage + kStack - shift);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(body);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
#else
  // Where it begins is kept at the far end of the stack.
  auto* const start = new (memory_ + kPage) ucontext_t;
  getcontext(start);
  start->uc_stack.ss_sp = memory_ + kPage + sizeof(ucontext_t);
  start->uc_stack.ss_size = kStack - sizeof(ucontext_t);
  makecontext(start, body, 0);
  context = start;
#endif
}

Fiber::~Fiber() { munmap(memory_, kPage + kStack); }

}  // namespace cuda_on_cpu
