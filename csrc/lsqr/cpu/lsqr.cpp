// The least-squares ops on the CPU: who works on which piece of which row, and what a row decides between passes.
#include "lsqr/arguments.h"

#include <algorithm>

#include "common/cpu/kernels.h"
#include "common/cpu/rows.h"

namespace imaml_ext {
namespace {

template <typename T>
void begin_row(const LsqrArguments<T>& a, const LsqrKernels<T>& kernels, int64_t row, bool split_row) {
  using C = typename LsqrArguments<T>::C;
  const auto squares = [&](double scale) {
    return sum_of_pieces(a.cols, split_row,
                         [&](int64_t begin, int64_t end) { return kernels.rhs(a, row, begin, end, scale); });
  };
  double yy = squares(1.0), scale = 1.0;
  if (a.wide()) scale = row_scale_of_sum(yy);
  if (scale != 1.0) yy = squares(scale);
  LsqrState& state = a.state[row];
  lsqr_begin_row(state, sqrt(yy) / scale, a.rtol[row * a.rtol_stride], a.atol[row * a.atol_stride], a.warm,
                 a.numbers());
  a.status[row] = kBeginning;
  a.iterations[row] = 0;
  // Even a row that is not finite has a residual, for the operator to be given something finite.
  if (!is_finite(state.rhs)) return void(std::fill_n(a.r + row * a.cols, a.cols, T(0)));
  each_piece(a.cols, split_row, [&](int64_t begin, int64_t end) {
    kernels.normalise(a, row, begin, end, static_cast<C>(1.0 / state.unit));
  });
}

// α,   r ← r − α q   or   r ← y − M x
template <typename T>
void residual_row(const LsqrArguments<T>& a, const LsqrKernels<T>& kernels, int64_t row, bool split_row) {
  using C = typename LsqrArguments<T>::C;
  int32_t& status = a.status[row];
  if (!row_is_active(status)) return;
  const bool from_solution = status == kVerifying;
  const auto squares = [&](double scale) {
    return sum_of_pieces(a.cols, split_row, [&](int64_t begin, int64_t end) {
      return kernels.product(a, row, begin, end, from_solution, scale);
    });
  };
  double qq = squares(1.0), scale = 1.0;
  if (a.wide()) scale = row_scale_of_sum(qq);
  if (scale != 1.0) qq = squares(scale);
  const ResidualMove move = lsqr_step_length(a.state[row], status, sqrt(qq) / scale, a.numbers());
  if (!row_is_active(status)) return;
  const double rr = sum_of_pieces(
      a.cols, split_row,
      [&](int64_t begin, int64_t end) {
        return kernels.residual(a, row, begin, end, from_solution, static_cast<C>(move.keep),
                                static_cast<C>(move.step));
      },
      Sweep::kBackward);
  lsqr_residual_known(a.state[row], status, rr);
}

template <typename T>
GradientNorms gradient_norms(const LsqrArguments<T>& a, const LsqrKernels<T>& kernels, int64_t row, bool split_row,
                             const LsqrUpdate<typename LsqrArguments<T>::C>& update, bool with_solution) {
  const auto sums_scaled = [&](double scale, double x_scale) {
    return sum_of_pieces(a.cols, split_row, [&](int64_t begin, int64_t end) {
      return kernels.gradient(a, row, begin, end, update, with_solution, scale, x_scale);
    });
  };
  GradientSums sums = sums_scaled(1.0, 1.0);
  double scale = 1.0, x_scale = 1.0;
  if (a.wide()) {
    scale = row_scale_of_sum(sums.tt);
    if (with_solution) x_scale = row_scale_of_sum(sums.xx);
    if (scale != 1.0 || x_scale != 1.0) sums = sums_scaled(scale, x_scale);
  }
  return {sqrt(sums.ss) / scale, sqrt(sums.tt) / scale, sqrt(sums.xx) / x_scale, sqrt(sums.xSx) / x_scale};
}

// s,   x ← x + α p,   p ← s + β p   or, of a row that verifies next,   p ← x
template <typename T>
void direction_row(const LsqrArguments<T>& a, const LsqrKernels<T>& kernels, int64_t row, bool split_row) {
  using C = typename LsqrArguments<T>::C;
  int32_t& status = a.status[row];
  if (!row_is_active(status)) return;
  LsqrState& state = a.state[row];
  LsqrUpdate<C> update{};
  update.take_step = status == kIterating && state.step > 0.0;
  update.step = static_cast<C>(state.unit * state.step);
  update.inverse_unit = static_cast<C>(1.0 / (state.unit * state.r_scale));
  const bool with_solution = lsqr_asks_for_solution(state, status, a.damped(), a.numbers().largest);
  const GradientNorms norms = gradient_norms(a, kernels, row, split_row, update, with_solution);
  DirectionMove move;
  lsqr_gradient_known(state, status, a.iterations[row], norms, with_solution, move, a.numbers());

  T* const x = a.x + row * a.cols;
  T* const best = a.best + row * a.cols;
  if (move.best == Best::kKeep) std::copy_n(x, a.cols, best);
  if (move.best == Best::kRestore) std::copy_n(best, a.cols, x);
  if (move.clear_solution) std::fill_n(x, a.cols, T(0));
  update.take_step = move.take_step;
  update.to_solution = status == kVerifying;
  update.to_direction = status == kIterating;
  update.gradient = static_cast<C>(move.gradient);
  update.keep = static_cast<C>(move.keep);
  if (!update.take_step && !update.to_solution && !update.to_direction) return;
  const DirectionSums sums = sum_of_pieces(
      a.cols, split_row, [&](int64_t begin, int64_t end) { return kernels.update(a, row, begin, end, update); },
      Sweep::kBackward);
  if (update.to_direction) lsqr_direction_known(state, status, sums.pp, sums.pSp);
}

template <typename T, typename RowWork>
void each_row(const LsqrArguments<T>& a, const RowWork& work) {
  const auto& kernels = lsqr_kernels<T>();
  over_rows(a.rows, a.cols, [&](int64_t first, int64_t last, bool split_row) {
    for (int64_t row = first; row < last; ++row) work(a, kernels, row, split_row);
  });
}

}  // namespace

template <typename T>
void lsqr_begin(OnCpu, const LsqrArguments<T>& a) {
  each_row(a, begin_row<T>);
}
template <typename T>
void lsqr_residual(OnCpu, const LsqrArguments<T>& a) {
  each_row(a, residual_row<T>);
}
template <typename T>
void lsqr_direction(OnCpu, const LsqrArguments<T>& a) {
  each_row(a, direction_row<T>);
}

IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_LSQR, OnCpu)

}  // namespace imaml_ext
