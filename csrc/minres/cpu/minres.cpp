// The MINRES ops on the CPU: what a row decides between passes over its pieces.
#include "common/cpu/kernels.h"
#include "common/cpu/rows.h"
#include "minres/arguments.h"

namespace imaml_ext {
namespace {

// One row of an op, and the pieces of it that threads may share.
template <typename T>
struct Row {
  const MinresArguments<T>& a;
  const MinresKernels<T>& kernels;
  int64_t row;
  bool split;

  template <typename Pass, typename... Arguments>
  auto sum(const Pass& pass, const Arguments&... arguments) const {
    return sum_of_pieces(a.cols, split,
                         [&](int64_t begin, int64_t end) { return pass(a, row, begin, end, arguments...); });
  }
  void update(const MinresStep& step, NextVector next) const {
    if (!step.take_step && next == NextVector::kNone) return;
    each_piece(a.cols, split, [&](int64_t begin, int64_t end) { kernels.update(a, row, begin, end, step, next); });
  }
  T* of(T* vectors) const { return vectors + row * a.cols; }
  void clear(T* vectors) const { std::fill_n(of(vectors), a.cols, T(0)); }
  void copy(T* from, T* to) const { std::copy_n(of(from), a.cols, of(to)); }

  void begin() const;
  void step() const;

 private:
  void measure(MinresStep& step) const;
  void advance(MinresStep& step) const;
};

// r = b − A x0,  v = r / ‖r‖
template <typename T>
void Row<T>::begin() const {
  double b_scale = 1.0, r_scale = 1.0;
  const BeginSums sums =
      start_sums<T>(b_scale, r_scale, [&](double of_b, double of_r) { return sum(kernels.begin, of_b, of_r); });
  MinresStep step;
  a.iterations[row] = 0;
  a.status[row] = minres_start(a.state[row], sums, b_scale, r_scale, a.rtol[row * a.rtol_stride],
                               a.atol[row * a.atol_stride], a.wide(), a.hp != nullptr, step);
  update(step, row_is_active(a.status[row]) ? NextVector::kResidual : NextVector::kZero);
  if (step.clear_solution) clear(a.x);
  if (a.hp != nullptr) copy(a.x, a.best);
}

template <typename T>
void Row<T>::measure(MinresStep& step) const {
  minres_measured(a.state[row], a.status[row], sum(kernels.residual), a.wide(), step);
  if (step.best == Best::kKeep) copy(a.x, a.best);
  if (step.best == Best::kRestore) copy(a.best, a.x);
  if (step.clear_solution) clear(a.x);
}

template <typename T>
void Row<T>::advance(MinresStep& step) const {
  MinresState& state = a.state[row];
  int32_t& status = a.status[row];
  // α = vᵀ A v
  ProductSums product = sum(kernels.product);
  if (a.wide() && minres_rescale(state, product)) product = sum(kernels.product);
  minres_product(state, status, product, step);
  a.record(row, step);
  if (status != kIterating) return;

  // u = A v − α v − β v₋,  q = v − (δ / γ₁) q₁ − (ε / γ₂) q₂
  minres_turn(state, status, sum(kernels.turn, step), a.unit_roundoff(), a.largest(), step);
  if (status != kIterating) return;
  const bool overflows = step.may_overflow && sum_of_pieces(a.cols, split, [&](int64_t begin, int64_t end) {
                                                return kernels.step_is_finite(a, row, begin, end, step) ? 0.0 : 1.0;
                                              }) > 0.0;
  minres_take(state, status, a.iterations[row], overflows, a.unit_roundoff(), a.wide(), step);
}

template <typename T>
void Row<T>::step() const {
  const int32_t& status = a.status[row];
  const bool was_active = row_is_active(status);
  MinresStep step;
  if (minres_measures(status)) {
    measure(step);
  } else if (was_active) {
    advance(step);
  }
  // x ← x + τ q,  v₊
  NextVector next = NextVector::kNone;
  if (!a.last && minres_measures(status)) next = NextVector::kSolution;
  if (!a.last && status == kIterating) next = step.restart ? NextVector::kResidual : NextVector::kLanczos;
  if (!a.last && !row_is_active(status) && (was_active || a.first)) next = NextVector::kZero;
  update(step, next);
}

// Calls work(row) for every row.
template <typename T, typename Work>
void each_row(const MinresArguments<T>& a, const Work& work) {
  const auto& kernels = minres_kernels<T>();
  over_rows(a.rows, a.cols, [&](int64_t first, int64_t last, bool split) {
    for (int64_t row = first; row < last; ++row) work(Row<T>{a, kernels, row, split});
  });
}

}  // namespace

template <typename T>
void minres_begin(OnCpu, const MinresArguments<T>& a) {
  each_row(a, [](const Row<T>& row) { row.begin(); });
}
template <typename T>
void minres_step(OnCpu, const MinresArguments<T>& a) {
  each_row(a, [](const Row<T>& row) { row.step(); });
}

IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_MINRES, OnCpu)

}  // namespace imaml_ext
