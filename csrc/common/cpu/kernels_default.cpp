// The CPU kernels for the baseline instruction set. Every header comes first: nothing inline may be compiled for more
// than the baseline.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/cpu/kernels.h"

#define IMAML_REGISTER_BYTES 16
#define IMAML_TARGET baseline
#include "common/cpu/kernels.inl"
