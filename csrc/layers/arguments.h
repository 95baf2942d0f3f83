// What the kernels of single layers read and write. Activations are channels-last, [images, height, width, channels].
#pragma once

#include <cstdint>

#include "common/device.h"

namespace imaml_ext {

// The matrices L of Winograd's convolutions of 3 × 3 weights: Y = Aᵀ [(G W Gᵀ) ⊙ (Bᵀ X B)] A for a tile Y of m × m
// pixels; its adjoints take the transposes. Source: Lavin and Gray, Fast algorithms for convolutional neural networks
// (2016), equation 8.
enum class Winograd : int64_t {
  kInput,          // Bᵀ: m + 2 pixels of x to m + 2 numbers
  kWeight,         // G: 3 taps to m + 2 numbers
  kFlippedWeight,  // G with the taps in reverse order, for the gradient in x
  kOutputAdjoint,  // A: m pixels of ȳ to m + 2 numbers
  kOutput,         // Aᵀ
  kWeightAdjoint,  // Gᵀ
};

// Tiles of one image, `step` pixels apart, the first at −offset; pixels outside the image are zero. Pixels follow each
// other by `pixel` numbers; number k of tile t lies at tiles + k · plane + t · channels.
template <typename T>
struct TileArguments {
  Winograd matrix = Winograd::kInput;
  int64_t m = 4;  // 2 or 4
  T* image = nullptr;
  int64_t height = 0, width = 0, channels = 0, pixel = 0;
  int64_t offset = 0, step = 1;
  int64_t rows = 0, cols = 0;  // of tiles
  T* tiles = nullptr;
  int64_t plane = 0;
};

// The norm of one task's rows, x̂ = s (x − mean x), s = 1 / √(var x + ε), z = γ x̂ + β, every channel by itself.
// Matrices are [rows, channels], vectors [channels].
template <typename T>
struct BatchNormArguments {
  int64_t rows = 0, channels = 0;
  double eps = 0;
  const T* x = nullptr;
  const T* gamma = nullptr;
  const T* beta = nullptr;
  T* z = nullptr;
  T* mean = nullptr;
  T* scale = nullptr;  // s

  const T* z_bar = nullptr;  // the derivative of a scalar in z
  T* x_bar = nullptr;
  T* gamma_bar = nullptr;
  T* beta_bar = nullptr;

  const T* x_dot = nullptr;  // what x̄ is multiplied by in a scalar F = ⟨ẋ, x̄⟩ + ⟨γ̇, γ̄⟩ + ⟨β̇, β̄⟩
  const T* gamma_dot = nullptr;
  const T* beta_dot = nullptr;
  T* sums = nullptr;       // scratch, [5, channels]
  T* z_bar_bar = nullptr;  // ∂F/∂z̄; ∂F/∂x and ∂F/∂γ go to x_bar and gamma_bar
};

}  // namespace imaml_ext
