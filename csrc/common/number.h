// The types of numbers. Of libtorch these two headers alone: what a device's code includes compiles in seconds.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

namespace imaml_ext {

// What arithmetic on numbers of type T is done in: float for bfloat16, float16 and float32, double for float64.
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace imaml_ext

// instantiate(Device, T) for every type T that rows can have.
#define IMAML_FOR_ROW_TYPES(instantiate, Device)                                            \
  instantiate(Device, float) instantiate(Device, double) instantiate(Device, c10::BFloat16) \
      instantiate(Device, c10::Half)
