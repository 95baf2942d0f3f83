#pragma once

#include <string>

namespace cuda_on_cpu {

// The demangled name of the function at `address`, local ones too; its address where the module has been stripped.
std::string name_of(const void* address);

}  // namespace cuda_on_cpu
