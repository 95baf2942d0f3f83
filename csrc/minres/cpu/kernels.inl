// The passes of MINRES, each under its equation. Included by common/cpu/kernels.inl inside a namespace of the
// instruction set.

template <typename T>
struct MinresPasses {
  using A = MinresArguments<T>;
  using C = typename A::C;

  // b − (H p + shift p), or b itself where there is no product
  template <typename Shift>
  static IMAML_INLINE Lanes<C> residual_of(const A& a, int64_t at, const Shift& shift, int64_t i, int n) {
    const auto b = load(a.b + at + i, n);
    if (a.hp == nullptr) return b;
    return rounded<T>(b - (load(a.hp + at + i, n) + shift.at(i, n) * load(a.v + at + i, n)));
  }

  // u = A v − α v − β v₋
  template <typename Shift>
  static IMAML_INLINE Lanes<C> lanczos(const A& a, int64_t at, const Shift& shift, const MinresStep& step,
                                       const Lanes<C>& v, int64_t i, int n) {
    const auto Av = load(a.hp + at + i, n) + shift.at(i, n) * v;
    const auto u = Av - broadcast(static_cast<C>(step.alpha)) * v;
    if (step.beta == 0.0) return u;
    return u - broadcast(static_cast<C>(step.beta)) * load(a.v_next + at + i, n);
  }

  // vᵀ A v, ‖A v‖²
  IMAML_PASS ProductSums product(const A& a, int64_t row, int64_t first, int64_t last) {
    const int64_t at = row * a.cols;
    const double scale = 1.0 / a.state[row].operator_unit;
    Sum vAv, AvAv;
    with_row(a.shift, row, [&](const auto& shift) {
      sweep(first, last, [&](int64_t i, int n) {
        const auto v = load(a.v + at + i, n);
        const auto Av = scaled(load(a.hp + at + i, n) + shift.at(i, n) * v, scale);
        vAv.add(widen(v) * Av);
        AvAv.add(Av * Av);
      });
    });
    return {vAv.total(), AvAv.total()};
  }

  // ‖b − A x‖², where v is x
  IMAML_PASS double residual(const A& a, int64_t row, int64_t first, int64_t last) {
    const int64_t at = row * a.cols;
    const double scale = 1.0 / a.state[row].unit;
    Sum rr;
    with_row(a.shift, row, [&](const auto& shift) {
      sweep(first, last, [&](int64_t i, int n) {
        const auto r = scaled(residual_of(a, at, shift, i, n), scale);
        rr.add(r * r);
      });
    });
    return rr.total();
  }

  // ‖u‖²;   q = v − turn q₁ − turn_before q₂;   ‖q‖², xᵀ q, ‖x‖²
  IMAML_PASS TurnSums turn(const A& a, int64_t row, int64_t first, int64_t last, const MinresStep& step) {
    const int64_t at = row * a.cols;
    const double scale = 1.0 / a.state[row].operator_unit;
    const double x_scale = 1.0 / minres_solution_unit(a.state[row]);
    const auto turn = broadcast(static_cast<C>(step.turn));
    const auto turn_before = broadcast(static_cast<C>(step.turn_before));
    Sum uu, qq, xq, xx;
    with_row(a.shift, row, [&](const auto& shift) {
      sweep(first, last, [&](int64_t i, int n) {
        const auto v = load(a.v + at + i, n);
        const auto u = scaled(lanczos(a, at, shift, step, v, i, n), scale);
        uu.add(u * u);
        auto q = v;
        if (step.turn != 0.0) q = q - turn * load(a.q + at + i, n);
        if (step.turn_before != 0.0) q = q - turn_before * load(a.q_next + at + i, n);
        q = rounded<T>(q);
        store(a.q_next + at + i, q, n);
        const auto x = scaled(load(a.x + at + i, n), x_scale);
        const auto wide_q = widen(q);
        qq.add(wide_q * wide_q);
        xq.add(x * wide_q);
        xx.add(x * x);
      });
    });
    return {uu.total(), qq.total(), xq.total(), xx.total()};
  }

  // Whether every x + τ q is finite in T. Only looked at where its norm does not settle it.
  static bool step_is_finite(const A& a, int64_t row, int64_t first, int64_t last, const MinresStep& step) {
    const int64_t at = row * a.cols;
    const auto tau = static_cast<C>(step.tau);
    bool finite = true;
    for (int64_t i = at + first; i < at + last; ++i) {
      const T x = static_cast<T>(static_cast<C>(a.x[i]) + tau * static_cast<C>(a.q_next[i]));
      finite = finite && std::isfinite(static_cast<double>(x));
    }
    return finite;
  }

  // x ← x + τ q,   then   the vector that the operator is given next
  IMAML_PASS void update(const A& a, int64_t row, int64_t first, int64_t last, const MinresStep& step,
                         NextVector next) {
    const int64_t at = row * a.cols;
    const auto tau = broadcast(static_cast<C>(step.tau));
    const auto scale = broadcast(static_cast<C>(step.scale));
    const auto divisor = broadcast(static_cast<C>(step.divisor));
    with_row(a.shift, row, [&](const auto& shift) {
      sweep(first, last, [&](int64_t i, int n) {
        if (step.take_step) {
          store(a.x + at + i, load(a.x + at + i, n) + tau * load(a.q_next + at + i, n), n);
        }
        Lanes<C> vector;
        switch (next) {
          case NextVector::kNone:
            return;
          case NextVector::kLanczos:
            vector = lanczos(a, at, shift, step, load(a.v + at + i, n), i, n) * scale / divisor;
            break;
          case NextVector::kResidual:
            vector = residual_of(a, at, shift, i, n) * scale / divisor;
            break;
          case NextVector::kSolution:
            vector = load(a.x + at + i, n);
            break;
          case NextVector::kZero:
            vector = broadcast(C(0));
            break;
        }
        store(a.v_next + at + i, vector, n);
      });
    });
  }

  static constexpr MinresKernels<T> kTable = {residual_at_start<A>, product, residual, turn, step_is_finite, update};
};
