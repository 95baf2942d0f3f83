// The passes, each under its equation. Included by common/cpu/kernels.inl inside a namespace of the instruction
// set.

template <typename T>
struct Passes {
  using A = CgArguments<T>;
  using C = typename A::C;

  static IMAML_INLINE double unit_scale(const A& a, int64_t row) {
    if constexpr (A::wide()) return 1.0 / a.state[row].unit;
    return 1.0;  // without a division for each of many short rows
  }

  // A p = H p + shift p;   pᵀAp, ‖Ap‖², ‖p‖²
  IMAML_PASS Curvature curvature(const A& a, int64_t row, int64_t first, int64_t last) {
    const T* const p_row = a.p_now() + row * a.cols;
    const T* const hp_row = a.hp + row * a.cols;
    const double scale = unit_scale(a, row);
    Sum pAp, ApAp, pp;
    with_row(a.shift, row, [&](const auto& shift) {
      sweep(first, last, [&](int64_t i, int n) {
        const auto p = load(p_row + i, n);
        const auto Ap = scaled(load(hp_row + i, n) + shift.at(i, n) * p, scale);
        const auto wide_p = scaled(p, scale);
        pAp.add(wide_p * Ap);
        ApAp.add(Ap * Ap);
        pp.add(wide_p * wide_p);
      });
    });
    return {pAp.total(), ApAp.total(), pp.total()};
  }

  // Whether every x + α p is finite in T. Only looked at where a bound does not settle it.
  static bool step_is_finite(const A& a, int64_t row, int64_t first, int64_t last, C alpha) {
    const int64_t at = row * a.cols;
    const T* const p = a.p_now();
    bool finite = true;
    for (int64_t i = at + first; i < at + last; ++i) {
      const T x = static_cast<T>((a.first ? C(0) : static_cast<C>(a.x[i])) + alpha * static_cast<C>(p[i]));
      finite = finite && std::isfinite(static_cast<double>(x));
    }
    return finite;
  }

  // r ← r − α (H p + shift p)   or   r ← b − (H p + shift p);   rᵀr, rᵀ M r
  IMAML_PASS ResidualSums residual(const A& a, int64_t row, int64_t first, int64_t last, ResidualFrom from, C alpha) {
    const int64_t at = row * a.cols;
    const T* const p_row = a.p_now() + at;
    const T* const hp_row = a.hp + at;
    const T* const from_row = (from == ResidualFrom::kSolution ? a.b : a.r_now()) + at;
    T* const r_row = a.r + at;
    const bool keep = !a.last;
    const double scale = unit_scale(a, row);
    const auto step = broadcast(from == ResidualFrom::kSolution ? C(1) : alpha);
    Sum rr, rz;
    with_row(a.shift, row, [&](const auto& shift) {
      const auto next = [&](int64_t i, int n) {
        const auto Ap = load(hp_row + i, n) + shift.at(i, n) * load(p_row + i, n);
        const auto r = rounded<T>(load(from_row + i, n) - step * Ap);
        if (keep) store(r_row + i, r, n);
        return r;
      };
      if (a.inverse_diagonal.data == nullptr) {
        sweep(first, last, [&](int64_t i, int n) {
          const auto wide = scaled(next(i, n), scale);
          rr.add(wide * wide);
        });
      } else {
        with_row(a.inverse_diagonal, row, [&](const auto& inverse) {
          sweep(first, last, [&](int64_t i, int n) {
            const auto r = next(i, n);
            const auto wide = scaled(r, scale);
            rr.add(wide * wide);
            rz.add(wide * scaled(inverse.at(i, n) * r, scale));
          });
        });
      }
    });
    const double squared = rr.total();
    return {squared, a.inverse_diagonal.data == nullptr ? squared : rz.total()};
  }

