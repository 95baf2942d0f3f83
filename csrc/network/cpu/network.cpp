// The reference networks on the CPU: a task at a time through all of its layers, so that its activations stay in the
// cache, and tasks side by side; where tasks are fewer than threads, the work inside a task is split.
#include "network/arguments.h"
#include "network/criterion.h"
#include "network/pass.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

#include "common/cpu/kernels.h"

namespace imaml_ext {
namespace {

// The work on [0, n), in pieces side by side unless tasks already are.
template <typename Body>
void split(int64_t n, const Body& body) {
  if (at::in_parallel_region() || at::get_num_threads() == 1) {
    body(0, n);
  } else {
    at::parallel_for(0, n, 1, body);
  }
}

// The taps of every layer, made once per op.
std::vector<std::vector<Tap>> taps_of(const Network& net) {
  std::vector<std::vector<Tap>> taps;
  for (const Layer& layer : net.layers) taps.push_back(taps_of(layer));
  return taps;
}

// The layers of one task, as NetworkPass calls them.
template <typename Number>
class TaskKernels {
 public:
  using T = Number;
  using Memory = Arena;
  using Gradient = T*;
  using Terms = std::initializer_list<Term<const T*>>;

  // `weights` is scratch for the largest weight of any layer, padded.
  TaskKernels(const Network& net, const std::vector<std::vector<Tap>>& taps, int64_t images, T* weights)
      : net_(net), taps_(taps), images_(images), kernels_(network_kernels<T>()), scratch_(weights) {}

