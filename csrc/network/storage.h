// Where the values of one task lie: the tape that second derivatives need, and the derivatives along a direction.
//
// One layout for both devices. On the CPU a Pointer<T> is a T*, of the task at work; on CUDA it is the first task's
// with the distance to the next (network/cuda/per_task.cuh).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "network/network.h"

namespace imaml_ext {

// Memory of one task handed out in 64-byte steps; without a base it only measures.
class Arena {
 public:
  template <typename T>
  using Pointer = T*;

  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* const at = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// What one layer of one task keeps.
template <typename T, typename Memory = Arena>
struct LayerValues {
  using P = typename Memory::template Pointer<T>;
  P hat;                                              // [S, pixels, width]   x̂, or z without a batch norm
  P act;                                              // [S, pixels or, with max-pooling, pixels_out, width]
  P out;                                              // [S, pixels_out, width]   `act`, or its mean over pixels
  typename Memory::template Pointer<uint8_t> winner;  // [S, pixels_out, width]   which of the 2×2 pixels
  P scale, gamma, beta;                               // [width]
};
template <typename T, typename Memory = Arena>
struct LayerBars {
  using P = typename Memory::template Pointer<T>;
  P z_bar;                // [S, pixels, width]
  P y_bar;                // [S, pixels, width]; z_bar where that is no longer needed
  P out_bar;              // [S, pixels_out, width]; z_bar without pooling
  P gamma_bar, beta_bar;  // [width]
};

// The derivative of the values along a direction of the parameters.
template <typename T, typename Memory = Arena>
struct LayerDots {
  using P = typename Memory::template Pointer<T>;
  P hat_dot, act_dot, out_dot;
  P gamma_dot, beta_dot, pull;    // [width]
  P gamma_bar_dot, beta_bar_dot;  // [width]
};

enum class Keep { kNothing, kBars };

// Entries of a matrix of one task at a layer, before and after pooling.
inline int64_t full_size(const Layer& layer, int64_t images) { return images * layer.pixels() * layer.width(); }
inline int64_t pooled_size(const Layer& layer, int64_t images) { return images * layer.pixels_out * layer.width(); }

// The most that any layer needs of the one, and any layer that pools of the other.
struct Largest {
  int64_t full = 0, pooled = 0;

  Largest(const Network& net, int64_t images) {
    for (const Layer& layer : net.layers) {
      full = std::max(full, full_size(layer, images));
      if (layer.pool != Pool::kNone) pooled = std::max(pooled, pooled_size(layer, images));
    }
  }
};

// Room for x̂ (or z), the activations and what leaves a layer, or for their derivatives; what is the same is one.
template <typename T, typename Memory>
auto take_values(const Layer& layer, int64_t images, Memory& memory) {
  using P = typename Memory::template Pointer<T>;
  const bool max = layer.pool == Pool::kMax;
  const bool same = layer.activation == Activation::kIdentity && layer.norm == Norm::kBias && !max;
  const P hat = memory.template take<T>(full_size(layer, images));
  const P act = same ? hat : memory.template take<T>(max ? pooled_size(layer, images) : full_size(layer, images));
  const P out = layer.pool == Pool::kMean ? memory.template take<T>(pooled_size(layer, images)) : act;
  return std::tuple<P, P, P>(hat, act, out);
}

template <typename T, typename Memory = Arena>
struct Storage {
  using P = typename Memory::template Pointer<T>;
  P input{};  // [S, pixels_in, depth_width] of the first layer
  std::vector<LayerValues<T, Memory>> values;
  std::vector<LayerBars<T, Memory>> bars;
  P probabilities{};  // [S, width] of the last layer: softmax of the outputs

  // With Keep::kBars every layer's own bars, which second derivatives need; else two buffers in turn.
  Storage(const Network& net, int64_t images, Keep keep, bool backward, Memory& memory) {
    const auto take = [&](int64_t count) { return memory.template take<T>(count); };
    const Layer& first = net.layers.front();
    input = take(images * first.pixels_in * first.depth_width());
    for (const Layer& layer : net.layers) {
      LayerValues<T, Memory> v{};
      std::tie(v.hat, v.act, v.out) = take_values<T>(layer, images, memory);
      if (layer.pool == Pool::kMax) v.winner = memory.template take<uint8_t>(pooled_size(layer, images));
      v.scale = take(layer.width());
      v.gamma = take(layer.width());
      v.beta = take(layer.width());
      values.push_back(v);
    }
    probabilities = take(images * net.layers.back().width());
    if (!backward) return;
    const Largest largest(net, images);
    std::array<P, 2> turns{};
    if (keep == Keep::kNothing) {
      for (P& turn : turns) turn = take(largest.full);
    }
    const P pooled = take(largest.pooled);
    for (size_t l = 0; l < net.layers.size(); ++l) {
      const Layer& layer = net.layers[l];
      LayerBars<T, Memory> b{};
      b.z_bar = keep == Keep::kNothing ? turns[l % 2] : take(full_size(layer, images));
      const bool one = keep == Keep::kNothing || layer.norm == Norm::kBias;
      b.y_bar = one ? b.z_bar : take(full_size(layer, images));
      b.out_bar = layer.pool == Pool::kNone ? b.z_bar : pooled;
      b.gamma_bar = take(layer.width());
      b.beta_bar = take(layer.width());
      bars.push_back(b);
    }
  }
};

template <typename T, typename Memory = Arena>
struct DotStorage {
  using P = typename Memory::template Pointer<T>;
  std::vector<LayerDots<T, Memory>> dots;
  std::array<P, 2> turns;  // [S, pixels, width] of the largest layer: bars of the bars
  P pooled;                // [S, pixels_out, width] of the largest pooled layer

  DotStorage(const Network& net, int64_t images, Memory& memory) {
    const auto take = [&](int64_t count) { return memory.template take<T>(count); };
    for (const Layer& layer : net.layers) {
      LayerDots<T, Memory> d{};
      std::tie(d.hat_dot, d.act_dot, d.out_dot) = take_values<T>(layer, images, memory);
      d.gamma_dot = take(layer.width());
      d.beta_dot = take(layer.width());
      d.pull = take(layer.width());
      d.gamma_bar_dot = take(layer.width());
      d.beta_bar_dot = take(layer.width());
      dots.push_back(d);
    }
    const Largest largest(net, images);
    for (P& turn : turns) turn = take(largest.full);
    pooled = take(largest.pooled);
  }
};

// Bytes of what second derivatives need of a task.
template <typename T>
int64_t tape_size(const Network& net, int64_t images) {
  Arena measure(nullptr);
  Storage<T>(net, images, Keep::kBars, true, measure);
  return measure.used();
}

}  // namespace imaml_ext