  // x ← x + α p,   then   p ← z + β p   or   p ← x   or   p ← 0
  IMAML_PASS void update(const A& a, int64_t row, int64_t first, int64_t last, bool take_step, C alpha, UpdateTo to,
                         C beta) {
    const int64_t at = row * a.cols;
    T* const x_row = a.x + at;
    T* const p_row = a.p + at;
    const T* const p_from = a.p_now() + at;
    const T* const z_row = (a.z != nullptr ? a.z : a.r) + at;
    const auto step = broadcast(alpha);
    const auto keep = broadcast(beta);
    const auto zero = broadcast(C(0));
    const bool afresh = beta == C(0);
    const bool from_zero = a.first;
    const auto stepped = [&](int64_t i, int n, const Lanes<C>& p) {
      return (from_zero ? zero : load(x_row + i, n)) + step * p;
    };
    const auto turned = [&](const Lanes<C>& z, const Lanes<C>& p) { return afresh ? z : z + keep * p; };
    if (to == UpdateTo::kSolution) {
      sweep(first, last, [&](int64_t i, int n) {
        if (take_step) store(x_row + i, stepped(i, n, load(p_from + i, n)), n);
        store(p_row + i, load(x_row + i, n), n);
      });
    } else if (to == UpdateTo::kZero) {
      sweep(first, last, [&](int64_t i, int n) {
        if (take_step) store(x_row + i, stepped(i, n, load(p_from + i, n)), n);
        store(p_row + i, zero, n);
      });
    } else if (to == UpdateTo::kNothing) {
      sweep(first, last, [&](int64_t i, int n) { store(x_row + i, stepped(i, n, load(p_from + i, n)), n); });
    } else if (a.inverse_diagonal.data != nullptr) {
      with_row(a.inverse_diagonal, row, [&](const auto& inverse) {
        sweep(first, last, [&](int64_t i, int n) {
          const auto p = load(p_from + i, n);
          if (take_step) store(x_row + i, stepped(i, n, p), n);
          store(p_row + i, turned(inverse.at(i, n) * load(z_row + i, n), p), n);
        });
      });
    } else if (take_step && !afresh) {  // every iteration but the last
      sweep(first, last, [&](int64_t i, int n) {
        const auto p = load(p_from + i, n);
        store(x_row + i, stepped(i, n, p), n);
        store(p_row + i, load(z_row + i, n) + keep * p, n);
      });
    } else {
      sweep(first, last, [&](int64_t i, int n) {
        const auto p = load(p_from + i, n);
        if (take_step) store(x_row + i, stepped(i, n, p), n);
        store(p_row + i, turned(load(z_row + i, n), p), n);
      });
    }
  }

  // x ← b / shift where the shift is positive and the quotient finite
  static void scaled_rhs(const A& a, int64_t row, int64_t first, int64_t last) {
    const int64_t at = row * a.cols;
    const C* shift = a.shift.data + row * a.shift.row_stride;
    for (int64_t i = first; i < last; ++i) {
      const C s = shift[i * a.shift.col_stride];
      const T quotient = s > C(0) ? static_cast<T>(static_cast<C>(a.b[at + i]) / s) : T(0);
      a.x[at + i] = std::isfinite(static_cast<double>(quotient)) ? quotient : T(0);
    }
  }

  // rᵀz, z a callable's or M r
  IMAML_PASS double dot_rz(const A& a, int64_t row, int64_t first, int64_t last) {
    const int64_t at = row * a.cols;
    const bool preconditioned = a.inverse_diagonal.data != nullptr;
    const CoefficientRow<C> inverse(a.inverse_diagonal, row);
    const double scale = unit_scale(a, row);
    Sum rz;
    sweep(first, last, [&](int64_t i, int n) {
      const auto r = load(a.r + at + i, n);
      auto z = load((a.z != nullptr ? a.z : a.r) + at + i, n);
      if (preconditioned) z = inverse.at(i, n) * z;
      rz.add(scaled(r, scale) * scaled(z, scale));
    });
    return rz.total();
  }

  // x ← x + α p,   then   p ← ζ r + β p   unless the system follows no more
  IMAML_PASS void follow(const CgShifts<T>& a, int64_t row, int64_t shift, int64_t first, int64_t last) {
    const int64_t system = row * a.shifts + shift;
    const ShiftState& state = a.shift_state[system];
    if (state.alpha == 0.0) return;
    const T* const r_row = a.r + row * a.cols;
    T* const x_row = a.x + system * a.cols;
    T* const p_row = a.p + system * a.cols;
    const auto alpha = broadcast(static_cast<C>(state.alpha));
    const auto beta = broadcast(static_cast<C>(state.beta));
    const auto zeta = broadcast(static_cast<C>(state.zeta));
    const bool turn = state.zeta != 0.0 && !a.last;
    sweep(first, last, [&](int64_t i, int n) {
      const auto p = load(p_row + i, n);
      store(x_row + i, load(x_row + i, n) + alpha * p, n);
      if (turn) store(p_row + i, zeta * load(r_row + i, n) + beta * p, n);
    });
  }

  static constexpr CgKernels<T> kTable = {residual_at_start<A>, curvature, step_is_finite, residual, update,
                                          scaled_rhs,           dot_rz,    follow};
};
