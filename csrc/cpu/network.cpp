// The reference networks on the CPU: a task at a time through all of its layers, so that its activations stay in the
// cache, and tasks side by side; where tasks are fewer than threads, the work inside a task is split.
#include "../network.h"
#include "../checks.h"

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace imaml_ext {
namespace {

// Memory handed out in 64-byte steps; without a base it only measures.
class Arena {
 public:
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
template <typename T>
struct LayerValues {
  T* hat;                   // [S, pixels, width]   x̂, or z without a batch norm
  T* act;                   // [S, pixels or, with max-pooling, pixels_out, width]
  T* out;                   // [S, pixels_out, width]   `act`, or its mean over pixels
  uint8_t* winner;          // [S, pixels_out, width]   which of the 2×2 pixels
  T *scale, *gamma, *beta;  // [width]
};
template <typename T>
struct LayerBars {
  T* z_bar;                 // [S, pixels, width]
  T* y_bar;                 // [S, pixels, width]; z_bar where that is no longer needed
  T* out_bar;               // [S, pixels_out, width]; z_bar without pooling
  T *gamma_bar, *beta_bar;  // [width]
};

// The derivative of the values along a direction of the parameters.
template <typename T>
struct LayerDots {
  T *hat_dot, *act_dot, *out_dot;
  T *gamma_dot, *beta_dot, *pull;   // [width]
  T *gamma_bar_dot, *beta_bar_dot;  // [width]
};

enum class Keep { kNothing, kBars };

// Entries of a matrix of one task at a layer, before and after pooling.
int64_t full_size(const Layer& layer, int64_t images) { return images * layer.pixels() * layer.width(); }
int64_t pooled_size(const Layer& layer, int64_t images) { return images * layer.pixels_out * layer.width(); }

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
template <typename T>
std::tuple<T*, T*, T*> take_values(const Layer& layer, int64_t images, Arena& arena) {
  const bool max = layer.pool == Pool::kMax;
  const bool same = layer.activation == Activation::kIdentity && layer.norm == Norm::kBias && !max;
  T* const hat = arena.take<T>(full_size(layer, images));
  T* const act = same ? hat : arena.take<T>(max ? pooled_size(layer, images) : full_size(layer, images));
  return {hat, act, layer.pool == Pool::kMean ? arena.take<T>(pooled_size(layer, images)) : act};
}

template <typename T>
struct Storage {
  T* input = nullptr;  // [S, pixels_in, depth_width] of the first layer
  std::vector<LayerValues<T>> values;
  std::vector<LayerBars<T>> bars;
  T* probabilities = nullptr;  // [S, width] of the last layer: softmax of the outputs

  // With Keep::kBars every layer's own bars, which second derivatives need; else two buffers in turn.
  Storage(const Network& net, int64_t images, Keep keep, bool backward, Arena& arena) {
    const Layer& first = net.layers.front();
    input = arena.take<T>(images * first.pixels_in * first.depth_width());
    for (const Layer& layer : net.layers) {
      LayerValues<T> v{};
      std::tie(v.hat, v.act, v.out) = take_values<T>(layer, images, arena);
      v.winner = layer.pool == Pool::kMax ? arena.take<uint8_t>(pooled_size(layer, images)) : nullptr;
      v.scale = arena.take<T>(layer.width());
      v.gamma = arena.take<T>(layer.width());
      v.beta = arena.take<T>(layer.width());
      values.push_back(v);
    }
    probabilities = arena.take<T>(images * net.layers.back().width());
    if (!backward) return;
    const Largest largest(net, images);
    std::array<T*, 2> turns{};
    if (keep == Keep::kNothing) turns = {arena.take<T>(largest.full), arena.take<T>(largest.full)};
    T* const pooled = arena.take<T>(largest.pooled);
    for (size_t l = 0; l < net.layers.size(); ++l) {
      const Layer& layer = net.layers[l];
      LayerBars<T> b{};
      b.z_bar = keep == Keep::kNothing ? turns[l % 2] : arena.take<T>(full_size(layer, images));
      const bool one = keep == Keep::kNothing || layer.norm == Norm::kBias;
      b.y_bar = one ? b.z_bar : arena.take<T>(full_size(layer, images));
      b.out_bar = layer.pool == Pool::kNone ? b.z_bar : pooled;
      b.gamma_bar = arena.take<T>(layer.width());
      b.beta_bar = arena.take<T>(layer.width());
      bars.push_back(b);
    }
  }
};

template <typename T>
struct DotStorage {
  std::vector<LayerDots<T>> dots;
  std::array<T*, 2> turns;  // [S, pixels, width] of the largest layer: bars of the bars
  T* pooled;                // [S, pixels_out, width] of the largest pooled layer

  DotStorage(const Network& net, int64_t images, Arena& arena) {
    for (const Layer& layer : net.layers) {
      LayerDots<T> d{};
      std::tie(d.hat_dot, d.act_dot, d.out_dot) = take_values<T>(layer, images, arena);
      d.gamma_dot = arena.take<T>(layer.width());
      d.beta_dot = arena.take<T>(layer.width());
      d.pull = arena.take<T>(layer.width());
      d.gamma_bar_dot = arena.take<T>(layer.width());
      d.beta_bar_dot = arena.take<T>(layer.width());
      dots.push_back(d);
    }
    const Largest largest(net, images);
    turns = {arena.take<T>(largest.full), arena.take<T>(largest.full)};
    pooled = arena.take<T>(largest.pooled);
  }
};

// The work on [0, n), in pieces side by side unless tasks already are.
template <typename Body>
void split(int64_t n, const Body& body) {
  if (at::in_parallel_region() || at::get_num_threads() == 1) {
    body(0, n);
  } else {
    at::parallel_for(0, n, 1, body);
  }
}

// One task through the network.
template <typename T>
class Task {
 public:
  // `weights` is scratch for the largest weight of any layer, padded.
  Task(const Network& net, int64_t images, T* weights)
      : net_(net), images_(images), kernels_(network_kernels<T>()), scratch_(weights) {}

  static int64_t scratch_size(const Network& net) {
    int64_t most = 0;
    for (const Layer& layer : net.layers) {
      const int64_t taps = static_cast<int64_t>(layer.taps.size());
      most = std::max({most, taps * layer.depth * layer.width(), taps * layer.channels * layer.depth_width()});
    }
    return most;
  }

  // x [S, C, H, W] to the rows that the first layer reads.
  void read_input(const T* x, T* input) const {
    const Layer& first = net_.layers.front();
    const int64_t width = first.depth_width();
    std::fill(input, input + images_ * first.pixels_in * width, T(0));
    const int64_t plane = net_.height * net_.width;
    for (int64_t image = 0; image < images_; ++image, x += net_.input_size()) {
      T* const rows = input + image * first.pixels_in * width;
      if (net_.patch_stride == 0) {
        for (int64_t c = 0; c < net_.in_channels; ++c)
          for (int64_t pixel = 0; pixel < plane; ++pixel) rows[pixel * width + c] = x[c * plane + pixel];
        continue;
      }
      for (int64_t i = 0; i < first.rows; ++i)
        for (int64_t j = 0; j < first.cols; ++j)
          for (int64_t tap = 0; tap < 9; ++tap) {
            const int64_t row = net_.patch_stride * i + tap / 3 - 1;
            const int64_t col = net_.patch_stride * j + tap % 3 - 1;
            if (row < 0 || row >= net_.height || col < 0 || col >= net_.width) continue;
            T* const to = rows + (i * first.cols + j) * width + tap * net_.in_channels;
            for (int64_t c = 0; c < net_.in_channels; ++c) to[c] = x[c * plane + row * net_.width + col];
          }
    }
  }

  // The outputs are values.back().out, [S, width].
  void forward(const T* params, Storage<T>& s) const {
    const T* in = s.input;
    for (size_t l = 0; l < net_.layers.size(); ++l) {
      const Layer& layer = net_.layers[l];
      const LayerValues<T>& v = s.values[l];
      multiply(layer, in, params + layer.weight, v.hat, false);
      pad(params, layer, v.gamma, v.beta);
      columns(layer, arguments(layer, v), kernels_.norm);
      if (layer.pool == Pool::kMax) max_pool(layer, v);
      if (layer.pool == Pool::kMean) mean_pool(layer, v.act, v.out);
      in = v.out;
    }
  }

  // From bars.back().out_bar, the derivative in the outputs: Jᵀ of it in `gradient`, a row of parameters.
  void backward(const T* params, Storage<T>& s, T* gradient) const { backward(params, s, s.bars, gradient); }

  // The derivative of the values along `direction`; that of the outputs is dots.back().out_dot.
  void tangent(const T* params, const T* direction, const Storage<T>& s, DotStorage<T>& t) const {
    const T* in = s.input;
    const T* in_dot = nullptr;
    for (size_t l = 0; l < net_.layers.size(); ++l) {
      const Layer& layer = net_.layers[l];
      const LayerValues<T>& v = s.values[l];
      const LayerDots<T>& d = t.dots[l];
      multiply(layer, in, direction + layer.weight, d.hat_dot, false);
      if (in_dot != nullptr) multiply(layer, in_dot, params + layer.weight, d.hat_dot, true);
      pad(direction, layer, d.gamma_dot, d.beta_dot);
      columns(layer, arguments(layer, v, d), kernels_.norm_tangent);
      if (layer.pool == Pool::kMax) max_pool_tangent(layer, v, d);
      if (layer.pool == Pool::kMean) mean_pool(layer, d.act_dot, d.out_dot);
      in = v.out;
      in_dot = d.out_dot;
    }
  }

  // Where the bars of the bars begin: the derivative of the derivative in the outputs.
  T* output_bar(DotStorage<T>& t) const { return turn(t, net_.layers.size() - 1); }

  // Jᵀ C J p from output_bar = C J p, with the bars of `t` and not those of the storage.
  void gauss_newton(const T* params, Storage<T>& s, DotStorage<T>& t, T* product) const {
    std::vector<LayerBars<T>> bars;
    for (size_t l = 0; l < net_.layers.size(); ++l) {
      T* const bar = t.turns[l % 2];
      bars.push_back({bar, bar, turn(t, l), t.dots[l].gamma_bar_dot, t.dots[l].beta_bar_dot});
    }
    backward(params, s, bars, product);
  }

  // H p from output_bar, after `backward` and `tangent` along p.
  void second(const T* params, const T* direction, const Storage<T>& s, DotStorage<T>& t, T* product) const {
    for (size_t l = net_.layers.size(); l-- > 0;) {
      const Layer& layer = net_.layers[l];
      const LayerValues<T>& v = s.values[l];
      const LayerBars<T>& b = s.bars[l];
      const LayerDots<T>& d = t.dots[l];
      T* const bar_dot = t.turns[l % 2];
      if (layer.pool != Pool::kNone) unpool(layer, v, t.pooled, bar_dot);
      NormArguments<T> n = arguments(layer, v, d);
      n.z_bar = b.z_bar, n.gamma_bar = b.gamma_bar, n.beta_bar = b.beta_bar;
      n.y_bar_dot = bar_dot;
      n.gamma_bar_dot = d.gamma_bar_dot, n.beta_bar_dot = d.beta_bar_dot;
      columns(layer, n, kernels_.norm_second);
      unpad(layer, d.gamma_bar_dot, d.beta_bar_dot, product);
      const T* const in = l == 0 ? s.input : s.values[l - 1].out;
      outer(layer, in, bar_dot, product + layer.weight, false);
      if (l == 0) break;
      outer(layer, t.dots[l - 1].out_dot, b.y_bar, product + layer.weight, true);
      multiply_transposed(layer, bar_dot, params + layer.weight, turn(t, l - 1), false);
      multiply_transposed(layer, b.y_bar, direction + layer.weight, turn(t, l - 1), true);
    }
  }

 private:
  static constexpr int64_t kRowsAtOnce = 480;  // pointers on the stack; a multiple of every tile

  T* turn(DotStorage<T>& t, size_t l) const { return net_.layers[l].pool == Pool::kNone ? t.turns[l % 2] : t.pooled; }

  void backward(const T* params, Storage<T>& s, const std::vector<LayerBars<T>>& bars, T* gradient) const {
    for (size_t l = net_.layers.size(); l-- > 0;) {
      const Layer& layer = net_.layers[l];
      const LayerValues<T>& v = s.values[l];
      const LayerBars<T>& b = bars[l];
      if (layer.pool != Pool::kNone) unpool(layer, v, b.out_bar, b.z_bar);
      NormArguments<T> n = arguments(layer, v);
      n.z_bar = b.z_bar, n.y_bar = b.y_bar, n.gamma_bar = b.gamma_bar, n.beta_bar = b.beta_bar;
      columns(layer, n, kernels_.norm_backward);
      unpad(layer, b.gamma_bar, b.beta_bar, gradient);
      outer(layer, l == 0 ? s.input : s.values[l - 1].out, b.y_bar, gradient + layer.weight, false);
      if (l > 0) multiply_transposed(layer, b.y_bar, params + layer.weight, bars[l - 1].out_bar, false);
    }
  }

  NormArguments<T> arguments(const Layer& layer, const LayerValues<T>& v) const {
    NormArguments<T> n;
    n.norm = layer.norm, n.activation = layer.activation;
    n.rows = images_ * layer.pixels(), n.width = layer.width();
    n.gamma = v.gamma, n.beta = v.beta, n.hat = v.hat, n.scale = v.scale;
    n.act = layer.pool == Pool::kMax || v.act == v.hat ? nullptr : v.act;
    return n;
  }
  NormArguments<T> arguments(const Layer& layer, const LayerValues<T>& v, const LayerDots<T>& d) const {
    NormArguments<T> n = arguments(layer, v);
    n.gamma_dot = d.gamma_dot, n.beta_dot = d.beta_dot, n.hat_dot = d.hat_dot, n.act_dot = d.act_dot, n.pull = d.pull;
    return n;
  }

  // γ and β of a row of parameters, with zeros in the padded channels.
  void pad(const T* row, const Layer& layer, T* gamma, T* beta) const {
    const auto padded = [&](const T* from, T* to) {
      std::fill(std::copy(from, from + layer.channels, to), to + layer.width(), T(0));
    };
    if (layer.norm == Norm::kBatch) padded(row + layer.gamma, gamma);
    padded(row + layer.beta, beta);
  }
  void unpad(const Layer& layer, const T* gamma, const T* beta, T* row) const {
    if (layer.norm == Norm::kBatch) std::copy(gamma, gamma + layer.channels, row + layer.gamma);
    std::copy(beta, beta + layer.channels, row + layer.beta);
  }

  void columns(const Layer& layer, const NormArguments<T>& n,
               void (*kernel)(const NormArguments<T>&, int64_t, int64_t)) const {
    split(layer.width() / kChannelBlock,
          [&](int64_t first, int64_t last) { kernel(n, first * kChannelBlock, last * kChannelBlock); });
  }

  // Calls body(from rows, to rows, count) for the images [first, last) of every pair of a tap, kRowsAtOnce at a time.
  template <typename Body>
  static void over_pairs(const std::vector<TapPair>& pairs, int64_t first, int64_t last, const T* from,
                         int64_t from_pixels, int64_t from_width, const T* to, int64_t to_pixels, int64_t to_width,
                         const Body& body) {
    const T* from_rows[kRowsAtOnce];
    const T* to_rows[kRowsAtOnce];
    int64_t count = 0;
    for (const TapPair& pair : pairs) {
      for (int64_t image = first; image < last; ++image) {
        from_rows[count] = from + (image * from_pixels + pair.from) * from_width;
        to_rows[count] = to + (image * to_pixels + pair.to) * to_width;
        if (++count == kRowsAtOnce) {
          body(from_rows, to_rows, count);
          count = 0;
        }
      }
    }
    if (count > 0) body(from_rows, to_rows, count);
  }

  // out[to] ← or += Σ in[from] · weight[tap]
  void multiply(const Layer& layer, const T* in, const T* weight, T* out, bool add) const {
    const int64_t panel = layer.depth * layer.channels;
    const int64_t width = layer.width();
    if (width != layer.channels) {  // rows of the weight with zeros at their ends
      for (int64_t row = 0; row < static_cast<int64_t>(layer.taps.size()) * layer.depth; ++row) {
        const T* const from = weight + row * layer.channels;
        std::fill(std::copy(from, from + layer.channels, scratch_ + row * width), scratch_ + (row + 1) * width, T(0));
      }
      weight = scratch_;
    }
    const int64_t stride = width == layer.channels ? panel : layer.depth * width;
    split(images_, [&](int64_t first, int64_t last) {
      for (size_t tap = 0; tap < layer.taps.size(); ++tap) {
        over_pairs(layer.taps[tap], first, last, in, layer.pixels_in, layer.depth_width(), out, layer.pixels(), width,
                   [&](const T* const* a, const T* const* c, int64_t rows) {
                     kernels_.multiply(a, const_cast<T* const*>(c), rows, layer.depth,
                                       weight + layer.tap_index[tap] * stride, width, add || tap > 0);
                   });
      }
    });
  }

  // in_bar[from] ← or += Σ out_bar[to] · weight[tap]ᵀ
  void multiply_transposed(const Layer& layer, const T* out_bar, const T* weight, T* in_bar, bool add) const {
    const int64_t width = layer.depth_width();
    const int64_t taps = static_cast<int64_t>(layer.taps.size());
    const int64_t panel = layer.channels * width;
    split(taps, [&](int64_t first, int64_t last) {
      for (int64_t tap = first; tap < last; ++tap) {
        kernels_.transpose(weight + tap * layer.depth * layer.channels, layer.depth, layer.channels,
                           scratch_ + tap * panel, width);
      }
    });
    split(images_, [&](int64_t first, int64_t last) {
      if (!add) {
        std::fill(in_bar + first * layer.pixels_in * width, in_bar + last * layer.pixels_in * width, T(0));
      }
      for (int64_t tap = 0; tap < taps; ++tap) {
        over_pairs(layer.taps[tap], first, last, in_bar, layer.pixels_in, width, out_bar, layer.pixels(), layer.width(),
                   [&](const T* const* c, const T* const* a, int64_t rows) {
                     kernels_.multiply(a, const_cast<T* const*>(c), rows, layer.channels,
                                       scratch_ + layer.tap_index[tap] * panel, width, true);
                   });
      }
    });
  }

  // weight_bar[tap] ← or += Σ in[from]ᵀ out_bar[to]
  void outer(const Layer& layer, const T* in, const T* out_bar, T* weight_bar, bool add) const {
    constexpr int64_t kBlock = 96;  // channels of a tap; a multiple of the tile
    const int64_t blocks = (layer.depth + kBlock - 1) / kBlock;
    split(static_cast<int64_t>(layer.taps.size()) * blocks, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const size_t tap = k / blocks;
        const int64_t first = k % blocks * kBlock;
        const int64_t last = std::min(first + kBlock, layer.depth);
        T* const to = weight_bar + layer.tap_index[tap] * layer.depth * layer.channels;
        bool further = add;
        over_pairs(layer.taps[tap], 0, images_, in, layer.pixels_in, layer.depth_width(), out_bar, layer.pixels(),
                   layer.width(), [&](const T* const* a, const T* const* g, int64_t rows) {
                     kernels_.outer(a, g, rows, first, last, layer.channels, to, further);
                     further = true;
                   });
        // A tap that no pixel uses.
        if (!further) std::fill(to + first * layer.channels, to + last * layer.channels, T(0));
      }
    });
  }

  void mean_pool(const Layer& layer, const T* in, T* out) const {
    const int64_t width = layer.width();
    const T share = T(1) / static_cast<T>(layer.pixels());
    for (int64_t image = 0; image < images_; ++image, out += width) {
      std::fill(out, out + width, T(0));
      for (int64_t pixel = 0; pixel < layer.pixels(); ++pixel, in += width)
        for (int64_t c = 0; c < width; ++c) out[c] += share * in[c];
    }
  }

  // Calls body(pooled row, the four rows it looks at) for the images [first, last).
  template <typename Body>
  static void over_windows(const Layer& layer, int64_t first, int64_t last, const Body& body) {
    const int64_t rows = layer.rows / 2, cols = layer.cols / 2;
    for (int64_t image = first; image < last; ++image)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) {
          const int64_t corner = (image * layer.rows + 2 * i) * layer.cols + 2 * j;
          const int64_t full[4] = {corner, corner + 1, corner + layer.cols, corner + layer.cols + 1};
          body((image * rows + i) * cols + j, full);
        }
  }

  // a = act(max of z over 2×2 pixels), the first of equal ones winning
  void max_pool(const Layer& layer, const LayerValues<T>& v) const {
    const int64_t width = layer.width();
    const bool batch = layer.norm == Norm::kBatch;
    split(images_, [&](int64_t begin, int64_t end) {
      over_windows(layer, begin, end, [&](int64_t pooled, const int64_t (&full)[4]) {
        for (int64_t c = 0; c < width; ++c) {
          const auto z = [&](int k) {
            const T hat = v.hat[full[k] * width + c];
            return batch ? v.gamma[c] * hat + v.beta[c] : hat;
          };
          T best = z(0);
          uint8_t winner = 0;
          for (uint8_t k = 1; k < 4; ++k) {
            const T other = z(k);
            const bool above = other > best || std::isnan(other);
            best = above ? other : best;
            winner = above ? k : winner;
          }
          v.winner[pooled * width + c] = winner;
          v.act[pooled * width + c] = layer.activation == Activation::kRelu && best < T(0) ? T(0) : best;
        }
      });
    });
  }

  void max_pool_tangent(const Layer& layer, const LayerValues<T>& v, const LayerDots<T>& d) const {
    const int64_t width = layer.width();
    const bool batch = layer.norm == Norm::kBatch;
    split(images_, [&](int64_t begin, int64_t end) {
      over_windows(layer, begin, end, [&](int64_t pooled, const int64_t (&full)[4]) {
        for (int64_t c = 0; c < width; ++c) {
          const int64_t at = full[v.winner[pooled * width + c]] * width + c;
          const T z_dot =
              batch ? v.gamma[c] * d.hat_dot[at] + d.gamma_dot[c] * v.hat[at] + d.beta_dot[c] : d.hat_dot[at];
          d.act_dot[pooled * width + c] = passes(layer, v.act[pooled * width + c]) ? z_dot : T(0);
        }
      });
    });
  }

  // The adjoint of the pooling; of max-pooling with the activation behind it.
  void unpool(const Layer& layer, const LayerValues<T>& v, const T* out_bar, T* bar) const {
    const int64_t width = layer.width();
    if (layer.pool == Pool::kMean) {
      const T share = T(1) / static_cast<T>(layer.pixels());
      for (int64_t image = 0; image < images_; ++image, out_bar += width)
        for (int64_t pixel = 0; pixel < layer.pixels(); ++pixel, bar += width)
          for (int64_t c = 0; c < width; ++c) bar[c] = share * out_bar[c];
      return;
    }
    split(images_, [&](int64_t begin, int64_t end) {
      const int64_t image_size = layer.pixels() * width;
      std::fill(bar + begin * image_size, bar + end * image_size, T(0));
      over_windows(layer, begin, end, [&](int64_t pooled, const int64_t (&full)[4]) {
        for (int64_t c = 0; c < width; ++c) {
          const int64_t at = pooled * width + c;
          if (passes(layer, v.act[at])) bar[full[v.winner[at]] * width + c] = out_bar[at];
        }
      });
    });
  }

  static bool passes(const Layer& layer, T act) { return layer.activation != Activation::kRelu || act > T(0); }

  const Network& net_;
  const int64_t images_;
  const NetworkKernels<T>& kernels_;
  T* const scratch_;
};

