// The conjugate-gradient ops: their schemas, their checks and their registration, for every device.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <utility>

#include "cg/arguments.h"
#include "cg/ops.h"
#include "common/checks.h"
#include "common/on_device.h"

namespace imaml_ext {
namespace {

// The tensors of one solve, as the ops receive them; one that an op does not use stays undefined.
struct CgTensors {
  at::Tensor b, hp, z, shift, inverse_diagonal, rtol, atol, x, r, p, best, state, status, iterations;
  bool update_direction = true, first = false, last = false;

  // The only place that validates. Each failure names the op and the argument. Returns the vectors' dtype.
  at::ScalarType check(const char* op) const;

  template <typename T>
  CgArguments<T> arguments() const;

 private:
  // The tensor that says how many rows and columns there are, and its name.
  std::pair<const char*, at::Tensor> leader() const;
};

template <typename T>
CgArguments<T> CgTensors::arguments() const {
  using C = typename CgArguments<T>::C;
  CgArguments<T> a;
  const at::Tensor like = leader().second;
  a.rows = like.size(0);
  a.cols = like.size(1);
  if (b.defined()) a.b = b.const_data_ptr<T>();
  if (hp.defined()) a.hp = hp.const_data_ptr<T>();
  if (z.defined()) a.z = z.const_data_ptr<T>();
  if (x.defined()) a.x = x.mutable_data_ptr<T>();
  if (r.defined()) a.r = r.mutable_data_ptr<T>();
  if (p.defined()) a.p = p.mutable_data_ptr<T>();
  if (best.defined()) a.best = best.mutable_data_ptr<T>();
  if (shift.defined()) a.shift = as_coefficient<C>(shift);
  if (inverse_diagonal.defined()) a.inverse_diagonal = as_coefficient<C>(inverse_diagonal);
  if (rtol.defined()) {
    a.rtol = rtol.const_data_ptr<double>();
    a.atol = atol.const_data_ptr<double>();
    a.rtol_stride = rtol.size(0) == 1 ? 0 : 1;
    a.atol_stride = atol.size(0) == 1 ? 0 : 1;
  }
  a.state = reinterpret_cast<RowState*>(state.mutable_data_ptr<double>());
  a.status = status.mutable_data_ptr<int32_t>();
  if (iterations.defined()) a.iterations = iterations.mutable_data_ptr<int32_t>();
  a.update_direction = update_direction;
  a.first = first;
  a.last = last;
  return a;
}

std::pair<const char*, at::Tensor> CgTensors::leader() const {
  if (b.defined()) return {"b", b};
  return {"r", r};
}

at::ScalarType CgTensors::check(const char* op) const {
  const auto [leader_name, like] = leader();
  check_rows(op, leader_name, like);
  const std::pair<const char*, const at::Tensor&> vectors[] = {{"hp", hp}, {"z", z}, {"x", x},
                                                               {"r", r},   {"p", p}, {"best", best}};
  for (const auto& [name, vector] : vectors) {
    if (vector.defined()) check_like(op, name, vector, leader_name, like);
  }
  const bool all = x.defined() && r.defined() && p.defined();
  const bool none = !x.defined() && !r.defined() && !p.defined() && !hp.defined() && !inverse_diagonal.defined();
  TORCH_CHECK_VALUE(all || none, op,
                    ": x, r and p must be given together, or none of them where there is no hx and no "
                    "inverse_diagonal, got ",
                    x.defined() ? "x" : "no x", ", ", r.defined() ? "r" : "no r", ", ", p.defined() ? "p" : "no p");
  if (shift.defined()) check_coefficient(op, "shift", shift, like);
  if (inverse_diagonal.defined()) check_coefficient(op, "inverse_diagonal", inverse_diagonal, like);
  const int64_t rows = like.size(0);
  for (const auto& [name, tolerance] : {std::pair{"rtol", rtol}, std::pair{"atol", atol}}) {
    if (tolerance.defined()) check_tolerance(op, name, tolerance, like);
  }
  check_table(op, "state", state, at::kDouble, {rows, kRowStateWidth}, like);
  check_table(op, "status", status, at::kInt, {rows}, like);
  if (iterations.defined()) check_table(op, "iterations", iterations, at::kInt, {rows}, like);
  return like.scalar_type();
}

// Validates, then calls work(device, arguments) in the vectors' type.
template <typename Work>
void run(const char* op, const CgTensors& tensors, const Work& work) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, tensors.check(op), "imaml_ext", [&] {
    auto arguments = tensors.arguments<scalar_t>();
    if (arguments.rows == 0) return;
    on_device_of(tensors.state, arguments, work);
  });
}

}  // namespace

void cg_begin_(const at::Tensor& b, const std::optional<at::Tensor>& hx, const at::Tensor& shift,
               const std::optional<at::Tensor>& inverse_diagonal, const at::Tensor& rtol, const at::Tensor& atol,
               const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& r,
               const std::optional<at::Tensor>& p, at::Tensor& state, at::Tensor& status, at::Tensor& iterations,
               bool update_direction) {
  CgTensors t;
  t.b = b, t.hp = hx.value_or(at::Tensor()), t.shift = shift, t.rtol = rtol, t.atol = atol;
  t.inverse_diagonal = inverse_diagonal.value_or(at::Tensor());
  t.x = x.value_or(at::Tensor()), t.r = r.value_or(at::Tensor()), t.p = p.value_or(at::Tensor());
  t.state = state, t.status = status, t.iterations = iterations, t.update_direction = update_direction;
  run("cg_begin_", t, [](auto device, const auto& a) { cg_begin(device, a); });
}

