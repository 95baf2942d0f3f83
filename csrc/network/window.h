// Which pixels a tap of a weight carries where: by arithmetic, for host and device, and for a product as for its
// adjoint.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace imaml_ext {

// What a product does along one axis of an image: its output pixels are to + to_step · a for a < count; the taps that
// reach them are tap + tap_step · u for u < taps; that tap reads pixel from + from_step · a + from_tap · u of the
// `size` there are, and nothing where that lies outside.
struct Axis {
  int32_t count;
  int32_t to, to_step;
  int32_t taps, tap, tap_step;
  int32_t from, from_step, from_tap;
  int32_t size;
};

// Along one axis, y = stride · i + tap − padding for input pixel y and output pixel i. A linear layer is a window as
// large as the image, and so is its stride; a first layer that reads patches has a window of one pixel.
struct Window {
  int32_t kernel = 1;
  int32_t stride = 1;
  int32_t padding = 0;
  int32_t size = 1;   // pixels of the input
  int32_t count = 1;  // pixels of the output

  // out[i] = Σ_tap in[stride · i + tap − padding] W[tap]
  IMAML_HOST_DEVICE Axis forward() const { return {count, 0, 1, kernel, 0, 1, -padding, stride, 1, size}; }

  // in_bar[y] = Σ_tap out_bar[(y + padding − tap) / stride] W[tap]ᵀ, the taps being those where the quotient is whole.
  // Input pixels of one residue modulo the stride share them: `residue` names the class, one of `stride`.
  IMAML_HOST_DEVICE Axis backward(int32_t residue) const {
    const int32_t tap = (residue + padding) % stride;
    const int32_t pixels = residue < size ? (size - 1 - residue) / stride + 1 : 0;
    const int32_t taps = tap < kernel ? (kernel - 1 - tap) / stride + 1 : 0;
    return {pixels, residue, stride, taps, tap, stride, (residue + padding - tap) / stride, 1, -1, count};
  }
};

}  // namespace imaml_ext
