// Copies from global to shared memory that go on while the thread does (cp.async). Each is performed at the wait that
// covers it and not before; until then its destination holds NaN, so that reading too early shows.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros = 0, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::copy_later({to, from, size, zeros}, {file, line});
}
inline void __pipeline_commit() { cuda_on_cpu::commit_copies(); }
inline void __pipeline_wait_prior(size_t groups) { cuda_on_cpu::wait_for_copies(groups); }
