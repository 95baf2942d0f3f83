// The instruction set that the CPU kernels run with, chosen once at run time.
#pragma once

namespace imaml_ext {

enum class CpuCapability { kDefault, kAvx2, kAvx512 };

// The best that this processor and this build have; the environment variable IMAML_EXT_CPU_CAPABILITY
// (default, avx2, avx512) asks for less. Results are the same bits under each.
CpuCapability cpu_capability();
const char* name_of(CpuCapability capability);

}  // namespace imaml_ext
