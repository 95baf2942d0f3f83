// What the norm kernels read and write.
#pragma once

#include "network/network.h"

namespace imaml_ext {

// One task's norm and activation. Matrices are [rows, width]; vectors [width], zero in padded channels. With
// Norm::kBatch   x̂ = s (y − mean y),  s = 1 / √(var y + ε),  z = γ x̂ + β;   with Norm::kBias   z = y + β;   a = act(z).
// A dot stands for the derivative along a direction of the parameters, a bar for that of the loss.
template <typename T>
struct NormArguments {
  Norm norm = Norm::kBias;
  Activation activation = Activation::kIdentity;  // kIdentity too where max-pooling comes first: the pooling applies it
  int64_t rows = 0;
  int64_t width = 0;
  const T* gamma = nullptr;
  const T* beta = nullptr;
  T* hat = nullptr;    // y, and x̂ after (z after with kBias)
  T* act = nullptr;    // a; null: not wanted, as with kIdentity x̂ or z tells it
  T* scale = nullptr;  // s
  T* z_bar = nullptr;  // ā, and z̄ after
  T* y_bar = nullptr;  // ȳ; may be z_bar
  T* gamma_bar = nullptr;
  T* beta_bar = nullptr;

  const T* gamma_dot = nullptr;
  const T* beta_dot = nullptr;
  T* hat_dot = nullptr;    // ẏ, and the derivative of x̂ after (of z with kBias)
  T* act_dot = nullptr;    // ȧ; null as `act`
  T* pull = nullptr;       // mean(x̂ ẏ), of which the derivative of s is −s² times it
  T* y_bar_dot = nullptr;  // the derivative of ā, and of ȳ after
  T* gamma_bar_dot = nullptr;
  T* beta_bar_dot = nullptr;
};

}  // namespace imaml_ext
