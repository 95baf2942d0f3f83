// The network ops on plain pointers, of all tasks, checked before: what a device's code sees.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "network/network.h"
#include "prox/arguments.h"

namespace imaml_ext {

template <typename T>
struct NetworkArguments {
  explicit NetworkArguments(const Network& network) : net(network) {}

  const Network& net;
  int64_t tasks = 0;
  bool shared = false;              // params, tape and y are of one task, the same for all directions
  int64_t images = 0;               // of a task
  const T* params = nullptr;        // [B, N]
  const T* x = nullptr;             // [B, S, *]
  const int64_t* labels = nullptr;  // [B, S]; or
  const T* targets = nullptr;       // [B, S, K]
  T* losses = nullptr;              // [B], or [steps, B]
  T* outputs = nullptr;             // [B, S, K]
  T* gradient = nullptr;            // [B, N]
  char* tape = nullptr;             // [B, tape_size]; null: nothing is kept for second derivatives
  const T* direction = nullptr;     // [B, N]
  T* product = nullptr;             // [B, N]
  double* curvature = nullptr;      // [B]

  Allocate allocate;

  // From a task to the next: of params, and of y.
  int64_t params_stride() const { return shared ? 0 : net.parameters; }
  int64_t targets_stride() const { return shared ? 0 : labels != nullptr ? images : images * net.outputs(); }
};

// A device's part of the ops, for float and double.
#define IMAML_NETWORK_OPS(Device)                                                                          \
  template <typename T>                                                                                    \
  void network_outputs(Device, const NetworkArguments<T>& a);                                              \
  /* Losses, outputs and gradient, and the tape where there is one. */                                     \
  template <typename T>                                                                                    \
  void network_gradient(Device, const NetworkArguments<T>& a);                                             \
  /* The parameters are prox.phi. */                                                                       \
  template <typename T>                                                                                    \
  void network_descend(Device, const NetworkArguments<T>& a, const ProxArguments<T>& prox, int64_t steps); \
  template <typename T>                                                                                    \
  void network_product(Device, const NetworkArguments<T>& a, bool gauss_newton);                           \
  template <typename T>                                                                                    \
  void network_curvature(Device, const NetworkArguments<T>& a);
IMAML_NETWORK_OPS(OnCpu)
IMAML_NETWORK_OPS(OnCuda)
#undef IMAML_NETWORK_OPS

// For the end of a device's file.
#define IMAML_INSTANTIATE_NETWORK(Device, T)                                                           \
  template void network_outputs(Device, const NetworkArguments<T>&);                                   \
  template void network_gradient(Device, const NetworkArguments<T>&);                                  \
  template void network_descend(Device, const NetworkArguments<T>&, const ProxArguments<T>&, int64_t); \
  template void network_product(Device, const NetworkArguments<T>&, bool);                             \
  template void network_curvature(Device, const NetworkArguments<T>&);

}  // namespace imaml_ext
