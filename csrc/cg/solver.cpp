#include "cg/solver.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

#include "cg/lanczos.h"
#include "cg/ops.h"
#include "cg/row.h"
#include "cg/shift.h"
#include "common/checks.h"
#include "common/device_loop.h"

namespace imaml_ext {
namespace {

// Calls an op through the dispatcher: its name, and the function that says what it takes.
template <auto kOp, typename... Arguments>
void call(const char* name, Arguments&&... arguments) {
  using Signature = std::remove_pointer_t<decltype(kOp)>;
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  op.call(std::forward<Arguments>(arguments)...);
}

// The work vectors r, p and `best` of the last solve on the CPU, kept by each thread for its next one: fresh memory of
// this size costs more in page faults than an iteration costs. (On CUDA the caching allocator does this.) `best` lies
// last: where no row keeps an iterate, its pages are never touched.
class WorkVectors {
 public:
  WorkVectors(int64_t rows, const at::Tensor& b) {
    const bool fits = kept_.defined() && is_plain(b) && kept_.scalar_type() == b.scalar_type() &&
                      kept_.size(1) == rows && kept_.size(2) == b.size(1);
    all_ = fits ? std::exchange(kept_, at::Tensor()) : at::empty({3, rows, b.size(1)}, b.options());
  }
  // Not kept if a callback holds on to one of them: it would see the next solve.
  void done() {
    if (is_plain(all_) && all_.storage().use_count() == 1) kept_ = std::move(all_);
  }
  at::Tensor r(int64_t rows) const { return of(0, rows); }
  at::Tensor p(int64_t rows) const { return of(1, rows); }
  at::Tensor best(int64_t rows) const { return of(2, rows); }

 private:
  // Whether autograd may save it and every mode may see it: not what inference mode or a tensor mode has made.
  static bool is_plain(const at::Tensor& tensor) {
    return tensor.device().is_cpu() && !tensor.is_inference() && !c10::InferenceMode::is_enabled() &&
           !tensor.key_set().has(c10::DispatchKey::Python) && !c10::impl::dispatch_mode_enabled();
  }
  at::Tensor of(int64_t which, int64_t rows) const { return all_.select(0, which).narrow(0, 0, rows); }

