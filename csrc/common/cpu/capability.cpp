#include "common/cpu/capability.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

namespace imaml_ext {
namespace {

CpuCapability supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512) return CpuCapability::kAvx512;
  if (avx2) return CpuCapability::kAvx2;
#endif
  return CpuCapability::kDefault;
}

CpuCapability choose() {
  const CpuCapability best = supported();
  const char* wish = std::getenv("IMAML_EXT_CPU_CAPABILITY");
  if (wish == nullptr || *wish == '\0') return best;
  for (const auto capability : {CpuCapability::kDefault, CpuCapability::kAvx2, CpuCapability::kAvx512}) {
    if (std::string(wish) != name_of(capability)) continue;
    TORCH_CHECK_VALUE(capability <= best, "IMAML_EXT_CPU_CAPABILITY: this processor has at most ", name_of(best),
                      ", got ", wish);
    return capability;
  }
  TORCH_CHECK_VALUE(false, "IMAML_EXT_CPU_CAPABILITY must be default, avx2 or avx512, got ", wish);
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = choose();
  return capability;
}

const char* name_of(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::kAvx512:
      return "avx512";
    case CpuCapability::kAvx2:
      return "avx2";
    case CpuCapability::kDefault:
      break;
  }
  return "default";
}

}  // namespace imaml_ext
