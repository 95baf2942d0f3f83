// How many launches there were, and of what shapes.
#pragma once

#include <cstddef>

#include "machine.h"

namespace cuda_on_cpu {

// Where the environment variable CUDA_ON_CPU_REPORT names a file, a line per kernel and shape is appended to it when
// the process ends, the number of launches first.
void report(const Launch& launch, size_t static_shared, int blocks_per_multiprocessor);

}  // namespace cuda_on_cpu

// The launches since the last call. Python finds it in the extension module, by ctypes.
extern "C" __attribute__((visibility("default"))) uint64_t cuda_on_cpu_launches();