  static thread_local at::Tensor kept_;
  at::Tensor all_;  // [3, rows, N]
};
thread_local at::Tensor WorkVectors::kept_;

// Validates, and fills in what the caller has left out.
CgOptions completed(const CgOptions& options, const at::Tensor& b) {
  TORCH_CHECK_VALUE(options.max_iterations >= 0, "cg: max_iterations must be at least 0, got ", options.max_iterations);
  TORCH_CHECK_VALUE(options.check_every >= 0, "cg: check_every must be at least 0, got ", options.check_every);
  TORCH_CHECK_VALUE(options.rows_per_block >= 0, "cg: rows_per_block must be at least 0, got ", options.rows_per_block);
  TORCH_CHECK_VALUE(!(options.preconditioner && options.inverse_diagonal.defined()),
                    "cg: preconditioner must be either a diagonal or a callable, got both");
  TORCH_CHECK_VALUE(
      !options.shifts.defined() || !(options.x0 || options.preconditioner || options.inverse_diagonal.defined()),
      "cg: shifts must come without x0 and preconditioner, got both");
  const auto wide = b.options().dtype(at::kDouble);
  CgOptions o = options;
  if (!o.shift.defined()) o.shift = at::zeros({1, 1}, b.options().dtype(compute_type(b.scalar_type())));
  if (!o.rtol.defined()) o.rtol = at::full({1}, 1e-5, wide);
  if (!o.atol.defined()) o.atol = at::zeros({1}, wide);
  check_coefficient("cg", "shift", o.shift, b);
  if (o.inverse_diagonal.defined()) check_coefficient("cg", "inverse_diagonal", o.inverse_diagonal, b);
  for (const auto& [name, tolerance] : {std::pair{"rtol", o.rtol}, std::pair{"atol", o.atol}}) {
    const bool one = tolerance.dim() == 1 && tolerance.size(0) == 1;
    check_table("cg", name, tolerance, at::kDouble, {one ? 1 : b.size(0)}, b);
  }
  if (o.shifts.defined()) {
    check_table("cg", "shifts", o.shifts, at::kDouble, {b.size(0), o.shifts.size(-1)}, b);
  }
  if (o.x0) {
    o.x0 = o.x0->detach().contiguous();
    check_like("cg", "x0", *o.x0, "b", b);
  }
  if (o.check_every > 0 && !o.device_loop) o.device_loop = captured_loop(b);
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
  Block(RowRange rows, const CgOptions& batch, const at::Tensor& b, const WorkVectors& work, CgResult& result,
        const Kept& kept)
      : rows_(rows),
        batch_(b.size(0)),
        o_(batch),
        b_(of(b)),
        x_(of(result.x)),
        r_(work.r(rows.count())),
        p_(work.p(rows.count())),
        best_(work.best(rows.count())),
        state_(of(kept.state)),
        status_(of(result.status)),
        iterations_(of(result.iterations)) {
    o_.shift = of(batch.shift);
    o_.rtol = of(batch.rtol);
    o_.atol = of(batch.atol);
    if (batch.inverse_diagonal.defined()) inverse_diagonal_ = of(batch.inverse_diagonal);
    if (batch.x0) x_.copy_(of(*batch.x0));
    if (batch.lanczos) coefficients_ = kept.coefficients.narrow(1, rows.first, rows.count());
    if (batch.shifts.defined()) {
      sigma_ = of(batch.shifts);
      shift_x_ = of(result.shifted->x);
      shift_p_ = b_.unsqueeze(1).expand_as(shift_x_).clone(at::MemoryFormat::Contiguous);
      shift_state_ = of(kept.shift_state);
    }
  }

  void solve(const RowOperator& hvp);

 private:
  void iterate(const RowOperator& hvp, bool first, bool last);
  void iterate_on_device(const RowOperator& hvp);
  bool looks_on_device() const { return o_.check_every > 0 && o_.device_loop; }

  // The block's rows of a tensor [1 or B, …].
  at::Tensor of(const at::Tensor& tensor) const {
    const bool whole = rows_.count() == batch_ || tensor.size(0) == 1;
    return whole ? tensor : tensor.narrow(0, rows_.first, rows_.count());
  }

  // What a callback returned: a tensor like b, made contiguous.
  at::Tensor apply(const RowOperator& callback, const char* name, const at::Tensor& argument) const {
    const bool counted = !argument.is_inference();  // inference tensors have no version
    const int64_t version = counted ? argument._version() : 0;
    at::Tensor result = callback(argument, rows_);
    TORCH_CHECK_VALUE(!counted || argument._version() == version, "cg: ", name,
                      " must leave its argument as it is, but has written to it");
    TORCH_CHECK_TYPE(result.defined(), "cg: ", name, " returned no tensor");
    result = result.detach().contiguous();
    check_like("cg", name, result, rows_.count() == batch_ ? "b" : "b[rows]", b_);
    return result;
  }
  at::Tensor precondition() const { return apply(o_.preconditioner, "preconditioner", r_); }

  // Waits for the device.
  bool at_work() const {
    const at::Tensor rows = o_.shifts.defined() ? shift_state_.select(2, kZeta).ne(0) : status_.ge(kIterating);
    return rows.any().item<bool>();
  }

  RowRange rows_;
  int64_t batch_;
  CgOptions o_;
  std::optional<at::Tensor> inverse_diagonal_;
  at::Tensor b_, x_, r_, p_, best_, state_, status_, iterations_;
  at::Tensor coefficients_;                             // [m, rows, 2]; undefined: not asked for
  at::Tensor sigma_, shift_x_, shift_p_, shift_state_;  // undefined: no shifts
};

void Block::solve(const RowOperator& hvp) {
  // r = b − A x0,  z = M r,  p = z. From x = 0 without M that is r = p = b, and stays b until the first step.
  const bool from_b = !o_.x0 && !o_.preconditioner && !inverse_diagonal_ && !looks_on_device() && o_.max_iterations > 0;
  std::optional<at::Tensor> hx;
  if (o_.x0) hx = apply(hvp, "hvp", x_);
  if (from_b) {
    call<cg_begin_>("imaml_ext::cg_begin_", b_, hx, o_.shift, inverse_diagonal_, o_.rtol, o_.atol, std::nullopt,
                    std::nullopt, std::nullopt, state_, status_, iterations_, /*update_direction=*/true);
  } else {
    call<cg_begin_>("imaml_ext::cg_begin_", b_, hx, o_.shift, inverse_diagonal_, o_.rtol, o_.atol, x_, r_, p_, state_,
                    status_, iterations_, /*update_direction=*/!o_.preconditioner);
  }
  if (o_.preconditioner && o_.max_iterations > 0) {
    call<cg_direction_>("imaml_ext::cg_direction_", precondition(), std::nullopt, x_, r_, p_, state_, status_);
  }

  if (looks_on_device()) {
    iterate_on_device(hvp);
    return;
  }
  for (int64_t k = 0; k < o_.max_iterations; ++k) {
    const bool first = from_b && k == 0;
    const bool last = k + 1 == o_.max_iterations;
    if (o_.check_every > 0 && k % o_.check_every == 0 && !at_work()) {
      if (first) x_.zero_();  // what the first step would have done
      break;
    }
    iterate(hvp, first, last);
    if (coefficients_.defined()) coefficients_.select(0, k).copy_(state_.narrow(1, kAlpha, 2));
    if (sigma_.defined()) {
      call<cg_shifts_step_>("imaml_ext::cg_shifts_step_", last ? std::nullopt : std::optional(r_), state_, sigma_,
                            shift_x_, shift_p_, shift_state_, last);
    }
  }
}

void Block::iterate(const RowOperator& hvp, bool first, bool last) {
  const at::Tensor hp = apply(hvp, "hvp", first ? b_ : p_);
  // A callable preconditioner stands between the new residual and the new direction.
  call<cg_step_>("imaml_ext::cg_step_", hp, b_, o_.shift, inverse_diagonal_, x_, r_, p_, best_, state_, status_,
                 iterations_, /*update_direction=*/!o_.preconditioner, first, last);
  if (o_.preconditioner && !last) {
    call<cg_direction_>("imaml_ext::cg_direction_", precondition(), std::nullopt, x_, r_, p_, state_, status_);
  }
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
  TORCH_CHECK_VALUE(static_cast<bool>(hvp), "cg: hvp must be callable, got an empty function");
  const at::Tensor b = b_in.detach().contiguous();
  check_rows("cg", "b", b);
  const CgOptions o = completed(options, b);

  const int64_t batch = b.size(0);
  CgResult result;
  result.x = at::empty_like(b);
  result.status = at::empty({batch}, b.options().dtype(at::kInt));
  result.iterations = at::empty_like(result.status);
  const auto wide = b.options().dtype(at::kDouble);
  Kept kept{at::empty({batch, kRowStateWidth}, wide), {}, {}};
  if (o.lanczos) kept.coefficients = at::zeros({o.max_iterations, batch, 2}, wide);
  if (o.shifts.defined()) {
    result.shifted = ShiftedSystems{at::zeros({batch, o.shifts.size(1), b.size(1)}, b.options()), {}};
    kept.shift_state = at::zeros({batch, o.shifts.size(1), kShiftStateWidth}, wide);
    kept.shift_state.select(2, kZeta).fill_(1.0);
  }

  const int64_t size = o.rows_per_block > 0 ? std::min(o.rows_per_block, batch) : batch;
  WorkVectors work(size, b);
  RowRange rows;
  do {
    rows = {rows.last, std::min(rows.last + size, batch)};
    Block(rows, o, b, work, result, kept).solve(hvp);
  } while (rows.last < batch);
  work.done();

  // A row still at work has spent its iterations.
  result.status.masked_fill_(result.status.ge(kIterating), kMaxIterations);
  result.residual_norm = kept.state.select(1, kResidual).clone(at::MemoryFormat::Contiguous);
  if (o.lanczos) result.lanczos = lanczos_tables(kept.coefficients);
  if (result.shifted) result.shifted->iterations = kept.shift_state.select(2, kSteps).to(at::kInt);
  return result;
}

}  // namespace imaml_ext
