// Validated arguments of the conjugate-gradient ops, as plain pointers: what a kernel sees.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <limits>
#include <utility>

#include "cg/row.h"
#include "common/checks.h"
#include "common/coefficient.h"
#include "common/host_device.h"

namespace imaml_ext {

template <typename T>
struct CgArguments {
  using C = at::opmath_type<T>;  // float for bfloat16, float16, float32; double for float64
  int64_t rows = 0;
  int64_t cols = 0;
  const T* b = nullptr;   // [B, N]
  const T* hp = nullptr;  // [B, N]  H p (cg_begin_: H x0, or null)
  const T* z = nullptr;   // [B, N]  M r, where a callable made it
  T* x = nullptr;         // [B, N]
  T* r = nullptr;         // [B, N]
  T* p = nullptr;         // [B, N]
  Coefficient<C> shift;
  Coefficient<C> inverse_diagonal;
  const double* rtol = nullptr;  // [B] or one for all (stride 0)
  const double* atol = nullptr;
  int64_t rtol_stride = 0;
  int64_t atol_stride = 0;
  RowState* state = nullptr;      // [B]
  int32_t* status = nullptr;      // [B]
  int32_t* iterations = nullptr;  // [B]
  bool update_direction = true;   // make the next direction too (no callable preconditioner)
  bool first = false;             // cg_step_: x is 0 and r and p are b, in no memory but that of b yet
  bool last = false;              // cg_step_: nobody reads r and p afterwards

  // Where r and p are read.
  IMAML_HOST_DEVICE const T* r_now() const { return first ? b : r; }
  IMAML_HOST_DEVICE const T* p_now() const { return first ? b : p; }

  static constexpr double unit_roundoff() { return 0.5 * static_cast<double>(std::numeric_limits<T>::epsilon()); }
  static constexpr double largest() { return static_cast<double>(std::numeric_limits<T>::max()); }
};

// The tensors of one solve, as the ops receive them; one that an op does not use stays undefined.
struct CgTensors {
  at::Tensor b, hp, z, shift, inverse_diagonal, rtol, atol, x, r, p, state, status, iterations;
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

}  // namespace imaml_ext
