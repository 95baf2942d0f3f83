// What the ops of single layers have done on the CPU, with plain pointers.
#pragma once

#include "layers/arguments.h"

namespace imaml_ext {

// One axis of a convolution: output pixel i and tap t read input pixel stride · i + dilation · t − padding.
struct ConvolutionAxis {
  int64_t size = 1, kernel = 1, stride = 1, padding = 0, dilation = 1;
  int64_t count() const { return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1; }
};

// patches [images, H', W', taps, channels] of x [images, H, W, channels], or x as the sum of what they hold of it.
template <typename T>
void patches(OnCpu, const T* x, const ConvolutionAxis& y_axis, const ConvolutionAxis& x_axis, int64_t images,
             int64_t channels, T* patches);
template <typename T>
void patches_adjoint(OnCpu, const T* patches, const ConvolutionAxis& y_axis, const ConvolutionAxis& x_axis,
                     int64_t images, int64_t channels, T* x);

// Weights [R, out, channels, taps] to [R, taps, channels, out], or back.
template <typename T>
void turn_weights(OnCpu, const T* from, T* to, int64_t rows, int64_t out, int64_t channels, int64_t taps, bool back);

// y [R, images, H', W', out] of x [R, images, H, W, channels] and w [R, taps, channels, out]; and its adjoints. The
// numbers of channels are multiples of kChannelBlock.
struct Convolution {
  ConvolutionAxis y_axis, x_axis;
  int64_t rows = 0, images = 0, channels = 0, out = 0;
};
template <typename T>
void convolve(OnCpu, const Convolution& c, const T* x, const T* w, T* y);
template <typename T>
void convolve_back(OnCpu, const Convolution& c, const T* y_bar, const T* w, T* x_bar);
template <typename T>
void convolve_weight(OnCpu, const Convolution& c, const T* x, const T* y_bar, T* w_bar);

// The tiles of `images` images, which follow each other by `next` numbers, to the image or from it.
template <typename T>
void winograd_tiles(OnCpu, const TileArguments<T>& first, int64_t images, int64_t next);

enum class NormPass { kForward, kBackward, kSecond };

// `first` is what the first of the tasks reads and writes; the others follow it.
template <typename T>
void batch_norm(OnCpu, NormPass pass, const BatchNormArguments<T>& first, int64_t tasks);

}  // namespace imaml_ext
