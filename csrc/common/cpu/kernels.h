// The tables of kernels that every family has for each instruction set, and the choice among them.
#pragma once

#include "cg/cpu/kernels.h"
#include "common/cpu/capability.h"
#include "layers/cpu/kernels.h"
#include "lsqr/cpu/kernels.h"
#include "minres/cpu/kernels.h"
#include "network/cpu/kernels.h"
#include "prox/cpu/kernels.h"

namespace imaml_ext {

// The tables of the instruction set chosen by cpu_capability().
template <typename T>
const CgKernels<T>& cg_kernels();
template <typename T>
const LsqrKernels<T>& lsqr_kernels();
template <typename T>
const MinresKernels<T>& minres_kernels();
template <typename T>
const ProxKernels<T>& prox_kernels();
template <typename T>
const NetworkKernels<T>& network_kernels();
template <typename T>
const LayerKernels<T>& layer_kernels();

// Each kernels_*.cpp defines the table of every family, such as cg_table<T>(), in the namespace of its instruction set.
#define IMAML_INSTANTIATE_TABLES                               \
  template const CgKernels<float>& cg_table();                 \
  template const CgKernels<double>& cg_table();                \
  template const CgKernels<c10::BFloat16>& cg_table();         \
  template const CgKernels<c10::Half>& cg_table();             \
  template const LsqrKernels<float>& lsqr_table();             \
  template const LsqrKernels<double>& lsqr_table();            \
  template const LsqrKernels<c10::BFloat16>& lsqr_table();     \
  template const LsqrKernels<c10::Half>& lsqr_table();         \
  template const MinresKernels<float>& minres_table();         \
  template const MinresKernels<double>& minres_table();        \
  template const MinresKernels<c10::BFloat16>& minres_table(); \
  template const MinresKernels<c10::Half>& minres_table();     \
  template const ProxKernels<float>& prox_table();             \
  template const ProxKernels<double>& prox_table();            \
  template const ProxKernels<c10::BFloat16>& prox_table();     \
  template const ProxKernels<c10::Half>& prox_table();         \
  template const NetworkKernels<float>& network_table();       \
  template const NetworkKernels<double>& network_table();      \
  template const LayerKernels<float>& layer_table();           \
  template const LayerKernels<double>& layer_table();

// A row is worked on in pieces of this many elements, whoever works on them: sums depend on nothing else.
constexpr int64_t kPiece = 4096;
inline int64_t pieces_of(int64_t cols) { return (cols + kPiece - 1) / kPiece; }

}  // namespace imaml_ext
