// What every solver over a callback takes and returns: its operator, its options, its result.
#pragma once

#include <ATen/core/Tensor.h>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <type_traits>
#include <utility>

namespace imaml_ext {

// The rows first, …, last − 1 of the batch.
struct RowRange {
  int64_t first = 0;
  int64_t last = 0;
  int64_t count() const { return last - first; }
};

// p -> H p. A function of p, or of p and the rows of the batch that p has.
class RowOperator {
 public:
  RowOperator() = default;
  RowOperator(std::nullptr_t) {}

  template <typename F>
    requires(!std::same_as<std::remove_cvref_t<F>, RowOperator> &&
             (std::invocable<F&, const at::Tensor&> || std::invocable<F&, const at::Tensor&, RowRange>))
  RowOperator(F function) {
    if constexpr (std::constructible_from<bool, const F&>) {  // an empty std::function stays empty
      if (!static_cast<bool>(function)) return;
    }
    if constexpr (std::invocable<F&, const at::Tensor&, RowRange>) {
      call_ = std::move(function);
    } else {
      call_ = [function = std::move(function)](const at::Tensor& p, RowRange) mutable { return function(p); };
    }
  }

  explicit operator bool() const { return static_cast<bool>(call_); }
  at::Tensor operator()(const at::Tensor& p, RowRange rows = {}) const { return call_(p, rows); }

 private:
  std::function<at::Tensor(const at::Tensor&, RowRange)> call_;
};

// loop(flag, body) runs `body` as long as `flag` is true: a bool tensor of no dimension, which the body sets anew.
using DeviceLoop = std::function<void(const at::Tensor& flag, const std::function<void()>& body)>;

struct SolveOptions {
  at::Tensor shift;              // [1 or B, 1 or N], float32 (float64 beside float64 vectors); undefined: none
  std::optional<at::Tensor> x0;  // [B, N], dtype and device of b
  int64_t max_iterations = 5;    // calls of hvp, beside the one that a warm start needs
  at::Tensor rtol;               // [1 or B] float64; undefined: 1e-5
  at::Tensor atol;               // [1 or B] float64; undefined: 0
  int64_t check_every = 0;       // k > 0: look every k iterations whether all rows are done; 0: never look
  int64_t rows_per_block = 0;    // k > 0: solve k rows at a time; 0: all of them together
  // For check_every > 0 where the host cannot look. Empty: inside a CUDA graph that torch captures, a while node of it;
  // else the host looks.
  DeviceLoop device_loop;
};

struct SolveResult {
  at::Tensor x;              // [B, N]
  at::Tensor status;         // [B] int32, a RowStatus below kIterating
  at::Tensor iterations;     // [B] int32, steps taken
  at::Tensor residual_norm;  // [B] float64, ‖b − A x‖; NaN where nothing has measured it
};

// The tridiagonal matrix T = Vᵀ A V of a row's first Krylov space, whose vectors begin with r / ‖r‖, r = b − A x0.
struct Tridiagonal {
  at::Tensor diagonal;      // [B, max_iterations] float64; 0 from `steps` on
  at::Tensor off_diagonal;  // [B, max_iterations − 1] float64
  at::Tensor steps;         // [B] int32, the order of T
};

}  // namespace imaml_ext
