#include "cg/solver.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include "cg/lanczos.h"
#include "cg/ops.h"
#include "cg/row.h"
#include "cg/shift.h"
#include "common/checks.h"
#include "common/device_loop.h"
#include "common/solve.h"

namespace imaml_ext {
namespace {

// Validates, and fills in what the caller has left out.
CgOptions completed(const CgOptions& options, const at::Tensor& b) {
  TORCH_CHECK_VALUE(!(options.preconditioner && options.inverse_diagonal.defined()),
                    "cg: preconditioner must be either a diagonal or a callable, got both");
  TORCH_CHECK_VALUE(
      !options.shifts.defined() || !(options.x0 || options.preconditioner || options.inverse_diagonal.defined()),
      "cg: shifts must come without x0 and preconditioner, got both");
  CgOptions o = options;
  complete("cg", o, b);
  if (o.inverse_diagonal.defined()) check_coefficient("cg", "inverse_diagonal", o.inverse_diagonal, b);
  if (o.shifts.defined()) {
    check_table("cg", "shifts", o.shifts, at::kDouble, {b.size(0), o.shifts.size(-1)}, b);
  }
  TORCH_CHECK_VALUE(!(o.check_every > 0 && o.device_loop && (o.lanczos || o.shifts.defined())),
                    "cg: check_every must be 0 inside a CUDA graph that keeps Lanczos coefficients or has shifts, got ",
                    o.check_every);
  return o;
}

// What is kept of all rows beside the result.
struct Kept {
  at::Tensor state;         // [B, kRowStateWidth] float64
  at::Tensor coefficients;  // [m, B, 2] float64: α and β of every step
  at::Tensor shift_state;   // [B, J, kShiftStateWidth] float64
};

// One block of rows: views of the batch's tensors, and the work vectors that each block uses anew.
class Block {
 public:
  Block(const RowBlock& block, const CgOptions& batch, const at::Tensor& b, const WorkVectors& work, CgResult& result,
        const Kept& kept)
      : block_(block),
        o_(batch),
        b_(block.of(b)),
        x_(block.of(result.x)),
        r_(work(0, block.rows.count())),
        p_(work(1, block.rows.count())),
        best_(work(2, block.rows.count())),
        state_(block.of(kept.state)),
        status_(block.of(result.status)),
        iterations_(block.of(result.iterations)) {
    o_.shift = block.of(batch.shift);
    o_.rtol = block.of(batch.rtol);
    o_.atol = block.of(batch.atol);
    if (batch.inverse_diagonal.defined()) inverse_diagonal_ = block.of(batch.inverse_diagonal);
    if (batch.x0) x_.copy_(block.of(*batch.x0));
    if (batch.lanczos) coefficients_ = kept.coefficients.narrow(1, block.rows.first, block.rows.count());
    if (batch.shifts.defined()) {
      sigma_ = block.of(batch.shifts);
      shift_x_ = block.of(result.shifted->x);
      shift_p_ = b_.unsqueeze(1).expand_as(shift_x_).clone(at::MemoryFormat::Contiguous);
      shift_state_ = block.of(kept.shift_state);
    }
  }

  // Returns the number of iterations made; where the device counts them, the largest it can be.
  int64_t solve(const RowOperator& hvp);

 private:
  void iterate(const RowOperator& hvp, bool first, bool last);
  void iterate_on_device(const RowOperator& hvp);
  bool looks_on_device() const { return o_.check_every > 0 && o_.device_loop; }

  at::Tensor apply(const RowOperator& callback, const char* name, const at::Tensor& argument) const {
    return block_.apply(callback, name, argument, b_);
  }
  at::Tensor precondition() const { return apply(o_.preconditioner, "preconditioner", r_); }

  // Waits for the device.
  bool at_work() const {
    return o_.shifts.defined() ? shift_state_.select(2, kZeta).any().item<bool>() : any_at_work(status_);
  }