// --- criteria
// -----------------------------------------------------------------------------------------------------------

// Mean over a task's examples of −log softmax(outputs)[label], or over all entries of (output − target)².
template <typename T>
struct Criterion {
  int64_t images, channels, width;
  const int64_t* labels = nullptr;  // [S]
  const T* targets = nullptr;       // [S, channels]

  // The loss; its derivative in the outputs; the softmax, for `curve`.
  T operator()(const T* outputs, T* probabilities, T* bar) const {
    double loss = 0.0;
    for (int64_t image = 0; image < images; ++image, outputs += width, probabilities += width) {
      if (labels != nullptr) {
        const double most = *std::max_element(outputs, outputs + channels);
        double sum = 0.0;
        for (int64_t c = 0; c < channels; ++c) sum += std::exp(static_cast<double>(outputs[c]) - most);
        loss += std::log(sum) + most - static_cast<double>(outputs[labels[image]]);
        for (int64_t c = 0; c < channels; ++c) {
          probabilities[c] = static_cast<T>(std::exp(static_cast<double>(outputs[c]) - most) / sum);
        }
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          const double error = static_cast<double>(outputs[c]) - static_cast<double>(targets[image * channels + c]);
          loss += error * error;
        }
      }
      if (bar == nullptr) continue;
      T* const row = bar + image * width;
      std::fill(row + channels, row + width, T(0));
      for (int64_t c = 0; c < channels; ++c) {
        row[c] = labels != nullptr ? (probabilities[c] - T(labels[image] == c)) / static_cast<T>(images)
                                   : T(2) * (outputs[c] - targets[image * channels + c]) / entries();
      }
    }
    return static_cast<T>(loss / (labels != nullptr ? static_cast<double>(images) : static_cast<double>(entries())));
  }

  // bar = C dot, C the second derivative in the outputs: (diag p − p pᵀ) / S, or 2 / entries.
  void curve(const T* probabilities, const T* dot, T* bar) const {
    for (int64_t image = 0; image < images; ++image, probabilities += width, dot += width, bar += width) {
      T along = T(0);
      if (labels != nullptr)
        for (int64_t c = 0; c < channels; ++c) along += probabilities[c] * dot[c];
      for (int64_t c = 0; c < channels; ++c) {
        bar[c] = labels != nullptr ? probabilities[c] * (dot[c] - along) / static_cast<T>(images)
                                   : T(2) * dot[c] / entries();
      }
      std::fill(bar + channels, bar + width, T(0));
    }
  }

 private:
  T entries() const { return static_cast<T>(images * channels); }
};

