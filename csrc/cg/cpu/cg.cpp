// The conjugate-gradient ops on the CPU: who works on which piece of which row, and what a row decides between passes.
#include "cg/arguments.h"

#include <ATen/Parallel.h>

#include <vector>

#include "common/cpu/kernels.h"

namespace imaml_ext {
namespace {

enum class Sweep { kForward, kBackward };

// Runs pass(begin, end) over a row's pieces and returns what each gave, in the order of the pieces. A pass that sweeps
// against the one before it begins with what that one has left in the cache.
template <typename Result, typename Pass>
std::vector<Result> over_pieces(int64_t cols, bool split_row, const Pass& pass, Sweep sweep = Sweep::kForward) {
  const int64_t pieces = pieces_of(cols);
  std::vector<Result> results(pieces);
  const auto work = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t k = sweep == Sweep::kForward ? i : first + last - 1 - i;
      results[k] = pass(k * kPiece, std::min((k + 1) * kPiece, cols));
    }
  };
  if (split_row) {
    at::parallel_for(0, pieces, 1, work);
  } else {
    work(0, pieces);
  }
  return results;
}

// Many rows: a thread takes whole rows, which stay in its cache from pass to pass; the last first, because a callback
// that has gone through them in order has left the last in the cache, and begins with the first again. Few rows:
// threads share each row.
template <typename RowWork>
void over_rows(int64_t rows, int64_t cols, const RowWork& work) {
  const int64_t threads = at::get_num_threads();
  if (rows == 0) return;
  if (rows >= threads || pieces_of(cols) < 2) {
    const int64_t grain = std::max<int64_t>(1, 2 * kPiece / std::max<int64_t>(cols, 1));
    at::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
      for (int64_t row = last; row-- > first;) work(row, /*split_row=*/false);
    });
  } else {
    for (int64_t row = 0; row < rows; ++row) work(row, /*split_row=*/true);
  }
}

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
  over_pieces<char>(a.cols, split_row, [&](int64_t begin, int64_t end) {
    kernels.update(a, row, begin, end, take_step, static_cast<C>(alpha), to, static_cast<C>(beta));
    return 0;
  });
}

template <typename T>
double dot_rz(const CgArguments<T>& a, const CgKernels<T>& kernels, int64_t row, bool split_row) {
  double rz = 0.0;
  for (const double piece : over_pieces<double>(
           a.cols, split_row, [&](int64_t begin, int64_t end) { return kernels.dot_rz(a, row, begin, end); })) {
    rz += piece;
  }
  return rz;
}

// r = b − A x0,  z = M r,  p = z;   without x, r and p the sums alone
template <typename T>
void begin_row(const CgArguments<T>& a, const CgKernels<T>& kernels, int64_t row, bool split_row) {
  BeginSums sums;
  for (const BeginSums& s : over_pieces<BeginSums>(
           a.cols, split_row, [&](int64_t begin, int64_t end) { return kernels.begin(a, row, begin, end); })) {
    sums.bb += s.bb;
    sums.rr += s.rr;
    sums.xx += s.xx;
  }
  bool clear_solution = false;
  a.iterations[row] = 0;
  a.status[row] = row_begin(a.state[row], sums.bb, sums.rr, sums.xx, a.rtol[row * a.rtol_stride],
                            a.atol[row * a.atol_stride], a.unit_roundoff(), clear_solution);
  if (a.x == nullptr) {
    row_direction(a.state[row], a.status[row], sums.rr, a.largest());
    return;
  }
  if (clear_solution || a.hp == nullptr) std::fill_n(a.x + row * a.cols, a.cols, T(0));
  if (a.update_direction && row_is_active(a.status[row])) {
    const double rz = a.inverse_diagonal.data != nullptr ? dot_rz(a, kernels, row, split_row) : sums.rr;
    next_direction(a, kernels, row, split_row, rz, /*take_step=*/false, 0.0);
  }
  // Even a row that is over has a direction, for the operator to be given something finite.
  if (!a.update_direction || !row_is_active(a.status[row])) std::fill_n(a.p + row * a.cols, a.cols, T(0));
}

template <typename T>
void step_row(const CgArguments<T>& a, const CgKernels<T>& kernels, int64_t row, bool split_row) {
  using C = typename CgArguments<T>::C;
  RowState& state = a.state[row];
  int32_t& status = a.status[row];
  Curvature curvature{0.0, 0.0, 0.0};
  ResidualSums sums;
  double alpha = 0.0;
  bool take_scaled_rhs = false;
  bool take_step = false;

  if (row_is_active(status)) {
    // A p = H p + shift p,  pᵀAp
    for (const Curvature& c : over_pieces<Curvature>(
             a.cols, split_row, [&](int64_t begin, int64_t end) { return kernels.curvature(a, row, begin, end); })) {
      curvature.pAp += c.pAp;
      curvature.ApAp += c.ApAp;
      curvature.pp += c.pp;
    }

    // α = rᵀz / pᵀAp
    alpha = row_step_length(state, status, curvature, a.unit_roundoff(), a.largest(), take_scaled_rhs);
    if (take_scaled_rhs) {
      kernels.scaled_rhs(a, row, 0, a.cols);
      row_scaled_rhs(state, curvature, a.shift.col_stride == 0,
                     static_cast<double>(a.shift.data[row * a.shift.row_stride]));
    }
  }

  if (row_is_active(status) && row_may_overflow(state, alpha, curvature, a.largest())) {
    const auto finite = over_pieces<char>(a.cols, split_row, [&](int64_t begin, int64_t end) {
      return kernels.step_is_finite(a, row, begin, end, static_cast<C>(alpha));
    });
    if (std::find(finite.begin(), finite.end(), char(0)) != finite.end()) status = kNonFinite;
  }

  if (row_is_active(status)) {
    // r ← r − α A p,  rᵀr, rᵀ M r
    const auto from = status == kVerifying ? ResidualFrom::kSolution : ResidualFrom::kRecurrence;
    for (const ResidualSums& s : over_pieces<ResidualSums>(
             a.cols, split_row,
             [&](int64_t begin, int64_t end) {
               return kernels.residual(a, row, begin, end, from, static_cast<C>(alpha));
             },
             Sweep::kBackward)) {
      sums.rr += s.rr;
      sums.rz += s.rz;
    }
    take_step = row_residual(state, status, a.iterations[row], alpha, curvature, sums.rr, a.unit_roundoff());
  }

  // x ← x + α p,  p ← z + β p
  if (a.first && !take_step && !take_scaled_rhs) std::fill_n(a.x + row * a.cols, a.cols, T(0));
  next_direction(a, kernels, row, split_row, sums.rz, take_step, alpha);
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
  over_rows(a.rows, a.cols, [&](int64_t row, bool split_row) { begin_row(a, cg_kernels<T>(), row, split_row); });
}
template <typename T>
void cg_direction(OnCpu, const CgArguments<T>& a) {
  over_rows(a.rows, a.cols, [&](int64_t row, bool split_row) { direction_row(a, cg_kernels<T>(), row, split_row); });
}
template <typename T>
void cg_step(OnCpu, const CgArguments<T>& a) {
  over_rows(a.rows, a.cols, [&](int64_t row, bool split_row) { step_row(a, cg_kernels<T>(), row, split_row); });
}

IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_CG, OnCpu)

}  // namespace imaml_ext
