// Where a kernel puts the derivative in a parameter.
#pragma once

#include "common/coefficient.h"
#include "network/cuda/per_task.cuh"

namespace imaml_ext {

#define IMAML_RULE __device__ __forceinline__
#include "prox/rules.inl"
#undef IMAML_RULE

// Into a row of parameters. With `phi` a step of proximal gradient descent is taken at once, and the next φ is put
// there in its place:   φ − η (∇L + λ (φ − θ)).   The next φ never lies where the last one does: others still read
// that.
template <typename T>
struct ParametersOut {
  PerTask<T> to;
  PerTask<const T> phi, theta;
  Coefficient<T> lam, lr;

  ParametersOut() = default;
  explicit ParametersOut(PerTask<T> row) : to(row) {}

  ParametersOut operator+(int64_t offset) const {
    ParametersOut part(to + offset);
    if (phi.first == nullptr) return part;
    part.phi = phi + offset, part.theta = theta + offset;
    part.lam = {lam.data + offset * lam.col_stride, lam.row_stride, lam.col_stride};
    part.lr = {lr.data + offset * lr.col_stride, lr.row_stride, lr.col_stride};
    return part;
  }

  __device__ __forceinline__ void put(int64_t task, int64_t k, T derivative) const {
    if (phi.first == nullptr) {
      to.of(task)[k] = derivative;
      return;
    }
    const T here = phi.of(task)[k];
    const T strength = lam.data[task * lam.row_stride + k * lam.col_stride];
    const T rate = lr.data[task * lr.row_stride + k * lr.col_stride];
    to.of(task)[k] = here - rate * proximal_gradient(derivative, strength, here, theta.of(task)[k]);
  }
};

}  // namespace imaml_ext