// --- ops ----------------------------------------------------------------------------------------------------

// The arguments of an op, checked.
struct Call {
  Network net;
  int64_t tasks;
  int64_t images;

  Call(const char* op, const at::Tensor& params, at::IntArrayRef network, const char* name = "params")
      : net(Network::parse(network)) {
    TORCH_CHECK_TYPE(params.scalar_type() == at::kFloat || params.scalar_type() == at::kDouble, op, ": ", name,
                     " must be float32 or float64, got ", params.scalar_type());
    TORCH_CHECK_VALUE(params.dim() == 2 && params.size(1) == net.parameters && params.is_contiguous(), op, ": ", name,
                      " must be contiguous of shape [B, ", net.parameters, "], got ", params.sizes());
    tasks = params.size(0);
  }

  void read_x(const char* op, const at::Tensor& x, const at::Tensor& params) {
    TORCH_CHECK_TYPE(x.scalar_type() == params.scalar_type(), op, ": x must have the dtype of params, ",
                     params.scalar_type(), ", got ", x.scalar_type());
    TORCH_CHECK_VALUE(x.dim() >= 3 && x.size(0) == tasks && x.size(1) >= 1 &&
                          x.numel() == tasks * x.size(1) * net.input_size() && x.is_contiguous(),
                      op, ": x must be contiguous of shape [", tasks, ", S, *] with ", net.input_size(),
                      " entries an example, got ", x.sizes());
    images = x.size(1);
  }

