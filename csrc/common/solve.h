// What the loops of the solvers have in common: how they call an op and a callback, their work vectors, their blocks
// of rows.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "common/solver.h"

namespace imaml_ext {

// Calls an op through the dispatcher: its name, and the function that says what it takes.
template <auto kOp, typename... Arguments>
void call(const char* name, Arguments&&... arguments) {
  using Signature = std::remove_pointer_t<decltype(kOp)>;
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  op.call(std::forward<Arguments>(arguments)...);
}

// The work vectors of the last solve on the CPU, kept by each thread for its next one: fresh memory of this size costs
// more in page faults than an iteration costs. (On CUDA the caching allocator does this.) The last of them is the one
// that a solve may never touch, and with it its pages.
class WorkVectors {
 public:
  WorkVectors(int64_t count, int64_t rows, const at::Tensor& b);
  // Not kept if a callback holds on to one of them: it would see the next solve.
  void done();
  at::Tensor operator()(int64_t which, int64_t rows) const { return all_.select(0, which).narrow(0, 0, rows); }

 private:
  at::Tensor all_;  // [count, rows, N]
};

// What a callback returns for `argument`: a tensor like `like`, made contiguous; `subject` is what messages call it.
at::Tensor checked_product(const char* solver, const RowOperator& callback, const char* name,
                           const at::Tensor& argument, RowRange rows, const char* subject, const char* like_name,
                           const at::Tensor& like);

// b without a graph and contiguous, and the options with what the caller has left out; validates all of them.
// `complete_stopping`: those alone that say when a loop stops.
at::Tensor checked_rhs(const char* solver, const RowOperator& hvp, const at::Tensor& b);
void complete_stopping(const char* solver, int64_t max_iterations, int64_t check_every, at::Tensor& rtol,
                       at::Tensor& atol, const at::Tensor& b);
void complete(const char* solver, SolveOptions& options, const at::Tensor& b);

// Memory for the result; and at the end, the status of rows still at work, and the residuals: a column of the state.
SolveResult empty_result(const at::Tensor& b);
void finish(SolveResult& result, const at::Tensor& state, int64_t residual_column);

// Whether any row [B] int32 is still at work. Waits for the device.
bool any_at_work(const at::Tensor& status);

// Some rows of a batch, which are solved together.
struct RowBlock {
  const char* solver;
  RowRange rows;
  int64_t batch;

  bool is_whole() const { return rows.count() == batch; }
  // Its rows of a tensor [1 or B, …].
  at::Tensor of(const at::Tensor& tensor) const;
  // What a callback returns for `argument`: a tensor like the block's rows of b, made contiguous.
  at::Tensor apply(const RowOperator& callback, const char* name, const at::Tensor& argument,
                   const at::Tensor& b) const;
};

// Calls solve(block, work) for the blocks of a batch, one after the other.
template <typename Solve>
void each_block(const char* solver, int64_t rows_per_block, int64_t work_vectors, const at::Tensor& b,
                const Solve& solve) {
  const int64_t batch = b.size(0);
  const int64_t size = rows_per_block > 0 ? std::min(rows_per_block, batch) : batch;
  WorkVectors work(work_vectors, size, b);
  RowRange rows;
  do {
    rows = {rows.last, std::min(rows.last + size, batch)};
    solve(RowBlock{solver, rows, batch}, work);
  } while (rows.last < batch);
  work.done();
}

}  // namespace imaml_ext
