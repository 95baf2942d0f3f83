// The proximal steps over a piece of a row. Included by common/cpu/kernels.inl inside a namespace of the instruction
// set.

template <typename T>
struct ProxPasses {
  using A = ProxArguments<T>;
  using C = typename A::C;

  // The pieces of row `row` that every rule reads.
  struct Row {
    int64_t at;
    const T* theta;
    CoefficientRow<C> lam;
    CoefficientRow<C> lr;
    Row(const A& a, int64_t row)
        : at(row * a.cols), theta(a.theta + row * a.theta_row_stride), lam(a.lam, row), lr(a.lr, row) {}
  };

  // g ← g + λ (φ − θ)
  IMAML_PASS void gradient(const A& a, int64_t row, int64_t first, int64_t last) {
    const Row w(a, row);
    sweep(first, last, [&](int64_t i, int n) {
      const auto g = proximal_gradient(load(a.grad + w.at + i, n), w.lam.at(i, n), load(a.phi + w.at + i, n),
                                       load(w.theta + i, n));
      store(a.grad + w.at + i, g, n);
    });
  }

  // Σ λ (φ − θ)²
  IMAML_PASS double penalty(const A& a, int64_t row, int64_t first, int64_t last) {
    const Row w(a, row);
    Sum sum;
    sweep(first, last, [&](int64_t i, int n) {
      const auto d = widen(load(a.phi + w.at + i, n)) - widen(load(w.theta + i, n));
      sum.add(widen(w.lam.at(i, n)) * d * d);
    });
    return sum.total();
  }

  // φ ← φ − η (∇L + λ (φ − θ))
  IMAML_PASS void sgd(const A& a, int64_t row, int64_t first, int64_t last) {
    const Row w(a, row);
    sweep(first, last, [&](int64_t i, int n) {
      const auto phi = load(a.phi + w.at + i, n);
      const auto g = proximal_gradient(load(a.grad + w.at + i, n), w.lam.at(i, n), phi, load(w.theta + i, n));
      store(a.phi + w.at + i, phi - w.lr.at(i, n) * g, n);
    });
  }

  IMAML_PASS void momentum(const A& a, int64_t row, int64_t first, int64_t last) {
    const Row w(a, row);
    const auto mu = broadcast(static_cast<C>(a.rule.momentum));
    sweep(first, last, [&](int64_t i, int n) {
      const auto phi = load(a.phi + w.at + i, n);
      const auto g = proximal_gradient(load(a.grad + w.at + i, n), w.lam.at(i, n), phi, load(w.theta + i, n));
      auto velocity = load(a.first + w.at + i, n);
      const auto direction = momentum_direction(velocity, g, mu, a.rule.nesterov);
      store(a.first + w.at + i, velocity, n);
      store(a.phi + w.at + i, phi - w.lr.at(i, n) * direction, n);
    });
  }

  IMAML_PASS void adam(const A& a, int64_t row, int64_t first, int64_t last) {
    const Row w(a, row);
    const auto beta1 = broadcast(static_cast<C>(a.rule.beta1));
    const auto beta2 = broadcast(static_cast<C>(a.rule.beta2));
    const auto one_minus_beta1 = broadcast(static_cast<C>(1.0 - a.rule.beta1));
    const auto one_minus_beta2 = broadcast(static_cast<C>(1.0 - a.rule.beta2));
    const auto correction1 = broadcast(static_cast<C>(a.rule.correction1));
    const auto correction2 = broadcast(static_cast<C>(a.rule.correction2));
    const auto eps = broadcast(static_cast<C>(a.rule.eps));
    sweep(first, last, [&](int64_t i, int n) {
      const auto phi = load(a.phi + w.at + i, n);
      const auto g = proximal_gradient(load(a.grad + w.at + i, n), w.lam.at(i, n), phi, load(w.theta + i, n));
      auto m = load(a.first + w.at + i, n);
      auto s = load(a.second + w.at + i, n);
      const auto direction =
          adam_direction(m, s, g, beta1, beta2, one_minus_beta1, one_minus_beta2, correction1, correction2, eps);
      store(a.first + w.at + i, m, n);
      store(a.second + w.at + i, s, n);
      store(a.phi + w.at + i, phi - w.lr.at(i, n) * direction, n);
    });
  }

  static constexpr ProxKernels<T> kTable = {gradient, penalty, sgd, momentum, adam};
};
