// The reference networks as a list of layers, each a product with taps of a weight, a norm, an activation and a
// pooling.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "network/window.h"

namespace imaml_ext {

// Rows of activations are padded with zeros to a multiple of this many channels, a multiple of every register's lanes.
constexpr int64_t kChannelBlock = 16;
inline int64_t padded_channels(int64_t channels) {
  return (channels + kChannelBlock - 1) / kChannelBlock * kChannelBlock;
}

enum class Norm : int64_t { kBias = 0, kBatch = 1 };  // y + β, or γ (y − mean) / √(var + ε) + β over the task's batch
enum class Activation : int64_t { kIdentity = 0, kRelu = 1, kTanh = 2 };
enum class Pool : int64_t { kNone = 0, kMax = 1, kMean = 2 };  // 2×2, or all pixels to one

// A pixel of the input that a tap of the weight carries to a pixel of the output.
struct TapPair {
  int32_t from;
  int32_t to;
};

// out[to] = Σ_tap Σ_c in[from][c] · weight[tap][c], then norm, activation, pooling. Convolutions and linear layers
// alike: padding is the absence of a pair. Each tap's weight is [depth, channels].
struct Layer {
  Norm norm;
  Activation activation;
  Pool pool;
  int64_t depth;        // channels that a tap reads
  int64_t channels;     // channels of the output
  int64_t pixels_in;    // of an image
  int64_t rows, cols;   // pixels of the output of the product
  Window down, across;  // what a tap reaches, along either axis of an image
  int64_t pixels_out;   // after pooling
  int64_t weight;       // offsets in a row of parameters: weight [taps, depth, channels],
  int64_t gamma, beta;  // [channels] each; no gamma with Norm::kBias
  int64_t taps;         // of the weight

  int64_t pixels() const { return rows * cols; }
  int64_t depth_width() const { return padded_channels(depth); }
  int64_t width() const { return padded_channels(channels); }
};

// The pairs of one tap of a layer's weight.
struct Tap {
  int64_t index;  // in the weight
  std::vector<TapPair> pairs;
};
// Those of all taps, which products on the CPU go by. The first reaches every pixel of the output.
std::vector<Tap> taps_of(const Layer& layer);

// What the int[] argument of the network ops says: in_channels, height, width, then for every layer: kernel (0 linear
// over all pixels, 3 for 3×3 with zero padding 1), stride, channels, norm, activation, pool.
struct Network {
  int64_t in_channels;
  int64_t height;
  int64_t width;
  int64_t patch_stride;  // of the 3×3 patches, [9 · in_channels], that a first convolution of few channels reads; or 0
  std::vector<Layer> layers;
  int64_t parameters;

  static Network parse(std::span<const int64_t> description);
  int64_t outputs() const { return layers.back().channels; }
  int64_t input_size() const { return in_channels * height * width; }
};

constexpr double kBatchNormEps = 1e-5;

// Bytes a task of the tape that network_linearise makes, of `images` examples in a type of `item_size` bytes.
int64_t network_tape_size(std::span<const int64_t> description, int64_t images, int64_t item_size);

}  // namespace imaml_ext
