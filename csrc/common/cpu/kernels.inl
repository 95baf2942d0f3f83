// All CPU kernels for one instruction set. Included by each kernels_*.cpp after its headers and its target, with
// IMAML_TARGET the namespace and IMAML_REGISTER_BYTES the width of a register; not a header.
namespace imaml_ext::IMAML_TARGET {
namespace {
#include "common/cpu/lanes.inl"
#include "common/cpu/start.inl"
#define IMAML_RULE IMAML_INLINE
#include "prox/rules.inl"
// The rules come before what uses them: formatting sorts each of these groups by name.

#include "cg/cpu/kernels.inl"
#include "lsqr/cpu/kernels.inl"
#include "minres/cpu/kernels.inl"
#include "network/cpu/kernels.inl"
#include "prox/cpu/kernels.inl"
// What uses the passes of the network comes after them.

#include "layers/cpu/kernels.inl"
}  // namespace

template <typename T>
const CgKernels<T>& cg_table() {
  return Passes<T>::kTable;
}
template <typename T>
const LsqrKernels<T>& lsqr_table() {
  return LsqrPasses<T>::kTable;
}
template <typename T>
const MinresKernels<T>& minres_table() {
  return MinresPasses<T>::kTable;
}
template <typename T>
const ProxKernels<T>& prox_table() {
  return ProxPasses<T>::kTable;
}
template <typename T>
const NetworkKernels<T>& network_table() {
  return NetworkPasses<T>::kTable;
}
template <typename T>
const LayerKernels<T>& layer_table() {
  return LayerPasses<T>::kTable;
}
IMAML_INSTANTIATE_TABLES
}  // namespace imaml_ext::IMAML_TARGET
