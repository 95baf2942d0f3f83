// A coefficient of a task or of a parameter (shift, λ, η): a number, one per row, one per column, or one per element,
// read through two strides of which either may be zero. Nothing is ever expanded in memory.
#pragma once

#include <cstdint>

namespace imaml_ext {

template <typename C>
struct Coefficient {
  const C* data = nullptr;  // null: absent
  int64_t row_stride = 0;   // 0: the same for every row
  int64_t col_stride = 0;   // 0: the same along a row; else 1
};

}  // namespace imaml_ext
