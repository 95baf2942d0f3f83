// What a shifted system A + σ, σ ≥ 0, takes from a step of the system A that a row solves. Written once, for host and
// device.
//
// From x = 0 both have the same Krylov spaces, and residuals that are multiples of each other, r_σ = ζ r. So the
// shifted system follows without a product of its own (Jegerlehner, hep-lat/9612014; Frommer, Computing 70, 2003):
//
//     ρ = ζ₊ / ζ = 1 / (1 + α (σ + c))      c₊ = (1 − ρ) β / α
//     α_σ = ρ α      x_σ ← x_σ + α_σ p_σ      β_σ = ρ² β      p_σ ← ζ₊ r + β_σ p_σ
//
// Every term is positive, hence 0 < ρ ≤ 1: a shifted residual is at most that of the row.
#pragma once

#include <cstdint>

#include "cg/row.h"
#include "common/host_device.h"

namespace imaml_ext {

// One shift of one row, of the float64 tensor `shift_state` [B, J, kShiftStateWidth].
struct ShiftState {
  double zeta;   // r_σ = ζ r; 0: the system follows no more
  double carry;  // c, of the step before
  double alpha;  // α_σ of this step; 0: none is taken
  double beta;   // β_σ
  double steps;  // that were taken
};
constexpr int64_t kShiftStateWidth = 5;
constexpr int64_t kZeta = 0;  // its column
constexpr int64_t kSteps = 4;
static_assert(sizeof(ShiftState) == kShiftStateWidth * sizeof(double), "ShiftState is read as float64");

// After cg_step_ has taken the row's step. A system follows until its residual is within the tolerance. Once the row
// takes no step, it never follows again: a row that measures goes on from b − A x, which is no multiple of theirs.
IMAML_HOST_DEVICE void shift_step(const RowState& row, ShiftState& shift, double sigma) {
  shift.alpha = shift.beta = 0.0;
  if (row.alpha == 0.0) shift.zeta = 0.0;
  if (shift.zeta == 0.0) return;
  const double smaller = row.alpha * (sigma + shift.carry);
  const double ratio = 1.0 / (1.0 + smaller);
  shift.alpha = ratio * row.alpha;
  shift.beta = ratio * ratio * row.beta;
  shift.carry = smaller * ratio * row.beta / row.alpha;
  shift.zeta *= ratio;
  shift.steps += 1.0;
  if (shift.zeta * row.residual <= row.threshold) shift.zeta = 0.0;
}

}  // namespace imaml_ext
