#include "common/next_round.h"

#include "common/cuda/launch.cuh"

namespace imaml_ext {
namespace {

constexpr int kThreads = 1024;

// One block: 100,000 rows are 400 KB of statuses, a few microseconds.
__global__ void __launch_bounds__(kThreads) next_round_kernel(NextRound a) {
  wait_for_launch_ahead();
  bool at_work = false;
#pragma unroll 8
  for (int64_t row = threadIdx.x; row < a.rows; row += kThreads) at_work = at_work || a.status[row] >= a.at_work;
  const bool any = __syncthreads_or(at_work) != 0;
  if (threadIdx.x == 0) {
    *a.left -= 1;
    *a.again = any && *a.left >= 0;
  }
}

}  // namespace

void next_round(OnCuda device, const NextRound& a) {
  launch<next_round_kernel>(device.stream, {dim3(1), dim3(kThreads)}, a);
}

}  // namespace imaml_ext
