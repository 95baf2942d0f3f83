// The least-squares ops: their schemas, their checks and their registration, for every device.
#include "lsqr/ops.h"

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/on_device.h"
#include "lsqr/arguments.h"

namespace imaml_ext {
namespace {

// The first vector of an op says how many rows and columns there are; the others are like it.
template <typename... Vectors>
void check(const char* op, const at::Tensor& state, const at::Tensor& status, const char* leader_name,
           const at::Tensor& leader, const Vectors&... vectors) {
  check_rows(op, leader_name, leader);
  (check_like(op, vectors.first, vectors.second, leader_name, leader), ...);
  check_table(op, "state", state, at::kDouble, {leader.size(0), kLsqrStateWidth}, leader);
  check_table(op, "status", status, at::kInt, {leader.size(0)}, leader);
}

// Calls work(device, arguments) in the vectors' type, where `fill` has set what the op needs of the arguments.
template <typename Fill, typename Work>
void run(const at::Tensor& leader, const at::Tensor& state, const at::Tensor& status, const Fill& fill,
         const Work& work) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, leader.scalar_type(), "imaml_ext", [&] {
    LsqrArguments<scalar_t> a;
    a.rows = leader.size(0);
    a.cols = leader.size(1);
    a.state = reinterpret_cast<LsqrState*>(state.mutable_data_ptr<double>());
    a.status = status.mutable_data_ptr<int32_t>();
    fill(a);
    if (a.rows == 0) return;
    on_device_of(state, a, work);
  });
}

template <typename T>
const T* data_of(const at::Tensor& tensor, const T*) {
  return tensor.const_data_ptr<T>();
}
template <typename T>
T* data_of(const at::Tensor& tensor, T*) {
  return tensor.mutable_data_ptr<T>();
}

}  // namespace

void lsqr_begin_(const at::Tensor& y, const at::Tensor& rtol, const at::Tensor& atol, bool warm, at::Tensor& r,
                 at::Tensor& state, at::Tensor& status, at::Tensor& iterations) {
  check("lsqr_begin_", state, status, "y", y, std::pair{"r", r});
  check_tolerance("lsqr_begin_", "rtol", rtol, y);
  check_tolerance("lsqr_begin_", "atol", atol, y);
  check_table("lsqr_begin_", "iterations", iterations, at::kInt, {y.size(0)}, y);
  run(
      y, state, status,
      [&](auto& a) {
        a.y = data_of(y, a.y), a.r = data_of(r, a.r), a.warm = warm;
        a.rtol = rtol.const_data_ptr<double>(), a.rtol_stride = rtol.size(0) == 1 ? 0 : 1;
        a.atol = atol.const_data_ptr<double>(), a.atol_stride = atol.size(0) == 1 ? 0 : 1;
        a.iterations = iterations.mutable_data_ptr<int32_t>();
      },
      [](auto device, const auto& a) { lsqr_begin(device, a); });
}

void lsqr_residual_(const at::Tensor& q, const at::Tensor& y, at::Tensor& r, at::Tensor& state, at::Tensor& status) {
  check("lsqr_residual_", state, status, "y", y, std::pair{"q", q}, std::pair{"r", r});
  run(
      y, state, status, [&](auto& a) { a.q = data_of(q, a.q), a.y = data_of(y, a.y), a.r = data_of(r, a.r); },
      [](auto device, const auto& a) { lsqr_residual(device, a); });
}

void lsqr_direction_(const at::Tensor& t, const std::optional<at::Tensor>& shift, at::Tensor& x, at::Tensor& p,
                     at::Tensor& best, at::Tensor& state, at::Tensor& status, at::Tensor& iterations) {
  check("lsqr_direction_", state, status, "x", x, std::pair{"t", t}, std::pair{"p", p}, std::pair{"best", best});
  if (shift) check_coefficient("lsqr_direction_", "shift", *shift, x);
  check_table("lsqr_direction_", "iterations", iterations, at::kInt, {x.size(0)}, x);
  run(
      x, state, status,
      [&](auto& a) {
        a.t = data_of(t, a.t), a.x = data_of(x, a.x), a.p = data_of(p, a.p), a.best = data_of(best, a.best);
        if (shift) a.shift = as_coefficient<typename std::decay_t<decltype(a)>::C>(*shift);
        a.iterations = iterations.mutable_data_ptr<int32_t>();
      },
      [](auto device, const auto& a) { lsqr_direction(device, a); });
}

namespace {

void register_ops(torch::Library& m) {
  m.impl("lsqr_begin_", &lsqr_begin_);
  m.impl("lsqr_residual_", &lsqr_residual_);
  m.impl("lsqr_direction_", &lsqr_direction_);
}

}  // namespace

// Least squares. state [B, 21] float64 and status [B] int32 live on the device of the vectors; a row's fields are those
// of LsqrState in row.h. y, q and r are [B, M]; t, x, p and best are [B, N]; shift is [1 or B, 1 or N].
//
// lsqr_begin_ makes r of y. Mᵀr is then given to lsqr_direction_, which makes p; M p to lsqr_residual_, which makes r;
// and so on. `best` is memory for an iterate that a row may come back to: lsqr_direction_ alone reads and writes it.
TORCH_LIBRARY_FRAGMENT(imaml_ext, m) {
  m.def(
      "lsqr_begin_(Tensor y, Tensor rtol, Tensor atol, bool warm, Tensor(a!) r, Tensor(b!) state, Tensor(c!) status, "
      "Tensor(d!) iterations) -> ()");
  m.def("lsqr_residual_(Tensor q, Tensor y, Tensor(a!) r, Tensor(b!) state, Tensor(c!) status) -> ()");
  m.def(
      "lsqr_direction_(Tensor t, Tensor? shift, Tensor(a!) x, Tensor(b!) p, Tensor(c!) best, Tensor(d!) state, "
      "Tensor(e!) status, Tensor(f!) iterations) -> ()");
}
IMAML_REGISTER(register_ops)

}  // namespace imaml_ext