  void read_y(const char* op, const at::Tensor& y, const at::Tensor& params, bool check_labels) const {
    const bool labels = y.scalar_type() == at::kLong;
    TORCH_CHECK_TYPE(labels || y.scalar_type() == params.scalar_type(), op,
                     ": y must be int64 labels or have the dtype of params, ", params.scalar_type(), ", got ",
                     y.scalar_type());
    const int64_t each = labels ? 1 : net.outputs();
    TORCH_CHECK_VALUE(y.dim() >= 2 && y.size(0) == tasks && y.size(1) == images && y.numel() == tasks * images * each &&
                          y.is_contiguous(),
                      op, ": y must be contiguous of shape [", tasks, ", ", images, "] with ", each,
                      " entries an example, got ", y.sizes());
    if (!labels || !check_labels) return;
    const int64_t* const from = y.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < y.numel(); ++i) {
      TORCH_CHECK_INDEX(from[i] >= 0 && from[i] < net.outputs(), op, ": y must hold labels in [0, ", net.outputs(),
                        "), got ", from[i]);
    }
  }

  template <typename T>
  Criterion<T> criterion(const at::Tensor& y, int64_t task) const {
    Criterion<T> c{images, net.outputs(), net.layers.back().width()};
    const int64_t at = task * (tasks == 0 ? 0 : y.numel() / tasks);
    if (y.scalar_type() == at::kLong) {
      c.labels = y.const_data_ptr<int64_t>() + at;
    } else {
      c.targets = y.const_data_ptr<T>() + at;
    }
    return c;
  }
};

