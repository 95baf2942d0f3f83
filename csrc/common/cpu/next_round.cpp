#include "common/next_round.h"

#include <algorithm>

namespace imaml_ext {

void next_round(OnCpu, const NextRound& a) {
  const bool at_work = std::any_of(a.status, a.status + a.rows, [&](int64_t status) { return status >= a.at_work; });
  *a.left -= 1;
  *a.again = at_work && *a.left >= 0;
}

}  // namespace imaml_ext
