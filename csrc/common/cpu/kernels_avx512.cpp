// The CPU kernels for AVX-512. Every header comes first: nothing inline may be compiled for more than the baseline.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/cpu/kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own conversions begin with a register left undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,f16c,prefer-vector-width=512")
#endif

#define IMAML_REGISTER_BYTES 64
#define IMAML_TARGET avx512
#include "common/cpu/kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