// Calls body(task, memory) for every task: as many side by side as there are threads, and what then remains one after
// another with the work inside split.
template <typename Body>
void over_tasks(int64_t tasks, int64_t bytes, const Body& body) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t together = tasks / threads * threads;
  const int64_t lanes = together > 0 ? threads : 1;
  const at::Tensor memory = at::empty({lanes, bytes}, at::kByte);
  char* const base = static_cast<char*>(memory.mutable_data_ptr());
  const int64_t share = together / threads;
  at::parallel_for(0, together > 0 ? threads : 0, 1, [&](int64_t first, int64_t last) {
    for (int64_t lane = first; lane < last; ++lane)
      for (int64_t task = lane * share; task < (lane + 1) * share; ++task) body(task, base + lane * bytes);
  });
  for (int64_t task = together; task < tasks; ++task) body(task, base);
}

// Bytes of what second derivatives need of a task.
template <typename T>
int64_t tape_size(const Network& net, int64_t images) {
  Arena measure(nullptr);
  Storage<T>(net, images, Keep::kBars, true, measure);
  return measure.used();
}

// Room for tapes. The last one is kept when it is not too large, and taken again once nobody else holds it: fresh
// memory costs about as much as filling it.
at::Tensor take_tape(int64_t tasks, int64_t bytes) {
  constexpr int64_t kMostKept = int64_t{256} << 20;
  static thread_local at::Tensor kept;
  if (kept.defined() && kept.use_count() == 1 && kept.size(0) == tasks && kept.size(1) == bytes) return kept;
  const at::Tensor tape = at::empty({tasks, bytes}, at::kByte);
  if (tape.numel() <= kMostKept) kept = tape;
  return tape;
}

