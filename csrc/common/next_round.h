// The op next_round_ on plain pointers, checked before: what a device's code sees. It is what a loop on the device
// asks before each of its rounds (device_loop.h).
#pragma once

#include <cstdint>

#include "common/device.h"

namespace imaml_ext {

struct NextRound {
  int64_t rows = 0;
  const int32_t* status = nullptr;  // [B]
  int64_t at_work = 0;              // the least status of a row that is
  int64_t* left = nullptr;          // ← left − 1
  bool* again = nullptr;            // ← left ≥ 0 and some row is at work
};

void next_round(OnCpu, const NextRound& a);
void next_round(OnCuda, const NextRound& a);

}  // namespace imaml_ext
