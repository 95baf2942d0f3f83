#include "cg_solver.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include <utility>

#include "cg_row.h"
#include "checks.h"

namespace imaml_ext {
namespace {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

void begin(const at::Tensor& b, const std::optional<at::Tensor>& hx, const CgOptions& o,
           const std::optional<at::Tensor>& inverse_diagonal, const std::optional<at::Tensor>& x,
           const std::optional<at::Tensor>& r, const std::optional<at::Tensor>& p, at::Tensor& state,
           at::Tensor& status, at::Tensor& iterations, bool update_direction) {
  static const auto op = find_op<void(
      const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&, const std::optional<at::Tensor>&,
      const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
      const std::optional<at::Tensor>&, at::Tensor&, at::Tensor&, at::Tensor&, bool)>("imaml_ext::cg_begin_");
  op.call(b, hx, o.shift, inverse_diagonal, o.rtol, o.atol, x, r, p, state, status, iterations, update_direction);
}

void direction(const std::optional<at::Tensor>& z, const std::optional<at::Tensor>& inverse_diagonal,
               const at::Tensor& x, const at::Tensor& r, at::Tensor& p, at::Tensor& state, at::Tensor& status) {
  static const auto op =
      find_op<void(const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const at::Tensor&,
                   const at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&)>("imaml_ext::cg_direction_");
  op.call(z, inverse_diagonal, x, r, p, state, status);
}

void step(const at::Tensor& hp, const at::Tensor& b, const at::Tensor& shift,
          const std::optional<at::Tensor>& inverse_diagonal, at::Tensor& x, at::Tensor& r, at::Tensor& p,
          at::Tensor& state, at::Tensor& status, at::Tensor& iterations, bool update_direction, bool first, bool last) {
  static const auto op =
      find_op<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                   at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, bool, bool, bool)>(
          "imaml_ext::cg_step_");
  op.call(hp, b, shift, inverse_diagonal, x, r, p, state, status, iterations, update_direction, first, last);
}

// The work vectors r and p of the last solve on the CPU, kept by each thread for its next one: fresh memory of this
// size costs more in page faults than an iteration costs. (On CUDA the caching allocator does this.)
class WorkVectors {
 public:
  explicit WorkVectors(const at::Tensor& b) {
    const bool fits = b.device().is_cpu() && kept_.defined() && kept_.scalar_type() == b.scalar_type() &&
                      kept_.size(1) == b.size(0) && kept_.size(2) == b.size(1);
    both_ = fits ? std::exchange(kept_, at::Tensor()) : at::empty({2, b.size(0), b.size(1)}, b.options());
  }
  // Not kept if a callback holds on to one of them: it would see the next solve.
  void done(at::Tensor& r, at::Tensor& p) {
    r.reset();
    p.reset();
    if (both_.device().is_cpu() && both_.storage().use_count() == 1) kept_ = std::move(both_);
  }
  at::Tensor r() const { return both_.select(0, 0); }
  at::Tensor p() const { return both_.select(0, 1); }

 private:
  static thread_local at::Tensor kept_;
  at::Tensor both_;  // [2, B, N]
};
thread_local at::Tensor WorkVectors::kept_;

// What a callback returned: a tensor like b, made contiguous.
at::Tensor apply(const RowOperator& callback, const char* name, const at::Tensor& argument, const at::Tensor& b) {
  at::Tensor result = callback(argument);
  TORCH_CHECK_TYPE(result.defined(), "cg: ", name, " returned no tensor");
  result = result.detach().contiguous();
  check_like("cg", name, result, "b", b);
  return result;
}

}  // namespace

CgResult cg(const RowOperator& hvp, const at::Tensor& b_in, const CgOptions& options) {
  TORCH_CHECK_VALUE(static_cast<bool>(hvp), "cg: hvp must be callable, got an empty function");
  const at::Tensor b = b_in.detach().contiguous();
  check_rows("cg", "b", b);
  TORCH_CHECK_VALUE(options.max_iterations >= 0, "cg: max_iterations must be at least 0, got ", options.max_iterations);
  TORCH_CHECK_VALUE(options.check_every >= 0, "cg: check_every must be at least 0, got ", options.check_every);
  TORCH_CHECK_VALUE(!(options.preconditioner && options.inverse_diagonal.defined()),
                    "cg: preconditioner must be either a diagonal or a callable, got both");

  const int64_t rows = b.size(0);
  const auto wide = b.options().dtype(at::kDouble);
  CgOptions o = options;
  if (!o.shift.defined()) o.shift = at::zeros({1, 1}, b.options().dtype(compute_type(b.scalar_type())));
  if (!o.rtol.defined()) o.rtol = at::full({1}, 1e-5, wide);
  if (!o.atol.defined()) o.atol = at::zeros({1}, wide);

  at::Tensor x = at::empty_like(b);
  if (o.x0) {
    check_like("cg", "x0", o.x0->detach().contiguous(), "b", b);
    x.copy_(o.x0->detach());
  }
  WorkVectors work(b);
  at::Tensor r = work.r();
  at::Tensor p = work.p();
  at::Tensor state = at::empty({rows, kRowStateWidth}, wide);
  at::Tensor status = at::empty({rows}, b.options().dtype(at::kInt));
  at::Tensor iterations = at::empty_like(status);

  const std::optional<at::Tensor> inverse_diagonal =
      o.inverse_diagonal.defined() ? std::optional(o.inverse_diagonal) : std::nullopt;
  const auto precondition = [&]() -> std::optional<at::Tensor> {
    if (!o.preconditioner) return std::nullopt;
    return apply(o.preconditioner, "preconditioner", r, b);
  };

  // r = b − A x0,  z = M r,  p = z. From x = 0 without M that is r = p = b, and stays b until the first step.
  const bool from_b = !o.x0 && !o.preconditioner && !inverse_diagonal && o.max_iterations > 0;
  std::optional<at::Tensor> hx;
  if (o.x0) hx = apply(hvp, "hvp", x, b);
  if (from_b) {
    begin(b, hx, o, inverse_diagonal, std::nullopt, std::nullopt, std::nullopt, state, status, iterations,
          /*update_direction=*/true);
  } else {
    begin(b, hx, o, inverse_diagonal, x, r, p, state, status, iterations, /*update_direction=*/!o.preconditioner);
  }
  if (o.preconditioner && o.max_iterations > 0) direction(precondition(), std::nullopt, x, r, p, state, status);

  for (int64_t k = 0; k < o.max_iterations; ++k) {
    const bool first = from_b && k == 0;
    const bool last = k + 1 == o.max_iterations;
    if (o.check_every > 0 && k % o.check_every == 0 && !status.ge(kIterating).any().item<bool>()) {
      if (first) x.zero_();  // what the first step would have done
      break;
    }
    const at::Tensor hp = apply(hvp, "hvp", first ? b : p, b);
    // A callable preconditioner stands between the new residual and the new direction.
    step(hp, b, o.shift, inverse_diagonal, x, r, p, state, status, iterations,
         /*update_direction=*/!o.preconditioner, first, last);
    if (o.preconditioner && !last) direction(precondition(), std::nullopt, x, r, p, state, status);
  }

  work.done(r, p);

  // A row still at work has spent its iterations.
  status.masked_fill_(status.ge(kIterating), kMaxIterations);
  return {x, status, iterations, state.select(1, kResidualSquared).sqrt()};
}

}  // namespace imaml_ext
