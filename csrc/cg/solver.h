// Batched conjugate gradients over a callback: the loop. Usable from C++ as it stands and from Python through
// bindings.cpp (imaml_ext.cg).
//
// One system a row: (H_b + diag(shift)) x_b = b_b, with H touched only through `hvp(p) -> H p`, [B, N] -> [B, N], row b
// of the result depending on row b of p alone; p is not to be kept or written to: without x0 and preconditioner the
// first one is b itself. Between two calls of `hvp` everything is one op on the device of `b`; nothing is read back
// unless check_every asks for it.
//
// With rows_per_block the batch is solved in blocks of rows, one after the other and each to its end, so that the
// vectors of a block stay in the cache: `hvp(p, rows) -> H p` then sees one block. Rows being independent, every one
// has the bits that it has in the whole batch.
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

struct CgOptions {
  at::Tensor shift;              // [1 or B, 1 or N], float32 (float64 beside float64 vectors); undefined: none
  std::optional<at::Tensor> x0;  // [B, N], dtype and device of b
  int64_t max_iterations = 5;    // calls of hvp, beside the one that a warm start needs
  at::Tensor rtol;               // [1 or B] float64; undefined: 1e-5
  at::Tensor atol;               // [1 or B] float64; undefined: 0
  at::Tensor inverse_diagonal;   // [1 or B, 1 or N], the type of shift: z = inverse_diagonal ∘ r; undefined: none
  RowOperator preconditioner;    // z = M r; empty: none
  int64_t check_every = 0;       // k > 0: look every k iterations whether all rows are done; 0: never look
  // For check_every > 0 where the host cannot look: runs `body` as long as the bool tensor `flag` on the device, which
  // body sets anew, is true. Empty: inside a CUDA graph that torch captures, a while node of it; else the host looks.
  std::function<void(const at::Tensor& flag, const std::function<void()>& body)> device_loop;
  int64_t rows_per_block = 0;  // k > 0: solve k rows at a time; 0: all of them together
  bool lanczos = false;        // keep the Lanczos coefficients
  // [B, J] float64, σ ≥ 0: solves A + σ too, without a product of its own (cg/shift.h). Not with x0 or a
  // preconditioner. With check_every the solve ends when no shifted system follows any more, whether the rows have
  // measured or not.
  at::Tensor shifts;
};

// The Lanczos tridiagonal of each row: steps × steps leading entries of T, and 0 beyond (cg/lanczos.h).
struct LanczosTables {
  at::Tensor diagonal;      // [B, max_iterations] float64
  at::Tensor off_diagonal;  // [B, max_iterations − 1] float64
  at::Tensor steps;         // [B] int32
};

// What the shifted systems were when they ceased to follow. No residual of them has been measured.
struct ShiftedSystems {
  at::Tensor x;           // [B, J, N]
  at::Tensor iterations;  // [B, J] int32
};

struct CgResult {
  at::Tensor x;              // [B, N]
  at::Tensor status;         // [B] int32, the first four of RowStatus
  at::Tensor iterations;     // [B] int32, conjugate-gradient steps taken
  at::Tensor residual_norm;  // [B] float64, ‖b − A x‖; NaN where nothing has measured it
  std::optional<LanczosTables> lanczos;
  std::optional<ShiftedSystems> shifted;
};

// Throws c10::ValueError / c10::TypeError for arguments that do not fit together (see CgOptions), and passes on
// whatever `hvp` and `preconditioner` throw.
__attribute__((visibility("default"))) CgResult cg(const RowOperator& hvp, const at::Tensor& b,
                                                   const CgOptions& options = {});

}  // namespace imaml_ext
