// The conjugate-gradient ops on the CPU: who works on which piece of which row, and what a row decides between passes.
#include "cg/arguments.h"

#include "common/cpu/kernels.h"
#include "common/cpu/rows.h"

namespace imaml_ext {
namespace {

// z = M r,  β,  p ← z + β p   (or p ← x for a row that verifies)
template <typename T>
void next_direction(const CgArguments<T>& a, const CgKernels<T>& kernels, int64_t row, bool split_row, double rz,
                    bool take_step, double alpha) {
  using C = typename CgArguments<T>::C;
  int32_t& status = a.status[row];
  double beta = 0.0;
  UpdateTo to = UpdateTo::kNothing;
  if (a.update_direction) {
    beta = row_direction(a.state[row], status, rz, a.largest());
    if (status == kIterating) to = UpdateTo::kDirection;
    if (status == kVerifying) to = UpdateTo::kSolution;
  }
  // Even a row that is over has a direction, for the operator to be given something finite.
  if (a.first && !a.last && to == UpdateTo::kNothing) to = UpdateTo::kZero;
  if (!take_step && to == UpdateTo::kNothing) return;
  each_piece(a.cols, split_row, [&](int64_t begin, int64_t end) {
    kernels.update(a, row, begin, end, take_step, static_cast<C>(alpha), to, static_cast<C>(beta));
  });
}

template <typename T>
double dot_rz(const CgArguments<T>& a, const CgKernels<T>& kernels, int64_t row, bool split_row) {
  return sum_of_pieces(a.cols, split_row,
                       [&](int64_t begin, int64_t end) { return kernels.dot_rz(a, row, begin, end); });
}

// best ← x   or   x ← best
template <typename T>
void keep_or_restore(const CgArguments<T>& a, int64_t row, Best what) {
  T* const x = a.x + row * a.cols;
  T* const best = a.best + row * a.cols;
  if (what == Best::kRestore) std::copy_n(best, a.cols, x);
  if (what == Best::kKeep && a.first) std::fill_n(best, a.cols, T(0));
  if (what == Best::kKeep && !a.first) std::copy_n(x, a.cols, best);
}

// r = b − A x0,  z = M r,  p = z;   without x, r and p the sums alone
template <typename T>
void begin_row(const CgArguments<T>& a, const CgKernels<T>& kernels, int64_t row, bool split_row) {
  double b_scale = 1.0, r_scale = 1.0;
  const BeginSums sums = start_sums<T>(b_scale, r_scale, [&](double of_b, double of_r) {
    return sum_of_pieces(a.cols, split_row,
                         [&](int64_t begin, int64_t end) { return kernels.begin(a, row, begin, end, of_b, of_r); });
  });
  RowState& state = a.state[row];
  bool clear_solution = false;
  a.iterations[row] = 0;
  a.status[row] = row_begin(state, sums, b_scale, r_scale, a.rtol[row * a.rtol_stride], a.atol[row * a.atol_stride],
                            a.wide(), clear_solution);
  const double rr = row_rescaled(state, r_scale, sums.rr);
  if (a.x == nullptr) {
    row_direction(state, a.status[row], rr, a.largest());
    return;
  }
  if (clear_solution || a.hp == nullptr) std::fill_n(a.x + row * a.cols, a.cols, T(0));
  if (a.update_direction && row_is_active(a.status[row])) {
    const double rz = a.inverse_diagonal.data != nullptr ? dot_rz(a, kernels, row, split_row) : rr;
    next_direction(a, kernels, row, split_row, rz, /*take_step=*/false, 0.0);
  }
  // Even a row that is over has a direction, for the operator to be given something finite.
  if (!a.update_direction || !row_is_active(a.status[row])) std::fill_n(a.p + row * a.cols, a.cols, T(0));
}

// What a step of one row passes on from phase to phase.
struct RowStep {
  Curvature curvature{};
  ResidualSums sums{};
  Best best = Best::kNothing;
  double alpha = 0.0, length = 0.0;
  bool take_scaled_rhs = false, take_step = false;
};

// α = rᵀz / pᵀAp, or what ends the row
template <typename T>
void choose_step(const CgArguments<T>& a, const CgKernels<T>& kernels, int64_t row, bool split_row, RowStep& step) {
  using C = typename CgArguments<T>::C;
  RowState& state = a.state[row];
  int32_t& status = a.status[row];
  step.alpha = row_step_length(state, status, step.curvature, a.unit_roundoff(), a.largest(), step.length,
                               step.take_scaled_rhs, step.best);
  if (step.take_scaled_rhs) {
    kernels.scaled_rhs(a, row, 0, a.cols);
    row_scaled_rhs(state, step.curvature, a.shift.col_stride == 0,
                   static_cast<double>(a.shift.data[row * a.shift.row_stride]));
  }
  if (row_is_active(status) && row_may_overflow(state, step.length, a.largest())) {
    const double infinite = sum_of_pieces(a.cols, split_row, [&](int64_t begin, int64_t end) {
      return kernels.step_is_finite(a, row, begin, end, static_cast<C>(step.alpha)) ? 0.0 : 1.0;
    });
    if (infinite > 0.0) status = kNonFinite;
  }
}

template <typename T>
void step_rows(const CgArguments<T>& a, const CgKernels<T>& kernels, int64_t first, int64_t last, bool split_row) {
  using C = typename CgArguments<T>::C;
  RowStep steps[kTogether];
  const auto each = [&](const auto& phase) {
    for (int64_t row = first; row < last; ++row) phase(row, steps[row - first]);
  };
  const auto each_active = [&](const auto& phase) {
    each([&](int64_t row, RowStep& step) {
      if (row_is_active(a.status[row])) phase(row, step);
    });
  };

  // A p = H p + shift p,  pᵀAp
  each_active([&](int64_t row, RowStep& step) {
    step.curvature = sum_of_pieces(a.cols, split_row,
                                   [&](int64_t begin, int64_t end) { return kernels.curvature(a, row, begin, end); });
  });
  each_active([&](int64_t row, RowStep& step) { choose_step(a, kernels, row, split_row, step); });

  // r ← r − α A p,  rᵀr, rᵀ M r
  each_active([&](int64_t row, RowStep& step) {
    const auto from = a.status[row] == kVerifying ? ResidualFrom::kSolution : ResidualFrom::kRecurrence;
    const auto alpha = static_cast<C>(step.alpha);
    step.sums = sum_of_pieces(
        a.cols, split_row,
        [&](int64_t begin, int64_t end) { return kernels.residual(a, row, begin, end, from, alpha); },
        Sweep::kBackward);
  });
  each_active([&](int64_t row, RowStep& step) {
    step.take_step = row_residual(a.state[row], a.status[row], a.iterations[row], step.length, step.sums.rr,
                                  a.unit_roundoff(), step.best);
  });

  // x ← x + α p,  p ← z + β p
  each([&](int64_t row, const RowStep& step) {
    a.state[row].alpha = step.take_step ? step.alpha : 0.0;
    keep_or_restore(a, row, step.best);
    if (a.first && !step.take_step && !step.take_scaled_rhs) std::fill_n(a.x + row * a.cols, a.cols, T(0));
    next_direction(a, kernels, row, split_row, step.sums.rz, step.take_step, step.alpha);
  });
}

template <typename T>
void direction_row(const CgArguments<T>& a, const CgKernels<T>& kernels, int64_t row, bool split_row) {
  if (!row_is_active(a.status[row])) return;
  const double rz = a.status[row] == kIterating ? dot_rz(a, kernels, row, split_row) : 0.0;
  next_direction(a, kernels, row, split_row, rz, /*take_step=*/false, 0.0);
}

}  // namespace

template <typename T>
void cg_begin(OnCpu, const CgArguments<T>& a) {
  const auto& kernels = cg_kernels<T>();
  over_rows(a.rows, a.cols, [&](int64_t first, int64_t last, bool split_row) {
    for (int64_t row = first; row < last; ++row) begin_row(a, kernels, row, split_row);
  });
}
template <typename T>
void cg_direction(OnCpu, const CgArguments<T>& a) {
  const auto& kernels = cg_kernels<T>();
  over_rows(a.rows, a.cols, [&](int64_t first, int64_t last, bool split_row) {
    for (int64_t row = first; row < last; ++row) direction_row(a, kernels, row, split_row);
  });
}
template <typename T>
void cg_step(OnCpu, const CgArguments<T>& a) {
  const auto& kernels = cg_kernels<T>();
  over_rows(a.rows, a.cols,
            [&](int64_t first, int64_t last, bool split_row) { step_rows(a, kernels, first, last, split_row); });
}

IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_CG, OnCpu)

}  // namespace imaml_ext
