// The proximal ops on the CPU.
#include "prox/arguments.h"

#include <ATen/Parallel.h>

#include <vector>

#include "common/cpu/kernels.h"

namespace imaml_ext {
namespace {

// Runs pass(row, piece, begin, end) for every piece of every row.
template <typename Pass>
void over_pieces(int64_t rows, int64_t cols, const Pass& pass) {
  const int64_t pieces = pieces_of(cols);
  const int64_t grain = cols == 0 ? 1 : std::max<int64_t>(1, 2 * kPiece / std::min(cols, kPiece));
  at::parallel_for(0, rows * pieces, grain, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t row = k / pieces;
      const int64_t begin = (k % pieces) * kPiece;
      pass(row, k % pieces, begin, std::min(begin + kPiece, cols));
    }
  });
}

template <typename T>
auto rule_of(ProxUpdate update) {
  const ProxKernels<T>& kernels = prox_kernels<T>();
  switch (update) {
    case ProxUpdate::kGradient:
      return kernels.gradient;
    case ProxUpdate::kSgd:
      return kernels.sgd;
    case ProxUpdate::kMomentum:
      return kernels.momentum;
    case ProxUpdate::kAdam:
      break;
  }
  return kernels.adam;
}

}  // namespace

template <typename T>
void prox_update(OnCpu, ProxUpdate update, const ProxArguments<T>& a) {
  const auto rule = rule_of<T>(update);
  over_pieces(a.rows, a.cols, [&](int64_t row, int64_t, int64_t begin, int64_t end) { rule(a, row, begin, end); });
}

template <typename T>
void prox_penalty(OnCpu, const ProxArguments<T>& a) {
  const int64_t pieces = pieces_of(a.cols);
  std::vector<double> sums(a.rows * pieces);
  over_pieces(a.rows, a.cols, [&](int64_t row, int64_t piece, int64_t begin, int64_t end) {
    sums[row * pieces + piece] = prox_kernels<T>().penalty(a, row, begin, end);
  });
  for (int64_t row = 0; row < a.rows; ++row) {
    double total = 0.0;
    for (int64_t k = 0; k < pieces; ++k) total += sums[row * pieces + k];
    a.penalty[row] = static_cast<compute_t<T>>(0.5 * total);
  }
}

IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_PROX, OnCpu)

}  // namespace imaml_ext
