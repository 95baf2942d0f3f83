// All CPU kernels for one instruction set. Included by each kernels_*.cpp after its headers and its target, with
// IMAML_TARGET the namespace and IMAML_REGISTER_BYTES the width of a register; not a header.
namespace imaml_ext::IMAML_TARGET {
namespace {
#include "lanes.inl"
#define IMAML_RULE IMAML_INLINE
#include "../prox_rules.inl"
#include "cg_kernels.inl"
#include "network_kernels.inl"
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
template <typename T>
const NetworkKernels<T>& network_table() {
  return NetworkPasses<T>::kTable;
}
IMAML_INSTANTIATE_TABLES
}  // namespace imaml_ext::IMAML_TARGET
