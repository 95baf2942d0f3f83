// The cluster of a block, as far as the kernels use it.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  static unsigned num_blocks() { return cuda_on_cpu::cluster_blocks(); }
  static unsigned block_rank() { return cuda_on_cpu::cluster_rank(); }
  static void sync(CUDA_ON_CPU_SITE) { cuda_on_cpu::wait_for_cluster({file, line}); }

  template <typename T>
  static T* map_shared_rank(T* variable, unsigned rank) {
    return static_cast<T*>(cuda_on_cpu::map_shared(variable, rank));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