  RowBlock block_;
  CgOptions o_;
  std::optional<at::Tensor> inverse_diagonal_;
  at::Tensor b_, x_, r_, p_, best_, state_, status_, iterations_;
  at::Tensor coefficients_;                             // [m, rows, 2]; undefined: not asked for
  at::Tensor sigma_, shift_x_, shift_p_, shift_state_;  // undefined: no shifts
};

int64_t Block::solve(const RowOperator& hvp) {
  // r = b − A x0,  z = M r,  p = z. From x = 0 without M that is r = p = b, and stays b until the first step.
  const bool from_b = !o_.x0 && !o_.preconditioner && !inverse_diagonal_ && !looks_on_device() && o_.max_iterations > 0;
  std::optional<at::Tensor> hx;
  if (o_.x0) hx = apply(hvp, "A", x_);
  if (from_b) {
    call<cg_begin_>("imaml_ext::cg_begin_", b_, hx, o_.shift, inverse_diagonal_, o_.rtol, o_.atol, std::nullopt,
                    std::nullopt, std::nullopt, state_, status_, iterations_, /*update_direction=*/true);
  } else {
    call<cg_begin_>("imaml_ext::cg_begin_", b_, hx, o_.shift, inverse_diagonal_, o_.rtol, o_.atol, x_, r_, p_, state_,
                    status_, iterations_, /*update_direction=*/!o_.preconditioner);
  }

  if (looks_on_device()) {
    iterate_on_device(hvp);
    return o_.max_iterations;
  }
  int64_t k = 0;
  for (; k < o_.max_iterations; ++k) {
    const bool first = from_b && k == 0;
    const bool last = k + 1 == o_.max_iterations;
    if (o_.check_every > 0 && k % o_.check_every == 0 && !at_work()) {
      if (first) x_.zero_();  // what the first step would have done
      break;
    }
    iterate(hvp, first, last);
    if (coefficients_.defined()) {
      coefficients_.select(0, k).copy_(state_.narrow(1, kAlpha, 2));
      // A callable preconditioner gives β only as the next iteration begins.
      if (o_.preconditioner && k > 0) coefficients_.select(0, k - 1).select(1, 1).copy_(state_.select(1, kAlpha + 1));
    }
    if (sigma_.defined()) {
      call<cg_shifts_step_>("imaml_ext::cg_shifts_step_", last ? std::nullopt : std::optional(r_), state_, sigma_,
                            shift_x_, shift_p_, shift_state_, last);
    }
  }
  return k;
}

void Block::iterate(const RowOperator& hvp, bool first, bool last) {
  // A callable preconditioner stands between the new residual and the new direction.
  if (o_.preconditioner) {
    call<cg_direction_>("imaml_ext::cg_direction_", precondition(), std::nullopt, x_, r_, p_, state_, status_);
  }
  const at::Tensor hp = apply(hvp, "A", first ? b_ : p_);
  call<cg_step_>("imaml_ext::cg_step_", hp, b_, o_.shift, inverse_diagonal_, x_, r_, p_, best_, state_, status_,
                 iterations_, /*update_direction=*/!o_.preconditioner, first, last);
}

// The same iterations, and looks at the status before the same of them, where it is the device that decides. A body is
// captured once, so all its rounds are alike: the round that has the last iteration is a loop of its own.
void Block::iterate_on_device(const RowOperator& hvp) {
  if (o_.max_iterations == 0) return;
  const int64_t rounds = (o_.max_iterations - 1) / o_.check_every;
  const int64_t rest = o_.max_iterations - rounds * o_.check_every;
  rounds_on_device(o_.device_loop, status_, kIterating, rounds, [&] {
    for (int64_t k = 0; k < o_.check_every; ++k) iterate(hvp, /*first=*/false, /*last=*/false);
  });
  rounds_on_device(o_.device_loop, status_, kIterating, 1, [&] {
    for (int64_t k = 0; k < rest; ++k) iterate(hvp, /*first=*/false, /*last=*/k + 1 == rest);
  });
}

}  // namespace

CgResult cg(const RowOperator& hvp, const at::Tensor& b_in, const CgOptions& options) {
  const at::Tensor b = checked_rhs("cg", hvp, b_in);
  const CgOptions o = completed(options, b);
  CgResult result;
  static_cast<SolveResult&>(result) = empty_result(b);
  const auto wide = b.options().dtype(at::kDouble);
  const int64_t batch = b.size(0);
  Kept kept{at::empty({batch, kRowStateWidth}, wide), {}, {}};
  if (o.lanczos) kept.coefficients = at::zeros({o.max_iterations, batch, 2}, wide);
  if (o.shifts.defined()) {
    result.shifted = ShiftedSystems{at::zeros({batch, o.shifts.size(1), b.size(1)}, b.options()), {}};
    kept.shift_state = at::zeros({batch, o.shifts.size(1), kShiftStateWidth}, wide);
    kept.shift_state.select(2, kZeta).fill_(1.0);
  }
  int64_t taken = 0;
  each_block("cg", o.rows_per_block, 3, b, [&](const RowBlock& block, const WorkVectors& work) {
    taken = std::max(taken, Block(block, o, b, work, result, kept).solve(hvp));
  });
  finish(result, kept.state, kResidual);
  if (o.lanczos) result.lanczos = lanczos_tables(kept.coefficients, taken);
  if (result.shifted) result.shifted->iterations = kept.shift_state.select(2, kSteps).to(at::kInt);
  return result;
}

}  // namespace imaml_ext
