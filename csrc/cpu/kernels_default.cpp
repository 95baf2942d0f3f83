// The CPU kernels for the baseline instruction set. Every header comes first: nothing inline may be compiled for more
// than the baseline.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#define IMAML_REGISTER_BYTES 16
namespace imaml_ext::baseline {
namespace {
#include "lanes.inl"
#define IMAML_RULE IMAML_INLINE
#include "../prox_rules.inl"
#include "cg_kernels.inl"
#include "prox_kernels.inl"
}  // namespace

template <typename T>
const CgKernels<T>& cg_table() {
  return Passes<T>::kTable;
}
template <typename T>
const ProxKernels<T>& prox_table() {
  return ProxPasses<T>::kTable;
}
IMAML_INSTANTIATE_TABLES
}  // namespace imaml_ext::baseline
