#include "common/solve.h"

#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/Exception.h>

#include <string>

#include "common/checks.h"
#include "common/device_loop.h"
#include "common/row.h"

namespace imaml_ext {
namespace {

thread_local at::Tensor kept;

// Whether autograd may save it and every mode may see it: not what inference mode or a tensor mode has made.
bool is_plain(const at::Tensor& tensor) {
  return tensor.device().is_cpu() && !tensor.is_inference() && !c10::InferenceMode::is_enabled() &&
         !tensor.key_set().has(c10::DispatchKey::Python) && !c10::impl::dispatch_mode_enabled();
}

}  // namespace

WorkVectors::WorkVectors(int64_t count, int64_t rows, const at::Tensor& b) {
  const bool fits = kept.defined() && is_plain(b) && kept.scalar_type() == b.scalar_type() && kept.size(0) == count &&
                    kept.size(1) == rows && kept.size(2) == b.size(1);
  all_ = fits ? std::exchange(kept, at::Tensor()) : at::empty({count, rows, b.size(1)}, b.options());
}

void WorkVectors::done() {
  if (is_plain(all_) && all_.storage().use_count() == 1) kept = std::move(all_);
}

at::Tensor checked_rhs(const char* solver, const RowOperator& hvp, const at::Tensor& b) {
  TORCH_CHECK_VALUE(static_cast<bool>(hvp), solver, ": A must be callable, got an empty function");
  at::Tensor plain = b.detach().contiguous();
  check_rows(solver, "b", plain);
  return plain;
}

void complete_stopping(const char* solver, int64_t max_iterations, int64_t check_every, at::Tensor& rtol,
                       at::Tensor& atol, const at::Tensor& b) {
  TORCH_CHECK_VALUE(max_iterations >= 0, solver, ": max_iterations must be at least 0, got ", max_iterations);
  TORCH_CHECK_VALUE(check_every >= 0, solver, ": check_every must be at least 0, got ", check_every);
  const auto wide = b.options().dtype(at::kDouble);
  if (!rtol.defined()) rtol = at::full({1}, 1e-5, wide);
  if (!atol.defined()) atol = at::zeros({1}, wide);
  check_tolerance(solver, "rtol", rtol, b);
  check_tolerance(solver, "atol", atol, b);
}

void complete(const char* solver, SolveOptions& o, const at::Tensor& b) {
  complete_stopping(solver, o.max_iterations, o.check_every, o.rtol, o.atol, b);
  TORCH_CHECK_VALUE(o.rows_per_block >= 0, solver, ": rows_per_block must be at least 0, got ", o.rows_per_block);
  if (!o.shift.defined()) o.shift = at::zeros({1, 1}, b.options().dtype(compute_type(b.scalar_type())));
  check_coefficient(solver, "shift", o.shift, b);
  if (o.x0) {
    o.x0 = o.x0->detach().contiguous();
    check_like(solver, "x0", *o.x0, "b", b);
  }
  if (o.check_every > 0 && !o.device_loop) o.device_loop = captured_loop(b);
}

SolveResult empty_result(const at::Tensor& b) {
  SolveResult result;
  result.x = at::empty_like(b);
  result.status = at::empty({b.size(0)}, b.options().dtype(at::kInt));
  result.iterations = at::empty_like(result.status);
  return result;
}

void finish(SolveResult& result, const at::Tensor& state, int64_t residual_column) {
  result.status.masked_fill_(result.status.ge(kIterating), kMaxIterations);
  result.residual_norm = state.select(1, residual_column).clone(at::MemoryFormat::Contiguous);
}

bool any_at_work(const at::Tensor& status) {
  if (!status.device().is_cpu() || status.key_set().has(c10::DispatchKey::Python)) {
    return status.ge(kIterating).any().item<bool>();
  }
  const int32_t* rows = status.const_data_ptr<int32_t>();  // without the three ops, which cost as much as a small step
  return std::any_of(rows, rows + status.numel(), row_is_active);
}

at::Tensor RowBlock::of(const at::Tensor& tensor) const {
  return is_whole() || tensor.size(0) == 1 ? tensor : tensor.narrow(0, rows.first, rows.count());
}

at::Tensor checked_product(const char* solver, const RowOperator& callback, const char* name,
                           const at::Tensor& argument, RowRange rows, const char* subject, const char* like_name,
                           const at::Tensor& like) {
  const bool counted = !argument.is_inference();  // inference tensors have no version
  const int64_t version = counted ? argument._version() : 0;
  at::Tensor result = callback(argument, rows);
  TORCH_CHECK_VALUE(!counted || argument._version() == version, solver, ": ", name,
                    " must leave its argument as it is, but has written to it");
  TORCH_CHECK_TYPE(result.defined(), solver, ": ", name, " returned no tensor");
  result = result.detach().contiguous();
  check_like(solver, subject, result, like_name, like);
  return result;
}

at::Tensor RowBlock::apply(const RowOperator& callback, const char* name, const at::Tensor& argument,
                           const at::Tensor& b) const {
  const std::string subject = std::string("what ") + name + " returns";
  return checked_product(solver, callback, name, argument, rows, subject.c_str(), is_whole() ? "b" : "b[rows]", b);
}

}  // namespace imaml_ext