  static int64_t scratch_size(const Network& net) {
    int64_t most = 0;
    for (const Layer& layer : net.layers) {
      most =
          std::max({most, layer.taps * layer.depth * layer.width(), layer.taps * layer.channels * layer.depth_width()});
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

  void forward(const Layer& layer, const T* params, const LayerValues<T>& v, Terms operands) const {
    multiply(layer, v.hat, operands);
    pad(params, layer, v.gamma, v.beta);
    columns(layer, arguments(layer, v), kernels_.norm);
    if (layer.pool == Pool::kMax) max_pool(layer, v);
    if (layer.pool == Pool::kMean) mean_pool(layer, v.act, v.out);
  }

  void tangent(const Layer& layer, const T*, const T* direction, const LayerValues<T>& v, const LayerDots<T>& d,
               Terms operands) const {
    multiply(layer, d.hat_dot, operands);
    pad(direction, layer, d.gamma_dot, d.beta_dot);
    columns(layer, arguments(layer, v, d), kernels_.norm_tangent);
    if (layer.pool == Pool::kMax) max_pool_tangent(layer, v, d);
    if (layer.pool == Pool::kMean) mean_pool(layer, d.act_dot, d.out_dot);
  }

  void outer(const Layer& layer, T* weight_bar, Terms pairs) const {
    bool add = false;
    for (const auto& [in, out_bar] : pairs) outer(layer, in, out_bar, weight_bar, std::exchange(add, true));
  }

  template <typename NormBelow>
  void products_back(const Layer& layer, T* weight_bar, Terms pairs, T* in_bar, Terms operands,
                     const NormBelow& below) const {
    outer(layer, weight_bar, pairs);
    bool add = false;
    for (const auto& [out_bar, weight] : operands) {
      multiply_transposed(layer, out_bar, weight, in_bar, std::exchange(add, true));
    }
    norm_back(below);
  }

  void norm_back(const NormBackward<TaskKernels>& of) const {
    const auto& [layer, params, v, b, gradient] = of;
    if (layer.pool != Pool::kNone) unpool(layer, v, b.out_bar, b.z_bar);
    NormArguments<T> n = arguments(layer, v);
    n.z_bar = b.z_bar, n.y_bar = b.y_bar, n.gamma_bar = b.gamma_bar, n.beta_bar = b.beta_bar;
    columns(layer, n, kernels_.norm_backward);
    unpad(layer, b.gamma_bar, b.beta_bar, gradient);
  }

  void norm_back(const NormSecond<TaskKernels>& of) const {
    const auto& [layer, params, direction, v, b, d, out_bar_dot, bar_dot, product] = of;
    if (layer.pool != Pool::kNone) unpool(layer, v, out_bar_dot, bar_dot);
    NormArguments<T> n = arguments(layer, v, d);
    n.z_bar = b.z_bar, n.gamma_bar = b.gamma_bar, n.beta_bar = b.beta_bar;
    n.y_bar_dot = bar_dot;
    n.gamma_bar_dot = d.gamma_bar_dot, n.beta_bar_dot = d.beta_bar_dot;
    columns(layer, n, kernels_.norm_second);
    unpad(layer, d.gamma_bar_dot, d.beta_bar_dot, product);
  }

 private:
  static constexpr int64_t kRowsAtOnce = 480;  // pointers on the stack; a multiple of every tile

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

  void multiply(const Layer& layer, T* out, Terms operands) const {
    bool add = false;
    for (const auto& [in, weight] : operands) multiply(layer, in, weight, out, std::exchange(add, true));
  }

  // out[to] ← or += Σ in[from] · weight[tap]
  void multiply(const Layer& layer, const T* in, const T* weight, T* out, bool add) const {
    const int64_t panel = layer.depth * layer.channels;
    const int64_t width = layer.width();
    if (width != layer.channels) {  // rows of the weight with zeros at their ends
      for (int64_t row = 0; row < layer.taps * layer.depth; ++row) {
        const T* const from = weight + row * layer.channels;
        std::fill(std::copy(from, from + layer.channels, scratch_ + row * width), scratch_ + (row + 1) * width, T(0));
      }
      weight = scratch_;
    }
    const int64_t stride = width == layer.channels ? panel : layer.depth * width;
    split(images_, [&](int64_t first, int64_t last) {
      bool further = add;
      for (const Tap& tap : taps(layer)) {
        over_pairs(tap.pairs, first, last, in, layer.pixels_in, layer.depth_width(), out, layer.pixels(), width,
                   [&](const T* const* a, const T* const* c, int64_t rows) {
                     kernels_.multiply(a, const_cast<T* const*>(c), rows, layer.depth, weight + tap.index * stride,
                                       width, further);
                   });
        further = true;
      }
    });
  }

  // in_bar[from] ← or += Σ out_bar[to] · weight[tap]ᵀ
  void multiply_transposed(const Layer& layer, const T* out_bar, const T* weight, T* in_bar, bool add) const {
    const int64_t width = layer.depth_width();
    const int64_t panel = layer.channels * width;
    split(layer.taps, [&](int64_t first, int64_t last) {
      for (int64_t tap = first; tap < last; ++tap) {
        kernels_.transpose(weight + tap * layer.depth * layer.channels, layer.depth, layer.channels,
                           scratch_ + tap * panel, width);
      }
    });
    split(images_, [&](int64_t first, int64_t last) {
      if (!add) {
        std::fill(in_bar + first * layer.pixels_in * width, in_bar + last * layer.pixels_in * width, T(0));
      }
      for (const Tap& tap : taps(layer)) {
        over_pairs(tap.pairs, first, last, in_bar, layer.pixels_in, width, out_bar, layer.pixels(), layer.width(),
                   [&](const T* const* c, const T* const* a, int64_t rows) {
                     kernels_.multiply(a, const_cast<T* const*>(c), rows, layer.channels, scratch_ + tap.index * panel,
                                       width, true);
                   });
      }
    });
  }

  // weight_bar[tap] ← or += Σ in[from]ᵀ out_bar[to]
  void outer(const Layer& layer, const T* in, const T* out_bar, T* weight_bar, bool add) const {
    constexpr int64_t kBlock = 96;  // channels of a tap; a multiple of the tile
    const int64_t blocks = (layer.depth + kBlock - 1) / kBlock;
    split(layer.taps * blocks, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const Tap& tap = taps(layer)[k / blocks];
        const int64_t first = k % blocks * kBlock;
        const int64_t last = std::min(first + kBlock, layer.depth);
        T* const to = weight_bar + tap.index * layer.depth * layer.channels;
        bool further = add;
        over_pairs(tap.pairs, 0, images_, in, layer.pixels_in, layer.depth_width(), out_bar, layer.pixels(),
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

  const std::vector<Tap>& taps(const Layer& layer) const { return taps_[&layer - net_.layers.data()]; }

  const Network& net_;
  const std::vector<std::vector<Tap>>& taps_;
  const int64_t images_;
  const NetworkKernels<T>& kernels_;
  T* const scratch_;
};

// --- criteria
// -----------------------------------------------------------------------------------------------------------

// The criterion of one task.
template <typename T>
struct Criterion {
  int64_t images, channels, width;
  const int64_t* labels = nullptr;  // [S]
  const T* targets = nullptr;       // [S, channels]

  Criterion(const NetworkArguments<T>& a, int64_t task)
      : images(a.images), channels(a.net.outputs()), width(a.net.layers.back().width()) {
    if (a.labels != nullptr) labels = a.labels + task * a.targets_stride();
    if (a.targets != nullptr) targets = a.targets + task * a.targets_stride();
  }

  // The loss; its derivative in the outputs; the softmax, for `curve`.
  T operator()(const T* outputs, T* probabilities, T* bar) const {
    double loss = 0.0;
    for (int64_t image = 0; image < images; ++image, outputs += width, probabilities += width) {
      if (labels != nullptr) {
        const double most = *std::max_element(outputs, outputs + channels);
        double sum = 0.0;
        for (int64_t c = 0; c < channels; ++c) sum += std::exp(static_cast<double>(outputs[c]) - most);
        loss += rule().cross_entropy(outputs[labels[image]], most, sum);
        for (int64_t c = 0; c < channels; ++c) probabilities[c] = rule().probability(outputs[c], most, sum);
      } else {
        for (int64_t c = 0; c < channels; ++c) loss += rule().squared_error(outputs[c], targets[image * channels + c]);
      }
      T* const row = bar + image * width;
      std::fill(row + channels, row + width, T(0));
      for (int64_t c = 0; c < channels; ++c) {
        row[c] = labels != nullptr ? rule().cross_entropy_bar(probabilities[c], labels[image] == c)
                                   : rule().squared_error_bar(outputs[c], targets[image * channels + c]);
      }
    }
    return static_cast<T>(loss / static_cast<double>(labels != nullptr ? rule().images : rule().entries));
  }

  // bar = C dot
  void curve(const T* probabilities, const T* dot, T* bar) const {
    for (int64_t image = 0; image < images; ++image, probabilities += width, dot += width, bar += width) {
      T along = T(0);
      if (labels != nullptr)
        for (int64_t c = 0; c < channels; ++c) along += probabilities[c] * dot[c];
      for (int64_t c = 0; c < channels; ++c) {
        bar[c] = labels != nullptr ? rule().cross_entropy_curve(probabilities[c], dot[c], along)
                                   : rule().squared_error_curve(dot[c]);
      }
      std::fill(bar + channels, bar + width, T(0));
    }
  }

 private:
  CriterionRule<T> rule() const { return {static_cast<T>(images), static_cast<T>(images * channels)}; }
};

// --- ops ----------------------------------------------------------------------------------------------------

// Calls body(task, memory) for every task: as many side by side as there are threads, and what then remains one after
// another with the work inside split.
template <typename Body>
void over_tasks(int64_t tasks, int64_t bytes, const Body& body) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t together = tasks / threads * threads;
  const int64_t lanes = together > 0 ? threads : 1;
  constexpr std::align_val_t kCacheLine{64};
  const auto release = [](char* memory) { ::operator delete[](memory, kCacheLine); };
  const std::unique_ptr<char[], decltype(release)> memory(
      static_cast<char*>(::operator new[](static_cast<size_t>(lanes * bytes), kCacheLine)), release);
  char* const base = memory.get();
  const int64_t share = together / threads;
  at::parallel_for(0, together > 0 ? threads : 0, 1, [&](int64_t first, int64_t last) {
    for (int64_t lane = first; lane < last; ++lane)
      for (int64_t task = lane * share; task < (lane + 1) * share; ++task) body(task, base + lane * bytes);
  });
  for (int64_t task = together; task < tasks; ++task) body(task, base);
}

// [S, width] without the padding
template <typename T>
void copy_outputs(const Network& net, int64_t images, const T* from, T* to) {
  for (int64_t image = 0; image < images; ++image) {
    const T* const row = from + image * net.layers.back().width();
    std::copy(row, row + net.outputs(), to + image * net.outputs());
  }
}

// For every task: the derivative of its values along the direction, the criterion's second derivative of it in
// output_bar, and then finish(task, its params, pass, storage, dots).
template <typename T, typename Finish>
void along(const NetworkArguments<T>& a, const Finish& finish) {
  const Network& net = a.net;
  const auto taps = taps_of(net);
  const int64_t stored = a.shared ? 0 : tape_size<T>(net, a.images);
  Arena work(nullptr);
  work.take<T>(TaskKernels<T>::scratch_size(net));
  DotStorage<T>(net, a.images, work);
  over_tasks(a.tasks, work.used(), [&](int64_t task, char* memory) {
    Arena kept(a.tape + task * stored);
    Storage<T> storage(net, a.images, Keep::kBars, true, kept);
    Arena arena(memory);
    T* const scratch = arena.take<T>(TaskKernels<T>::scratch_size(net));
    DotStorage<T> dots(net, a.images, arena);
    const TaskKernels<T> kernels(net, taps, a.images, scratch);
    const NetworkPass<TaskKernels<T>> pass(net, kernels);
    const T* const params = a.params + task * a.params_stride();
    pass.tangent(params, a.direction + task * net.parameters, storage, dots);
    Criterion<T>(a, task).curve(storage.probabilities, dots.dots.back().out_dot, pass.output_bar(dots));
    finish(task, params, pass, storage, dots);
  });
}

}  // namespace

template <typename T>
void network_outputs(OnCpu, const NetworkArguments<T>& a) {
  const Network& net = a.net;
  const auto taps = taps_of(net);
  const auto layout = [&](void* base) {
    Arena arena(base);
    T* const scratch = arena.take<T>(TaskKernels<T>::scratch_size(net));
    Storage<T> storage(net, a.images, Keep::kNothing, false, arena);
    return std::tuple(scratch, std::move(storage), arena.used());
  };
  over_tasks(a.tasks, std::get<2>(layout(nullptr)), [&](int64_t task, void* memory) {
    auto [scratch, storage, used] = layout(memory);
    const TaskKernels<T> kernels(net, taps, a.images, scratch);
    const NetworkPass<TaskKernels<T>> pass(net, kernels);
    kernels.read_input(a.x + task * a.images * net.input_size(), storage.input);
    pass.forward(a.params + task * net.parameters, storage);
    copy_outputs(net, a.images, storage.values.back().out, a.outputs + task * a.images * net.outputs());
  });
}

template <typename T>
void network_gradient(OnCpu, const NetworkArguments<T>& a) {
  const Network& net = a.net;
  const auto taps = taps_of(net);
  const Keep keep = a.tape != nullptr ? Keep::kBars : Keep::kNothing;
  Arena scratch_measure(nullptr), storage_measure(nullptr);
  scratch_measure.take<T>(TaskKernels<T>::scratch_size(net));
  Storage<T>(net, a.images, keep, true, storage_measure);
  const int64_t stored = storage_measure.used();
  const int64_t bytes = scratch_measure.used() + (keep == Keep::kBars ? 0 : stored);
  over_tasks(a.tasks, bytes, [&](int64_t task, char* memory) {
    Arena arena(keep == Keep::kBars ? a.tape + task * stored : memory + scratch_measure.used());
    Storage<T> storage(net, a.images, keep, true, arena);
    const TaskKernels<T> kernels(net, taps, a.images, reinterpret_cast<T*>(memory));
    const NetworkPass<TaskKernels<T>> pass(net, kernels);
    const T* const row = a.params + task * net.parameters;
    kernels.read_input(a.x + task * a.images * net.input_size(), storage.input);
    pass.forward(row, storage);
    const T* const out = storage.values.back().out;
    a.losses[task] = Criterion<T>(a, task)(out, storage.probabilities, storage.bars.back().out_bar);
    copy_outputs(net, a.images, out, a.outputs + task * a.images * net.outputs());
    pass.backward(row, storage, a.gradient + task * net.parameters);
  });
}

// A task takes all of its steps before the next one begins: its φ, its gradient and its activations stay in the cache.
template <typename T>
void network_descend(OnCpu, const NetworkArguments<T>& a, const ProxArguments<T>& prox, int64_t steps) {
  const Network& net = a.net;
  const auto taps = taps_of(net);
  const auto step = prox_kernels<T>().sgd;
  const auto layout = [&](void* base) {
    Arena arena(base);
    T* const scratch = arena.take<T>(TaskKernels<T>::scratch_size(net));
    T* const gradient = arena.take<T>(net.parameters);
    Storage<T> storage(net, a.images, Keep::kNothing, true, arena);
    return std::tuple(scratch, gradient, std::move(storage), arena.used());
  };
  over_tasks(a.tasks, std::get<3>(layout(nullptr)), [&](int64_t task, char* memory) {
    auto [scratch, gradient, storage, used] = layout(memory);
    const TaskKernels<T> kernels(net, taps, a.images, scratch);
    const NetworkPass<TaskKernels<T>> pass(net, kernels);
    kernels.read_input(a.x + task * a.images * net.input_size(), storage.input);
    const Criterion<T> criterion(a, task);
    ProxArguments<T> row = prox;  // of this task alone
    row.rows = 1;
    row.phi += task * prox.cols;
    row.theta += task * prox.theta_row_stride;
    row.lam.data += task * prox.lam.row_stride;
    row.lr.data += task * prox.lr.row_stride;
    row.grad = gradient;
    for (int64_t k = 0; k < steps; ++k) {
      pass.forward(row.phi, storage);
      a.losses[k * a.tasks + task] =
          criterion(storage.values.back().out, storage.probabilities, storage.bars.back().out_bar);
      pass.backward(row.phi, storage, gradient);
      split(pieces_of(prox.cols),
            [&](int64_t first, int64_t last) { step(row, 0, first * kPiece, std::min(last * kPiece, prox.cols)); });
    }
  });
}

template <typename T>
void network_product(OnCpu, const NetworkArguments<T>& a, bool gauss_newton) {
  along(a, [&](int64_t task, const T* params, const NetworkPass<TaskKernels<T>>& pass, const Storage<T>& storage,
               const DotStorage<T>& dots) {
    const int64_t row = task * a.net.parameters;
    if (gauss_newton) {
      pass.gauss_newton(params, storage, dots, a.product + row);
    } else {
      pass.second(params, a.direction + row, storage, dots, a.product + row);
    }
  });
}

template <typename T>
void network_curvature(OnCpu, const NetworkArguments<T>& a) {
  along(a, [&](int64_t task, const T*, const NetworkPass<TaskKernels<T>>& pass, const Storage<T>&,
               const DotStorage<T>& dots) {
    const T* const dot = dots.dots.back().out_dot;  // J p
    const T* const bar = pass.output_bar(dots);     // C J p
    const int64_t width = a.net.layers.back().width();
    double sum = 0.0;
    for (int64_t image = 0; image < a.images; ++image)
      for (int64_t c = 0; c < a.net.outputs(); ++c)
        sum += static_cast<double>(dot[image * width + c]) * static_cast<double>(bar[image * width + c]);
    a.curvature[task] = sum;
  });
}

IMAML_INSTANTIATE_NETWORK(OnCpu, float)
IMAML_INSTANTIATE_NETWORK(OnCpu, double)

}  // namespace imaml_ext
