#pragma once

#include <cstddef>
#include <string>

namespace cuda_on_cpu {

struct KernelFacts {
  std::string name;      // as benchmarks/kernel_report.py writes it: without namespaces and parameters
  size_t static_shared;  // bytes of the __shared__ variables that its code refers to
};

// Throws std::logic_error where the module does not tell (-ffunction-sections, -Wl,--emit-relocs).
const KernelFacts& facts_of(const void* kernel);

}  // namespace cuda_on_cpu