void cg_direction_(const std::optional<at::Tensor>& z, const std::optional<at::Tensor>& inverse_diagonal,
                   const at::Tensor& x, const at::Tensor& r, at::Tensor& p, at::Tensor& state, at::Tensor& status) {
  CgTensors t;
  t.z = z.value_or(at::Tensor()), t.inverse_diagonal = inverse_diagonal.value_or(at::Tensor());
  t.x = x, t.r = r, t.p = p, t.state = state, t.status = status;
  run("cg_direction_", t, [](auto device, const auto& a) { cg_direction(device, a); });
}

void cg_step_(const at::Tensor& hp, const at::Tensor& b, const at::Tensor& shift,
              const std::optional<at::Tensor>& inverse_diagonal, at::Tensor& x, at::Tensor& r, at::Tensor& p,
              at::Tensor& best, at::Tensor& state, at::Tensor& status, at::Tensor& iterations, bool update_direction,
              bool first, bool last) {
  CgTensors t;
  t.hp = hp, t.b = b, t.shift = shift, t.inverse_diagonal = inverse_diagonal.value_or(at::Tensor());
  t.x = x, t.r = r, t.p = p, t.best = best, t.state = state, t.status = status, t.iterations = iterations;
  t.update_direction = update_direction && !last, t.first = first, t.last = last;
  run("cg_step_", t, [](auto device, const auto& a) { cg_step(device, a); });
}

void cg_shifts_step_(const std::optional<at::Tensor>& r, const at::Tensor& state, const at::Tensor& sigma,
                     at::Tensor& x, at::Tensor& p, at::Tensor& shift_state, bool last) {
  const char* op = "cg_shifts_step_";
  TORCH_CHECK_VALUE(x.dim() == 3 && x.is_contiguous(), op, ": x must be contiguous of shape [B, J, N], got ", x.sizes(),
                    " with strides ", x.strides());
  const int64_t rows = x.size(0), shifts = x.size(1), cols = x.size(2);
  check_rows(op, "x", x.view({rows * shifts, cols}));
  TORCH_CHECK_VALUE(r || last, op, ": r must be given unless this is the last step, got none");
  if (r) check_table(op, "r", *r, x.scalar_type(), {rows, cols}, x);
  check_table(op, "p", p, x.scalar_type(), x.sizes(), x);
  check_table(op, "state", state, at::kDouble, {rows, kRowStateWidth}, x);
  check_table(op, "sigma", sigma, at::kDouble, {rows, shifts}, x);
  check_table(op, "shift_state", shift_state, at::kDouble, {rows, shifts, kShiftStateWidth}, x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "imaml_ext", [&] {
    CgShiftsArguments<scalar_t> a;
    a.rows = rows, a.shifts = shifts, a.cols = cols;
    if (r) a.r = r->const_data_ptr<scalar_t>();
    a.state = reinterpret_cast<const RowState*>(state.const_data_ptr<double>());
    a.sigma = sigma.const_data_ptr<double>();
    a.x = x.mutable_data_ptr<scalar_t>();
    a.p = p.mutable_data_ptr<scalar_t>();
    a.shift_state = reinterpret_cast<ShiftState*>(shift_state.mutable_data_ptr<double>());
    a.last = last;
    if (x.numel() == 0) return;
    on_device_of(x, a, [](auto device, const auto& arguments) { cg_shifts_step(device, arguments); });
  });
}

namespace {

void register_ops(torch::Library& m) {
  m.impl("cg_begin_", &cg_begin_);
  m.impl("cg_direction_", &cg_direction_);
  m.impl("cg_step_", &cg_step_);
  m.impl("cg_shifts_step_", &cg_shifts_step_);
}

}  // namespace

// Conjugate gradients. state [B, 12] float64 and status [B] int32 live on the device of the vectors; a row's fields
// are those of RowState and RowStatus in row.h. Coefficients have shape [1 or B, 1 or N].
//
// A solve from x = 0 with no preconditioner begins with r = p = b. cg_begin_ without x, r and p leaves it at that,
// and cg_step_ with `first` makes all three from b. With `last` it leaves r and p as they are: only x, ‖r‖ and the
// status come of it. `best` is memory for an iterate that a row may come back to: cg_step_ alone reads and writes it.
TORCH_LIBRARY_FRAGMENT(imaml_ext, m) {
  m.def(
      "cg_begin_(Tensor b, Tensor? hx, Tensor shift, Tensor? inverse_diagonal, Tensor rtol, Tensor atol, "
      "Tensor(a!)? x, Tensor(b!)? r, Tensor(c!)? p, Tensor(d!) state, Tensor(e!) status, Tensor(f!) iterations, "
      "bool update_direction=True) -> ()");
  m.def(
      "cg_direction_(Tensor? z, Tensor? inverse_diagonal, Tensor x, Tensor r, Tensor(a!) p, Tensor(b!) state, "
      "Tensor(c!) status) -> ()");
  m.def(
      "cg_step_(Tensor hp, Tensor b, Tensor shift, Tensor? inverse_diagonal, Tensor(a!) x, Tensor(b!) r, "
      "Tensor(c!) p, Tensor(d!) best, Tensor(e!) state, Tensor(f!) status, Tensor(g!) iterations, "
      "bool update_direction=True, bool first=False, bool last=False) -> ()");
  // After cg_step_, for J shifted systems per row; shift_state [B, J, 5] is that of ShiftState in shift.h.
  m.def(
      "cg_shifts_step_(Tensor? r, Tensor state, Tensor sigma, Tensor(a!) x, Tensor(b!) p, Tensor(c!) shift_state, "
      "bool last=False) -> ()");
}
IMAML_REGISTER(register_ops)

}  // namespace imaml_ext
