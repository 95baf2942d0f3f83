// The update rules, for one number or for sixteen side by side: V is a float, a double, or the CPU kernels' Lanes.
// Included after IMAML_RULE is set to what marks a function there; not a header.

// ∇L + λ (φ − θ)
template <typename V>
IMAML_RULE V proximal_gradient(const V& grad, const V& lam, const V& phi, const V& theta) {
  return grad + lam * (phi - theta);
}

// v ← μ v + g;   step along v, or along g + μ v (Nesterov)
template <typename V>
IMAML_RULE V momentum_direction(V& velocity, const V& g, const V& momentum, bool nesterov) {
  velocity = momentum * velocity + g;
  return nesterov ? g + momentum * velocity : velocity;
}

// m ← β1 m + (1 − β1) g,  s ← β2 s + (1 − β2) g²;   m̂ / (√ŝ + ε)   (Kingma and Ba, 2015)
template <typename V>
IMAML_RULE V adam_direction(V& m, V& s, const V& g, const V& beta1, const V& beta2, const V& one_minus_beta1,
                            const V& one_minus_beta2, const V& correction1, const V& correction2, const V& eps) {
  m = beta1 * m + one_minus_beta1 * g;
  s = beta2 * s + one_minus_beta2 * g * g;
  return (m / correction1) / (square_root(s / correction2) + eps);
}
