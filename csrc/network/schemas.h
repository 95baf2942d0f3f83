// The schemas of the network ops.
#pragma once

namespace imaml_ext {

// The reference networks, every task with parameters of its own: params [B, N], x [B, S, *], y [B, S] labels or
// [B, S, *] targets; `network` as in network.h.
inline constexpr const char* kNetworkSchemas[] = {
    "network_outputs(Tensor params, Tensor x, int[] network) -> Tensor",
    "network_gradient(Tensor params, Tensor x, Tensor y, int[] network) -> "
    "(Tensor losses, Tensor outputs, Tensor gradient)",
    // `steps` times φ ← φ − η (∇L + λ (φ − θ)), as prox_sgd_step_; losses [steps, B] before each.
    "network_descend_(Tensor(a!) phi, Tensor theta, Tensor lam, Tensor lr, Tensor x, Tensor y, int[] network, "
    "int steps) -> Tensor",
    "network_linearise(Tensor params, Tensor x, Tensor y, int[] network) -> "
    "(Tensor losses, Tensor outputs, Tensor gradient, Tensor tape)",
    "network_product(Tensor params, Tensor tape, Tensor y, Tensor p, int[] network, bool gauss_newton) -> Tensor",
    // pᵀ Jᵀ C J p of every task, [B] float64: the way forward of the product with the Gauss-Newton matrix alone.
    "network_curvature(Tensor params, Tensor tape, Tensor y, Tensor p, int[] network) -> Tensor",
};

}  // namespace imaml_ext
