// Who works on which piece of which row, and how the sums of pieces are added: so that no bit depends on the number of
// threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/cpu/kernels.h"
#include "common/row.h"

namespace imaml_ext {

enum class Sweep { kForward, kBackward };

// Sums: a double, or a structure of doubles.
template <typename Sums>
void add(Sums& to, const Sums& part) {
  static_assert(std::is_trivially_copyable_v<Sums> && sizeof(Sums) % sizeof(double) == 0);
  constexpr size_t kCount = sizeof(Sums) / sizeof(double);
  double totals[kCount], parts[kCount];
  std::memcpy(totals, &to, sizeof(Sums));
  std::memcpy(parts, &part, sizeof(Sums));
  for (size_t k = 0; k < kCount; ++k) totals[k] += parts[k];
  std::memcpy(&to, totals, sizeof(Sums));
}

// Calls work(begin, end) for every piece of a row. A pass that sweeps against the one before it begins with what that
// one has left in the cache.
template <typename Work>
void each_piece(int64_t cols, bool split_row, const Work& work, Sweep sweep = Sweep::kForward) {
  const auto pieces = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t k = sweep == Sweep::kForward ? i : first + last - 1 - i;
      work(k * kPiece, std::min((k + 1) * kPiece, cols));
    }
  };
  if (split_row) {
    at::parallel_for(0, pieces_of(cols), 1, pieces);
  } else {
    pieces(0, pieces_of(cols));
  }
}

// The sums that pass(begin, end) gives, over the whole row: added up in the order of the pieces.
template <typename Pass>
auto sum_of_pieces(int64_t cols, bool split_row, const Pass& pass, Sweep sweep = Sweep::kForward) {
  if (cols <= kPiece) return pass(int64_t{0}, cols);  // a short row is not worth the memory
  using Sums = decltype(pass(0, cols));
  std::vector<Sums> sums(pieces_of(cols));
  each_piece(cols, split_row, [&](int64_t begin, int64_t end) { sums[begin / kPiece] = pass(begin, end); }, sweep);
  Sums total{};
  for (const Sums& part : sums) add(total, part);
  return total;
}

// The sums that a solve begins with, by sums(b_scale, r_scale): again with scales where float64 squares have left the
// range of numbers.
template <typename T, typename Sums>
BeginSums start_sums(double& b_scale, double& r_scale, const Sums& sums) {
  const BeginSums plain = sums(1.0, 1.0);
  b_scale = r_scale = 1.0;
  if (!std::is_same_v<T, double>) return plain;
  b_scale = row_scale_of_sum(plain.bb), r_scale = row_scale_of_sum(plain.rr);
  return b_scale == 1.0 && r_scale == 1.0 ? plain : sums(b_scale, r_scale);
}

// Short rows go through each phase of an op together: what one of them waits for, a sum or a quotient, another needs
// not.
constexpr int64_t kTogether = 16;
inline int64_t rows_together(int64_t cols) { return cols <= 64 ? kTogether : 1; }

// Calls work(first, last, split_row) for rows that go together. Many rows: a thread takes whole rows, which stay in its
// cache from pass to pass; the last first, because a callback that has gone through them in order has left the last in
// the cache, and begins with the first again. Few rows: threads share each row.
template <typename RowWork>
void over_rows(int64_t rows, int64_t cols, const RowWork& work) {
  const int64_t threads = at::get_num_threads();
  if (rows == 0) return;
  if (rows >= threads || pieces_of(cols) < 2) {
    const int64_t grain = std::max<int64_t>(1, 2 * kPiece / std::max<int64_t>(cols, 1));
    at::parallel_for(0, rows, grain, [&](int64_t first, int64_t end) {
      for (int64_t last = end; last > first; last -= rows_together(cols)) {
        work(std::max(first, last - rows_together(cols)), last, /*split_row=*/false);
      }
    });
  } else {
    for (int64_t row = 0; row < rows; ++row) work(row, row + 1, /*split_row=*/true);
  }
}

}  // namespace imaml_ext
