// The arguments of a network op, checked: what every device's ops begin with. Each failure is one sentence.
#pragma once

#include <ATen/core/Tensor.h>

#include "network/network.h"

namespace imaml_ext {

struct NetworkCall {
  Network net;
  int64_t tasks;
  int64_t images = 0;

  NetworkCall(const char* op, const at::Tensor& params, at::IntArrayRef network, const char* name = "params");

  // x [B, S, *], which says how many images there are.
  void read_x(const char* op, const at::Tensor& x, const at::Tensor& params);

  // y [B, S] labels or [B, S, *] targets; with `check_labels` their values too, where the host can look at them.
  void read_y(const char* op, const at::Tensor& y, const at::Tensor& params, bool check_labels) const;

  // What follows on network_linearise: y, as it was there, which says how many images there are, and p [B, N], or [R,
  // N] of the one task that params has.
  void read_direction(const char* op, const at::Tensor& y, const at::Tensor& p, const at::Tensor& params);

 private:
  // Kernels on CUDA count the numbers that one task has of a layer in 32 bits.
  void check_sizes_on_cuda(const char* op) const;
};

}  // namespace imaml_ext
