#include "common/cpu/kernels.h"

namespace imaml_ext {

#define IMAML_DECLARE_TABLES(target)        \
  namespace target {                        \
  template <typename T>                     \
  const CgKernels<T>& cg_table();           \
  template <typename T>                     \
  const LsqrKernels<T>& lsqr_table();       \
  template <typename T>                     \
  const MinresKernels<T>& minres_table();   \
  template <typename T>                     \
  const ProxKernels<T>& prox_table();       \
  template <typename T>                     \
  const NetworkKernels<T>& network_table(); \
  template <typename T>                     \
  const LayerKernels<T>& layer_table();     \
  }
IMAML_DECLARE_TABLES(baseline)
#if defined(__x86_64__)
IMAML_DECLARE_TABLES(avx2)
IMAML_DECLARE_TABLES(avx512)
#define IMAML_CHOOSE_TABLE(table) \
  switch (cpu_capability()) {     \
    case CpuCapability::kAvx512:  \
      return avx512::table<T>();  \
    case CpuCapability::kAvx2:    \
      return avx2::table<T>();    \
    case CpuCapability::kDefault: \
      break;                      \
  }                               \
  return baseline::table<T>();
#else
#define IMAML_CHOOSE_TABLE(table) return baseline::table<T>();
#endif

template <typename T>
const CgKernels<T>& cg_kernels() {
  IMAML_CHOOSE_TABLE(cg_table)
}

template <typename T>
const LsqrKernels<T>& lsqr_kernels() {
  IMAML_CHOOSE_TABLE(lsqr_table)
}

template <typename T>
const MinresKernels<T>& minres_kernels() {
  IMAML_CHOOSE_TABLE(minres_table)
}

template <typename T>
const ProxKernels<T>& prox_kernels() {
  IMAML_CHOOSE_TABLE(prox_table)
}

template <typename T>
const NetworkKernels<T>& network_kernels() {
  IMAML_CHOOSE_TABLE(network_table)
}

template <typename T>
const LayerKernels<T>& layer_kernels() {
  IMAML_CHOOSE_TABLE(layer_table)
}

template const CgKernels<float>& cg_kernels();
template const CgKernels<double>& cg_kernels();
template const CgKernels<c10::BFloat16>& cg_kernels();
template const CgKernels<c10::Half>& cg_kernels();
template const LsqrKernels<float>& lsqr_kernels();
template const LsqrKernels<double>& lsqr_kernels();
template const LsqrKernels<c10::BFloat16>& lsqr_kernels();
template const LsqrKernels<c10::Half>& lsqr_kernels();
template const MinresKernels<float>& minres_kernels();
template const MinresKernels<double>& minres_kernels();
template const MinresKernels<c10::BFloat16>& minres_kernels();
template const MinresKernels<c10::Half>& minres_kernels();
template const ProxKernels<float>& prox_kernels();
template const ProxKernels<double>& prox_kernels();
template const ProxKernels<c10::BFloat16>& prox_kernels();
template const ProxKernels<c10::Half>& prox_kernels();
template const NetworkKernels<float>& network_kernels();
template const NetworkKernels<double>& network_kernels();
template const LayerKernels<float>& layer_kernels();
template const LayerKernels<double>& layer_kernels();

}  // namespace imaml_ext
