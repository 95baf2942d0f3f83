// A thread of execution that runs until it hands control back, with a stack of its own.
#pragma once

#include <cstddef>

namespace cuda_on_cpu {

class Fiber {
 public:
  // `body` must not return: it runs a piece of work, suspends, and when resumed takes the next piece.
  explicit Fiber(void (*body)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void resume();   // from outside: returns when the fiber suspends
  void suspend();  // from inside: returns when the fiber is resumed

 private:
  std::byte* memory_;  // a guard page and the stack
  void* inside_ = nullptr;
  void* outside_ = nullptr;
};

}  // namespace cuda_on_cpu
