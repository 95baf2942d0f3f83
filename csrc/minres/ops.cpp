// The MINRES ops: their schemas, their checks and their registration, for every device.
#include "minres/ops.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <initializer_list>
#include <utility>

#include "common/checks.h"
#include "common/on_device.h"
#include "minres/arguments.h"

namespace imaml_ext {
namespace {

using Named = std::pair<const char*, const at::Tensor&>;

// Each failure names the op and the argument.
void check(const char* op, const at::Tensor& b, const at::Tensor& shift, std::initializer_list<Named> vectors,
           const at::Tensor& state, const at::Tensor& status, const at::Tensor& iterations) {
  check_rows(op, "b", b);
  for (const auto& [name, vector] : vectors) {
    if (vector.defined()) check_like(op, name, vector, "b", b);
  }
  check_coefficient(op, "shift", shift, b);
  const int64_t rows = b.size(0);
  check_table(op, "state", state, at::kDouble, {rows, kMinresStateWidth}, b);
  check_table(op, "status", status, at::kInt, {rows}, b);
  check_table(op, "iterations", iterations, at::kInt, {rows}, b);
}

// What both ops have.
template <typename T>
MinresArguments<T> arguments(const at::Tensor& b, const at::Tensor& hv, const at::Tensor& shift, const at::Tensor& x,
                             const at::Tensor& best, const at::Tensor& state, const at::Tensor& status,
                             const at::Tensor& iterations) {
  MinresArguments<T> a;
  a.rows = b.size(0);
  a.cols = b.size(1);
  a.b = b.const_data_ptr<T>();
  if (hv.defined()) a.hp = hv.const_data_ptr<T>();
  a.x = x.mutable_data_ptr<T>();
  a.best = best.mutable_data_ptr<T>();
  a.shift = as_coefficient<typename MinresArguments<T>::C>(shift);
  a.state = reinterpret_cast<MinresState*>(state.mutable_data_ptr<double>());
  a.status = status.mutable_data_ptr<int32_t>();
  a.iterations = iterations.mutable_data_ptr<int32_t>();
  return a;
}

}  // namespace

void minres_begin_(const at::Tensor& b, const std::optional<at::Tensor>& hx, const at::Tensor& shift,
                   const at::Tensor& rtol, const at::Tensor& atol, at::Tensor& x, at::Tensor& v, at::Tensor& best,
                   at::Tensor& state, at::Tensor& status, at::Tensor& iterations) {
  const at::Tensor product = hx.value_or(at::Tensor());
  check("minres_begin_", b, shift, {{"hx", product}, {"x", x}, {"v", v}, {"best", best}}, state, status, iterations);
  check_tolerance("minres_begin_", "rtol", rtol, b);
  check_tolerance("minres_begin_", "atol", atol, b);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, b.scalar_type(), "imaml_ext", [&] {
    auto a = arguments<scalar_t>(b, product, shift, x, best, state, status, iterations);
    if (a.rows == 0) return;
    a.rtol = rtol.const_data_ptr<double>();
    a.atol = atol.const_data_ptr<double>();
    a.rtol_stride = rtol.size(0) == 1 ? 0 : 1;
    a.atol_stride = atol.size(0) == 1 ? 0 : 1;
    a.v = a.x;
    a.v_next = v.mutable_data_ptr<scalar_t>();
    on_device_of(b, a, [](auto device, const auto& on) { minres_begin(device, on); });
  });
}

void minres_step_(const at::Tensor& hv, const at::Tensor& b, const at::Tensor& shift, at::Tensor& x,
                  const at::Tensor& v, at::Tensor& v_next, const at::Tensor& q, at::Tensor& q_next, at::Tensor& best,
                  at::Tensor& state, at::Tensor& status, at::Tensor& iterations,
                  const std::optional<at::Tensor>& diagonal, const std::optional<at::Tensor>& off_diagonal, bool first,
                  bool last) {
  const char* const op = "minres_step_";
  check(op, b, shift,
        {{"hv", hv}, {"x", x}, {"v", v}, {"v_next", v_next}, {"q", q}, {"q_next", q_next}, {"best", best}}, state,
        status, iterations);
  TORCH_CHECK_VALUE(diagonal.has_value() == off_diagonal.has_value(), op,
                    ": diagonal and off_diagonal must be given together, got one of them");
  const int64_t rows = b.size(0);
  const int64_t coefficients = diagonal && diagonal->dim() == 2 ? diagonal->size(1) : 0;
  if (diagonal) {
    check_table(op, "diagonal", *diagonal, at::kDouble, {rows, coefficients}, b);
    check_table(op, "off_diagonal", *off_diagonal, at::kDouble, {rows, std::max<int64_t>(coefficients - 1, 0)}, b);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, b.scalar_type(), "imaml_ext", [&] {
    auto a = arguments<scalar_t>(b, hv, shift, x, best, state, status, iterations);
    if (a.rows == 0) return;
    a.v = v.const_data_ptr<scalar_t>();
    a.v_next = v_next.mutable_data_ptr<scalar_t>();
    a.q = q.const_data_ptr<scalar_t>();
    a.q_next = q_next.mutable_data_ptr<scalar_t>();
    if (diagonal) {
      a.diagonal = diagonal->mutable_data_ptr<double>();
      a.off_diagonal = off_diagonal->mutable_data_ptr<double>();
      a.coefficients = coefficients;
    }
    a.first = first, a.last = last;
    on_device_of(b, a, [](auto device, const auto& on) { minres_step(device, on); });
  });
}

namespace {

void register_ops(torch::Library& m) {
  m.impl("minres_begin_", &minres_begin_);
  m.impl("minres_step_", &minres_step_);
}

}  // namespace

// MINRES. state [B, 17] float64 and status [B] int32 live on the device of the vectors; a row's fields are those of
// MinresState and RowStatus. minres_begin_ makes v from b − A x (x is x0 where there is an hx, else it becomes 0).
//
// minres_step_ finds the last vector v₋ in v_next, and leaves the next one there; so it does with q₂ and q in q_next.
// The caller exchanges each pair between steps. With `first` v_next holds nothing yet; with `last` the next v is left
// out. The coefficients of the first Krylov space go to diagonal [B, m] and off_diagonal [B, m − 1].
TORCH_LIBRARY_FRAGMENT(imaml_ext, m) {
  m.def(
      "minres_begin_(Tensor b, Tensor? hx, Tensor shift, Tensor rtol, Tensor atol, Tensor(a!) x, Tensor(b!) v, "
      "Tensor(c!) best, Tensor(d!) state, Tensor(e!) status, Tensor(f!) iterations) -> ()");
  m.def(
      "minres_step_(Tensor hv, Tensor b, Tensor shift, Tensor(a!) x, Tensor v, Tensor(b!) v_next, Tensor q, "
      "Tensor(c!) q_next, Tensor(d!) best, Tensor(e!) state, Tensor(f!) status, Tensor(g!) iterations, "
      "Tensor(h!)? diagonal=None, Tensor(i!)? off_diagonal=None, bool first=False, bool last=False) -> ()");
}
IMAML_REGISTER(register_ops)

}  // namespace imaml_ext
