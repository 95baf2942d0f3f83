// Where an op runs. Its checks and its registration stand once, in the ops.cpp of its family; what each device does
// with plain pointers is an overload on one of these two.
#pragma once

#include <cstdint>
#include <functional>

struct CUstream_st;  // cudaStream_t points to it

namespace imaml_ext {

struct OnCpu {};
struct OnCuda {
  CUstream_st* stream;
};

// Gives an op memory of its device, for as long as the op runs.
using Allocate = std::function<char*(int64_t bytes)>;

}  // namespace imaml_ext
