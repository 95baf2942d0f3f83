// How every solve begins. Included by kernels.inl, after lanes.inl.

// r = b − (H x0 + shift x0), or b itself (written where there is an r);   ‖b‖², ‖r‖², ‖x0‖²
template <typename A>
IMAML_PASS BeginSums residual_at_start(const A& a, int64_t row, int64_t first, int64_t last, double b_scale,
                                       double r_scale) {
  const int64_t at = row * a.cols;
  const CoefficientRow<typename A::C> shift(a.shift, row);
  Sum bb, rr, xx;
  sweep(first, last, [&](int64_t i, int n) {
    const auto b = load(a.b + at + i, n);
    bb.add(scaled(b, b_scale) * scaled(b, b_scale));
    if (a.hp == nullptr) {
      if (a.r != nullptr) store(a.r + at + i, b, n);
      return;
    }
    const auto x = load(a.x + at + i, n);
    const auto r = rounded<typename A::Number>(b - (load(a.hp + at + i, n) + shift.at(i, n) * x));
    if (a.r != nullptr) store(a.r + at + i, r, n);
    rr.add(scaled(r, r_scale) * scaled(r, r_scale));
    xx.add(widen(x) * widen(x));
  });
  const double b_squared = bb.total();
  return {b_squared, a.hp == nullptr ? b_squared : rr.total(), xx.total()};
}
