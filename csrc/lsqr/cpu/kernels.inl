// The passes of a least-squares solve, each under its equation. Included by common/cpu/kernels.inl inside a namespace
// of the instruction set.

template <typename T>
struct LsqrPasses {
  using A = LsqrArguments<T>;
  using C = typename A::C;

  // ‖y‖²
  IMAML_PASS double rhs(const A& a, int64_t row, int64_t first, int64_t last, double scale) {
    const T* const y_row = a.y + row * a.cols;
    Sum yy;
    sweep(first, last, [&](int64_t i, int n) {
      const auto y = scaled(load(y_row + i, n), scale);
      yy.add(y * y);
    });
    return yy.total();
  }

  // r̂ = y / ρ
  IMAML_PASS void normalise(const A& a, int64_t row, int64_t first, int64_t last, C inverse_unit) {
    const int64_t at = row * a.cols;
    const auto inverse = broadcast(inverse_unit);
    sweep(first, last, [&](int64_t i, int n) { store(a.r + at + i, load(a.y + at + i, n) * inverse, n); });
  }

  // ‖q‖²   or   ‖y − q‖²
  IMAML_PASS double product(const A& a, int64_t row, int64_t first, int64_t last, bool from_solution, double scale) {
    const int64_t at = row * a.cols;
    Sum squares;
    sweep(first, last, [&](int64_t i, int n) {
      const auto q = load(a.q + at + i, n);
      const auto v = scaled(from_solution ? load(a.y + at + i, n) - q : q, scale);
      squares.add(v * v);
    });
    return squares.total();
  }

  // r̂ ← keep r̂ − step q   or   r̂ ← step (y − q);   ‖r̂‖²
  IMAML_PASS double residual(const A& a, int64_t row, int64_t first, int64_t last, bool from_solution, C keep, C step) {
    const int64_t at = row * a.cols;
    const auto kept = broadcast(keep);
    const auto stepped = broadcast(step);
    Sum rr;
    sweep(first, last, [&](int64_t i, int n) {
      const auto q = load(a.q + at + i, n);
      const auto r = rounded<T>(from_solution ? stepped * (load(a.y + at + i, n) - q)
                                              : kept * load(a.r + at + i, n) - stepped * q);
      store(a.r + at + i, r, n);
      const auto wide = widen(r);
      rr.add(wide * wide);
    });
    return rr.total();
  }

  // x with its step, as it will be stored
  static IMAML_INLINE Lanes<C> stepped(const A& a, int64_t at, int n, const LsqrUpdate<C>& update,
                                       const Lanes<C>& step) {
    const auto x = load(a.x + at, n);
    return update.take_step ? rounded<T>(x + step * load(a.p + at, n)) : x;
  }

  // ŝ = Mᵀr̂ − S x / ρ;   ‖ŝ‖², ‖Mᵀr̂‖², ‖x‖², xᵀS x
  IMAML_PASS GradientSums gradient(const A& a, int64_t row, int64_t first, int64_t last, const LsqrUpdate<C>& update,
                                   bool with_solution, double scale, double x_scale) {
    const int64_t at = row * a.cols;
    const auto step = broadcast(update.step);
    const auto inverse = broadcast(update.inverse_unit);
    Sum ss, tt, xx, xSx;
    if (!with_solution) {
      sweep(first, last, [&](int64_t i, int n) {
        const auto t = scaled(load(a.t + at + i, n), scale);
        tt.add(t * t);
      });
      const double squares = tt.total();
      return {squares, squares, 0.0, 0.0};
    }
    const CoefficientRow<C> shift(a.shift, row);
    sweep(first, last, [&](int64_t i, int n) {
      const auto t = load(a.t + at + i, n);
      const auto x = stepped(a, at + i, n, update, step);
      const auto damping = shift.at(i, n);
      const auto wide_t = scaled(t, scale);
      const auto s = scaled(t - damping * (inverse * x), scale);
      const auto wide_x = scaled(x, x_scale);
      tt.add(wide_t * wide_t);
      ss.add(s * s);
      xx.add(wide_x * wide_x);
      xSx.add(wide_x * wide_x * widen(damping));
    });
    return {ss.total(), tt.total(), xx.total(), xSx.total()};
  }

  // x ← x + step p̂,   then   p̂ ← gradient ŝ + keep p̂   or   p̂ ← x;   ‖p̂‖², p̂ᵀS p̂
  IMAML_PASS DirectionSums update(const A& a, int64_t row, int64_t first, int64_t last, const LsqrUpdate<C>& update) {
    const int64_t at = row * a.cols;
    const auto step = broadcast(update.step);
    const auto inverse = broadcast(update.inverse_unit);
    const auto of_gradient = broadcast(update.gradient);
    const auto of_last = broadcast(update.keep);
    const bool afresh = update.keep == C(0);
    const bool needs_solution = update.take_step || update.to_solution || a.damped();
    const CoefficientRow<C> shift(a.shift, row);
    Sum pp, pSp;
    sweep(first, last, [&](int64_t i, int n) {
      Lanes<C> x = broadcast(C(0));
      if (needs_solution) x = stepped(a, at + i, n, update, step);
      if (update.take_step) store(a.x + at + i, x, n);
      if (update.to_solution) store(a.p + at + i, x, n);
      if (!update.to_direction) return;
      auto next = load(a.t + at + i, n);
      if (a.damped()) next = next - shift.at(i, n) * (inverse * x);
      next = of_gradient * next;
      if (!afresh) next = next + of_last * load(a.p + at + i, n);
      const auto p = rounded<T>(next);
      store(a.p + at + i, p, n);
      const auto wide = widen(p);
      pp.add(wide * wide);
      if (a.damped()) pSp.add(wide * wide * widen(shift.at(i, n)));  // float32 has too few exponents for S p̂
    });
    return {pp.total(), pSp.total()};
  }

  static constexpr LsqrKernels<T> kTable = {rhs, normalise, product, residual, gradient, update};
};
