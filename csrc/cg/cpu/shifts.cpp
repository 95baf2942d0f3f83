// Shifted systems that follow a step of the rows, on the CPU.
#include <ATen/Parallel.h>

#include <algorithm>

#include "cg/arguments.h"
#include "common/cpu/kernels.h"

namespace imaml_ext {

// A piece of r serves all shifts of its row while it is in the cache.
template <typename T>
void cg_shifts_step(OnCpu, const CgShiftsArguments<T>& a) {
  const auto& kernels = cg_kernels<T>();
  for (int64_t row = 0; row < a.rows; ++row) {
    for (int64_t shift = 0; shift < a.shifts; ++shift) {
      const int64_t system = row * a.shifts + shift;
      shift_step(a.state[row], a.shift_state[system], a.sigma[system]);
    }
  }
  const int64_t pieces = pieces_of(a.cols);
  const int64_t grain = std::max<int64_t>(1, 2 * kPiece / std::max<int64_t>(a.shifts * std::min(a.cols, kPiece), 1));
  at::parallel_for(0, a.rows * pieces, grain, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = piece % pieces * kPiece;
      const int64_t end = std::min(begin + kPiece, a.cols);
      for (int64_t shift = 0; shift < a.shifts; ++shift) kernels.follow(a, piece / pieces, shift, begin, end);
    }
  });
}

IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_CG_SHIFTS, OnCpu)

}  // namespace imaml_ext
