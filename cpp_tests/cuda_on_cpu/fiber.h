// Threads of execution of which one runs at a time, until it hands control to another.
#pragma once

#include <cstddef>

namespace cuda_on_cpu {

// A place to go on from: a stack, and on top of it what a function must preserve.
using Context = void*;

// Leaves the present context at *from, and goes on where `to` left off.
extern "C" __attribute__((visibility("hidden"))) void cuda_on_cpu_switch(Context* from, Context to);

class Fiber {
 public:
  // `body` must not return.
  explicit Fiber(void (*body)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  Context context;  // while it does not run

 private:
  std::byte* memory_;  // a guard page and the stack
};

}  // namespace cuda_on_cpu
