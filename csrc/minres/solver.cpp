#include "minres/solver.h"

#include <ATen/Functions.h>

#include <algorithm>

#include "common/device_loop.h"
#include "common/solve.h"
#include "minres/ops.h"
#include "minres/row.h"

namespace imaml_ext {
namespace {

// One block of rows: views of the batch's tensors, and the work vectors that each block uses anew.
void solve_block(const RowBlock& block, const RowOperator& hvp, const MinresOptions& o, const at::Tensor& batch,
                 const WorkVectors& work, MinresResult& result, const at::Tensor& all_state) {
  const auto vector = [&](int64_t which) { return work(which, block.rows.count()); };
  const at::Tensor b = block.of(batch), shift = block.of(o.shift);
  at::Tensor x = block.of(result.x), v = vector(0), v_next = vector(1), q = vector(2), q_next = vector(3);
  at::Tensor best = vector(4), state = block.of(all_state);
  at::Tensor status = block.of(result.status), iterations = block.of(result.iterations);
  std::optional<at::Tensor> hx, diagonal, off_diagonal;
  if (o.lanczos) {
    diagonal = block.of(result.lanczos.diagonal);
    off_diagonal = block.of(result.lanczos.off_diagonal);
  }

  // r = b − A x0,  v = r / ‖r‖
  if (o.x0) {
    x.copy_(block.of(*o.x0));
    hx = block.apply(hvp, "A", x, b);
  }
  call<minres_begin_>("imaml_ext::minres_begin_", b, hx, shift, block.of(o.rtol), block.of(o.atol), x, v, best, state,
                      status, iterations);
  const auto iterate = [&](bool first, bool last) {
    const at::Tensor hv = block.apply(hvp, "A", v, b);
    call<minres_step_>("imaml_ext::minres_step_", hv, b, shift, x, v, v_next, q, q_next, best, state, status,
                       iterations, diagonal, off_diagonal, first, last);
    std::swap(v, v_next);
    std::swap(q, q_next);
  };
  if (o.check_every > 0 && o.device_loop && o.max_iterations > 0) {
    // A body is captured once. So all its rounds are alike: an even number of iterations, which leaves v and v_next
    // where they were, and neither the first one nor the last.
    const int64_t round = 2 * o.check_every, rounds = std::max<int64_t>(o.max_iterations - 2, 0) / round;
    const int64_t rest = o.max_iterations - 1 - rounds * round;
    iterate(/*first=*/true, /*last=*/o.max_iterations == 1);
    rounds_on_device(o.device_loop, status, kIterating, rounds, [&] {
      for (int64_t k = 0; k < round; ++k) iterate(/*first=*/false, /*last=*/false);
    });
    rounds_on_device(o.device_loop, status, kIterating, rest > 0 ? 1 : 0, [&] {
      for (int64_t k = 0; k < rest; ++k) iterate(/*first=*/false, /*last=*/k + 1 == rest);
    });
    return;
  }
  for (int64_t k = 0; k < o.max_iterations; ++k) {
    if (o.check_every > 0 && k % o.check_every == 0 && !any_at_work(status)) break;
    iterate(k == 0, k + 1 == o.max_iterations);
  }
}

}  // namespace

MinresResult minres(const RowOperator& hvp, const at::Tensor& b_in, const MinresOptions& options) {
  const at::Tensor b = checked_rhs("minres", hvp, b_in);
  MinresOptions o = options;
  complete("minres", o, b);
  MinresResult result{empty_result(b), {}};
  const auto wide = b.options().dtype(at::kDouble);
  const at::Tensor state = at::empty({b.size(0), kMinresStateWidth}, wide);
  if (o.lanczos) {
    result.lanczos.diagonal = at::zeros({b.size(0), o.max_iterations}, wide);
    result.lanczos.off_diagonal = at::zeros({b.size(0), std::max<int64_t>(o.max_iterations - 1, 0)}, wide);
  }
  each_block("minres", o.rows_per_block, 5, b, [&](const RowBlock& block, const WorkVectors& work) {
    solve_block(block, hvp, o, b, work, result, state);
  });
  finish(result, state, kMinresResidual);
  if (o.lanczos) result.lanczos.steps = state.select(1, kMinresCoefficients).to(at::kInt);
  return result;
}

}  // namespace imaml_ext