// [S, width] without the padding
template <typename T>
void copy_outputs(const Network& net, int64_t images, const T* from, T* to) {
  for (int64_t image = 0; image < images; ++image) {
    const T* const row = from + image * net.layers.back().width();
    std::copy(row, row + net.outputs(), to + image * net.outputs());
  }
}

at::Tensor network_outputs(const at::Tensor& params, const at::Tensor& x, at::IntArrayRef network) {
  Call call("network_outputs", params, network);
  call.read_x("network_outputs", x, params);
  const Network& net = call.net;
  const at::Tensor outputs = at::empty({call.tasks, call.images, net.outputs()}, params.options());
  AT_DISPATCH_FLOATING_TYPES(params.scalar_type(), "imaml_ext", [&] {
    using T = scalar_t;
    const auto layout = [&](void* base) {
      Arena arena(base);
      T* const scratch = arena.take<T>(Task<T>::scratch_size(net));
      Storage<T> storage(net, call.images, Keep::kNothing, false, arena);
      return std::tuple(scratch, std::move(storage), arena.used());
    };
    over_tasks(call.tasks, std::get<2>(layout(nullptr)), [&](int64_t task, void* memory) {
      auto [scratch, storage, used] = layout(memory);
      const Task<T> pass(net, call.images, scratch);
      pass.read_input(x.const_data_ptr<T>() + task * call.images * net.input_size(), storage.input);
      pass.forward(params.const_data_ptr<T>() + task * net.parameters, storage);
      copy_outputs(net, call.images, storage.values.back().out,
                   outputs.mutable_data_ptr<T>() + task * call.images * net.outputs());
    });
  });
  return outputs;
}

// Losses [B], outputs [B, S, K] and gradients [B, N]; with Keep::kBars also what second derivatives need, [B, bytes].
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> differentiate(const char* op, const at::Tensor& params,
                                                                         const at::Tensor& x, const at::Tensor& y,
                                                                         at::IntArrayRef network, Keep keep) {
  Call call(op, params, network);
  call.read_x(op, x, params);
  call.read_y(op, y, params, true);
  const Network& net = call.net;
  const at::Tensor losses = at::empty({call.tasks}, params.options());
  const at::Tensor outputs = at::empty({call.tasks, call.images, net.outputs()}, params.options());
  const at::Tensor gradient = at::empty_like(params);
  at::Tensor tape;
  AT_DISPATCH_FLOATING_TYPES(params.scalar_type(), "imaml_ext", [&] {
    using T = scalar_t;
    Arena scratch_measure(nullptr), storage_measure(nullptr);
    scratch_measure.take<T>(Task<T>::scratch_size(net));
    Storage<T>(net, call.images, keep, true, storage_measure);
    const int64_t stored = storage_measure.used();
    if (keep == Keep::kBars) tape = take_tape(call.tasks, stored);
    const int64_t bytes = scratch_measure.used() + (keep == Keep::kBars ? 0 : stored);
    over_tasks(call.tasks, bytes, [&](int64_t task, char* memory) {
      void* const place = keep == Keep::kBars ? static_cast<char*>(tape.mutable_data_ptr()) + task * stored
                                              : memory + scratch_measure.used();
      Arena arena(place);
      Storage<T> storage(net, call.images, keep, true, arena);
      const Task<T> pass(net, call.images, reinterpret_cast<T*>(memory));
      const T* const row = params.const_data_ptr<T>() + task * net.parameters;
      pass.read_input(x.const_data_ptr<T>() + task * call.images * net.input_size(), storage.input);
      pass.forward(row, storage);
      const T* const out = storage.values.back().out;
      losses.mutable_data_ptr<T>()[task] =
          call.criterion<T>(y, task)(out, storage.probabilities, storage.bars.back().out_bar);
      copy_outputs(net, call.images, out, outputs.mutable_data_ptr<T>() + task * call.images * net.outputs());
      pass.backward(row, storage, gradient.mutable_data_ptr<T>() + task * net.parameters);
    });
  });
  return {losses, outputs, gradient, tape};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> network_gradient(const at::Tensor& params, const at::Tensor& x,
                                                                const at::Tensor& y, at::IntArrayRef network) {
  auto [losses, outputs, gradient, tape] = differentiate("network_gradient", params, x, y, network, Keep::kNothing);
  return {losses, outputs, gradient};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> network_linearise(const at::Tensor& params,
                                                                             const at::Tensor& x, const at::Tensor& y,
                                                                             at::IntArrayRef network) {
  return differentiate("network_linearise", params, x, y, network, Keep::kBars);
}

// A task takes all of its steps before the next one begins: its φ, its gradient and its activations stay in the cache.
at::Tensor network_descend_(at::Tensor& phi, const at::Tensor& theta, const at::Tensor& lam, const at::Tensor& lr,
                            const at::Tensor& x, const at::Tensor& y, at::IntArrayRef network, int64_t steps) {
  const char* const op = "network_descend_";
  Call call(op, phi, network, "phi");
  call.read_x(op, x, phi);
  call.read_y(op, y, phi, true);
  TORCH_CHECK_VALUE(steps >= 0, op, ": steps must be at least 0, got ", steps);
  ProxTensors prox;
  prox.phi = phi, prox.theta = theta, prox.lam = lam, prox.lr = lr;
  prox.check(op);
  const Network& net = call.net;
  const at::Tensor losses = at::empty({steps, call.tasks}, phi.options());
  AT_DISPATCH_FLOATING_TYPES(phi.scalar_type(), "imaml_ext", [&] {
    using T = scalar_t;
    const ProxArguments<T> rows = prox.arguments<T>();
    const auto step = prox_kernels<T>().sgd;
    const auto layout = [&](void* base) {
      Arena arena(base);
      T* const scratch = arena.take<T>(Task<T>::scratch_size(net));
      T* const gradient = arena.take<T>(net.parameters);
      Storage<T> storage(net, call.images, Keep::kNothing, true, arena);
      return std::tuple(scratch, gradient, std::move(storage), arena.used());
    };
    over_tasks(call.tasks, std::get<3>(layout(nullptr)), [&](int64_t task, char* memory) {
      auto [scratch, gradient, storage, used] = layout(memory);
      const Task<T> pass(net, call.images, scratch);
      pass.read_input(x.const_data_ptr<T>() + task * call.images * net.input_size(), storage.input);
      const Criterion<T> criterion = call.criterion<T>(y, task);
      ProxArguments<T> row = rows;  // of this task alone
      row.rows = 1;
      row.phi += task * rows.cols;
      row.theta += task * rows.theta_row_stride;
      row.lam.data += task * rows.lam.row_stride;
      row.lr.data += task * rows.lr.row_stride;
      row.grad = gradient;
      for (int64_t k = 0; k < steps; ++k) {
        pass.forward(row.phi, storage);
        losses.mutable_data_ptr<T>()[k * call.tasks + task] =
            criterion(storage.values.back().out, storage.probabilities, storage.bars.back().out_bar);
        pass.backward(row.phi, storage, gradient);
        split(pieces_of(rows.cols),
              [&](int64_t first, int64_t last) { step(row, 0, first * kPiece, std::min(last * kPiece, rows.cols)); });
      }
    });
  });
  return losses;
}

// For every task: the derivative of its values along p, the criterion's second derivative of it in output_bar, and then
// finish(task, call, pass, storage, dots).
template <typename Finish>
void along(const char* op, const at::Tensor& params, const at::Tensor& tape, const at::Tensor& y, const at::Tensor& p,
           at::IntArrayRef network, const Finish& finish) {
  Call call(op, params, network);
  const Network& net = call.net;
  TORCH_CHECK_VALUE(y.dim() >= 2, op, ": y must have shape [B, S] or [B, S, *], got ", y.sizes());
  call.images = y.size(1);
  call.read_y(op, y, params, false);
  check_like(op, "p", p, "params", params);
  AT_DISPATCH_FLOATING_TYPES(params.scalar_type(), "imaml_ext", [&] {
    using T = scalar_t;
    const int64_t stored = tape_size<T>(net, call.images);
    check_table(op, "tape", tape, at::kByte, {call.tasks, stored}, params);
    Arena work(nullptr);
    work.take<T>(Task<T>::scratch_size(net));
    DotStorage<T>(net, call.images, work);
    over_tasks(call.tasks, work.used(), [&](int64_t task, char* memory) {
      Arena kept(const_cast<char*>(static_cast<const char*>(tape.const_data_ptr())) + task * stored);
      Storage<T> storage(net, call.images, Keep::kBars, true, kept);
      Arena arena(memory);
      T* const scratch = arena.take<T>(Task<T>::scratch_size(net));
      DotStorage<T> dots(net, call.images, arena);
      const Task<T> pass(net, call.images, scratch);
      const int64_t row = task * net.parameters;
      pass.tangent(params.const_data_ptr<T>() + row, p.const_data_ptr<T>() + row, storage, dots);
      call.criterion<T>(y, task).curve(storage.probabilities, dots.dots.back().out_dot, pass.output_bar(dots));
      finish(task, call, pass, storage, dots);
    });
  });
}

at::Tensor network_product(const at::Tensor& params, const at::Tensor& tape, const at::Tensor& y, const at::Tensor& p,
                           at::IntArrayRef network, bool gauss_newton) {
  const at::Tensor product = at::empty_like(p);
  along("network_product", params, tape, y, p, network,
        [&]<typename T>(int64_t task, const Call& call, const Task<T>& pass, Storage<T>& storage, DotStorage<T>& dots) {
          const int64_t row = task * call.net.parameters;
          const T* const theta = params.const_data_ptr<T>() + row;
          T* const to = product.mutable_data_ptr<T>() + row;
          if (gauss_newton) {
            pass.gauss_newton(theta, storage, dots, to);
          } else {
            pass.second(theta, p.const_data_ptr<T>() + row, storage, dots, to);
          }
        });
  return product;
}

at::Tensor network_curvature(const at::Tensor& params, const at::Tensor& tape, const at::Tensor& y, const at::Tensor& p,
                             at::IntArrayRef network) {
  const at::Tensor curvature = at::empty({params.size(0)}, params.options().dtype(at::kDouble));
  along("network_curvature", params, tape, y, p, network,
        [&]<typename T>(int64_t task, const Call& call, const Task<T>& pass, Storage<T>&, DotStorage<T>& dots) {
          const T* const dot = dots.dots.back().out_dot;  // J p
          const T* const bar = pass.output_bar(dots);     // C J p
          const int64_t width = call.net.layers.back().width();
          double sum = 0.0;
          for (int64_t image = 0; image < call.images; ++image)
            for (int64_t c = 0; c < call.net.outputs(); ++c)
              sum += static_cast<double>(dot[image * width + c]) * static_cast<double>(bar[image * width + c]);
          curvature.mutable_data_ptr<double>()[task] = sum;
        });
  return curvature;
}

}  // namespace

int64_t network_tape_size(at::IntArrayRef description, int64_t images, int64_t item_size) {
  const Network net = Network::parse(description);
  return item_size == sizeof(float) ? tape_size<float>(net, images) : tape_size<double>(net, images);
}

TORCH_LIBRARY_IMPL(imaml_ext, CPU, m) {
  m.impl("network_outputs", &network_outputs);
  m.impl("network_gradient", &network_gradient);
  m.impl("network_descend_", &network_descend_);
  m.impl("network_linearise", &network_linearise);
  m.impl("network_product", &network_product);
  m.impl("network_curvature", &network_curvature);
}

}  // namespace imaml_ext
