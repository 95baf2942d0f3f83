// The layers of all tasks at once, as NetworkPass calls them: a kernel launch or a few for each.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "network/cuda/elements.cuh"
#include "network/cuda/norm.cuh"
#include "network/cuda/products.cuh"
#include "network/pass.h"

namespace imaml_ext {

// Room for sums on their way: of the slices of a norm, and of those of an outer product.
template <typename T, typename Memory>
struct Scratch {
  typename Memory::template Pointer<double> norm;
  typename Memory::template Pointer<T> outer;
};
template <typename T, typename Memory>
Scratch<T, Memory> take_scratch(const Network& net, int64_t images, Memory& memory) {
  int64_t of_norm = 0, of_outer = 0;
  for (const Layer& layer : net.layers) {
    of_norm = std::max(of_norm, norm_partial_size<T>(layer, images));
    of_outer = std::max(of_outer, slices_size(layer, images));
  }
  const auto norm = memory.template take<double>(of_norm);
  return {norm, memory.template take<T>(of_outer)};
}

template <typename Number>
class BatchKernels {
 public:
  using T = Number;
  using Memory = TaskMemory;
  using P = PerTask<T>;
  using Read = PerTask<const T>;
  using Gradient = ParametersOut<T>;
  using Terms = std::initializer_list<Term<Read>>;
  using Values = LayerValues<T, TaskMemory>;
  using Bars = LayerBars<T, TaskMemory>;
  using Dots = LayerDots<T, TaskMemory>;

  BatchKernels(cudaStream_t stream, const Network& net, int64_t tasks, int64_t images,
               const Scratch<T, TaskMemory>& scratch)
      : stream_(stream), net_(net), tasks_(tasks), images_(images), scratch_(scratch) {}

  void read_input(Read x, P input) const {
    const Layer& first = net_.layers.front();
    InputArguments<T> a{};
    a.x = x, a.input = input;
    a.channels = narrow(net_.in_channels), a.height = narrow(net_.height), a.width = narrow(net_.width);
    a.stride = narrow(net_.patch_stride);
    a.size = narrow(images_ * first.pixels_in * first.depth_width());
    a.by_row_width = Divisor(first.depth_width());
    a.by_rows = Divisor(net_.patch_stride == 0 ? net_.height : first.rows);
    a.by_cols = Divisor(net_.patch_stride == 0 ? net_.width : first.cols);
    a.by_channels = Divisor(net_.in_channels);
    const int64_t blocks = ceil_div(a.size, kElementThreads);
    launch<input_kernel<T>>(stream_, {grid_of(blocks, tasks_), kElementThreads}, a, narrow(blocks));
  }

  // Whether a layer's bars are those of the outputs, so that the criterion sums them for β.
  static bool is_plain(const Layer& layer) {
    return layer.norm == Norm::kBias && layer.activation == Activation::kIdentity && layer.pool == Pool::kNone;
  }

  void forward(const Layer& layer, Read params, const Values& v, Terms operands) const {
    ProductArguments<T> a = product(layer, v.hat, operands);
    const NormRows<T> n = arguments(layer, params, v);
    if (layer.norm == Norm::kBias) {
      a.beta = n.beta, a.activation = layer.activation;
      if (n.activates) a.activated = v.act;
    }
    multiply<NormWay::kForward>(layer, a, n);
  }
  void tangent(const Layer& layer, Read params, Read direction, const Values& v, const Dots& d, Terms operands) const {
    ProductArguments<T> a = product(layer, d.hat_dot, operands);
    const NormRows<T> n = arguments(layer, params, direction, v, d);
    if (layer.norm == Norm::kBias) {
      a.beta = n.beta_dot, a.activation = layer.activation;
      if (n.activates) a.activated = d.act_dot, a.act = v.act;
    }
    multiply<NormWay::kTangent>(layer, a, n);
  }

  void norm_back(const NormBackward<BatchKernels>& of) const { norm_back<NormWay::kBackward>(of); }
  void norm_back(const NormSecond<BatchKernels>& of) const { norm_back<NormWay::kSecond>(of); }

  void outer(const Layer& layer, const Gradient& weight_bar, Terms pairs) const {
    ProductArguments<T> none{};
    launch_back(stream_, none, NormRows<T>{}, NormWay::kNone, outer(layer, pairs), weight_bar, scratch_.outer, tasks_);
  }

  void products_back(const Layer& layer, const Gradient& weight_bar, Terms pairs, P in_bar, Terms operands,
                     const NormBackward<BatchKernels>& below) const {
    products_back<NormWay::kBackward>(layer, weight_bar, pairs, in_bar, operands, below);
  }
  void products_back(const Layer& layer, const Gradient& weight_bar, Terms pairs, P in_bar, Terms operands,
                     const NormSecond<BatchKernels>& below) const {
    products_back<NormWay::kSecond>(layer, weight_bar, pairs, in_bar, operands, below);
  }

 private:
  static int narrow(int64_t number) { return static_cast<int>(number); }  // NetworkCall::check_sizes_on_cuda

  ProductArguments<T> product(const Layer& layer, P out, Terms operands) const {
    ProductArguments<T> a{};
    for (const auto& [rows, weight] : operands) a.rows[a.terms] = rows, a.weight[a.terms++] = weight;
    a.out = out;
    a.down = layer.down, a.across = layer.across;
    a.images = narrow(images_);
    a.from_width = narrow(layer.depth_width()), a.out_width = narrow(layer.width());
    a.depth = narrow(layer.depth), a.channels = narrow(layer.channels);
    return a;
  }
  OuterArguments<T> outer(const Layer& layer, Terms pairs) const {
    OuterArguments<T> a{};
    for (const auto& [in, out_bar] : pairs) a.in[a.pairs] = in, a.out_bar[a.pairs++] = out_bar;
    a.down = layer.down, a.across = layer.across;
    a.taps = narrow(layer.taps), a.total = narrow(images_ * layer.pixels());
    a.depth = narrow(layer.depth), a.channels = narrow(layer.channels), a.width = narrow(layer.width());
    a.by_depth_width = Divisor(layer.depth_width()), a.by_kernel = Divisor(layer.across.kernel);
    a.by_rows = Divisor(layer.rows), a.by_cols = Divisor(layer.cols);
    a.rows_per_slice = narrow(rows_per_slice(layer)), a.slices = narrow(slices_of(layer, images_));
    return a;
  }

  // A product and what follows it, in one launch where one block has all rows of its channels.
  template <NormWay kWay>
  void multiply(const Layer& layer, const ProductArguments<T>& a, const NormRows<T>& n) const {
    const bool batch = layer.norm == Norm::kBatch;
    const bool fuses = batch && n.total <= kRowsOfOneBlock<T>;
    launch_product(stream_, a, n, fuses ? kWay : NormWay::kNone, tasks_);
    if (batch && !fuses) launch_norm<kWay>(stream_, n, tasks_);
    if (!batch) launch_pool<kWay == NormWay::kTangent>(stream_, n, tasks_);
  }

  template <NormWay kWay, typename Norm>
  void norm_back(const Norm& of) const {
    if (&of.layer == &net_.layers.back() && is_plain(of.layer)) return;
    launch_norm<kWay>(stream_, arguments(of), tasks_);
  }

  template <NormWay kWay, typename Norm>
  void products_back(const Layer& layer, const Gradient& weight_bar, Terms pairs, P in_bar, Terms operands,
                     const Norm& below) const {
    ProductArguments<T> a = product(layer, in_bar, operands);
    std::swap(a.from_width, a.out_width), std::swap(a.depth, a.channels);
    const NormRows<T> n = arguments(below);
    const bool fuses = n.total <= kFusedRows && rows_of_back(a) <= kRowsOfOneBlock<T>;
    launch_back(stream_, a, n, fuses ? kWay : NormWay::kNone, outer(layer, pairs), weight_bar, scratch_.outer, tasks_);
    if (!fuses) norm_back<kWay>(below);
  }

  NormRows<T> arguments(const Layer& layer, Read params, const Values& v) const {
    NormRows<T> n;
    n.norm = layer.norm, n.activation = layer.activation, n.pool = layer.pool;
    n.rows = narrow(layer.rows), n.cols = narrow(layer.cols), n.total = narrow(images_ * layer.pixels());
    n.channels = narrow(layer.channels), n.width = narrow(layer.width());
    n.slices = narrow(norm_slices<T>(n.total));
    n.activates = layer.pool != Pool::kMax && !(v.act == v.hat);
    n.pooled = narrow(images_ * layer.pixels_out);
    n.by_pixels = Divisor(layer.pixels()), n.by_cols = Divisor(layer.cols);
    n.by_pooled = Divisor(layer.pixels_out);
    n.by_pooled_cols = Divisor(layer.pool == Pool::kMax ? layer.cols / 2 : 1);
    n.gamma = params + layer.gamma, n.beta = params + layer.beta;
    n.hat = v.hat, n.act = v.act, n.out = v.out, n.scale = v.scale, n.winner = v.winner;
    n.partial = scratch_.norm;
    return n;
  }
  NormRows<T> arguments(const Layer& layer, Read params, Read direction, const Values& v, const Dots& d) const {
    NormRows<T> n = arguments(layer, params, v);
    n.gamma_dot = direction + layer.gamma, n.beta_dot = direction + layer.beta;
    n.hat_dot = d.hat_dot, n.act_dot = d.act_dot, n.out_dot = d.out_dot, n.pull = d.pull;
    return n;
  }
  NormRows<T> arguments(const NormBackward<BatchKernels>& of) const {
    const auto& [layer, params, v, b, gradient] = of;
    NormRows<T> n = arguments(layer, params, v);
    n.out_bar = b.out_bar;
    n.z_bar = b.z_bar, n.y_bar = b.y_bar, n.gamma_bar = b.gamma_bar, n.beta_bar = b.beta_bar;
    n.gamma_out = gradient + layer.gamma, n.beta_out = gradient + layer.beta;
    return n;
  }
  NormRows<T> arguments(const NormSecond<BatchKernels>& of) const {
    const auto& [layer, params, direction, v, b, d, out_bar_dot, bar_dot, product] = of;
    NormRows<T> n = arguments(layer, params, direction, v, d);
    n.out_bar = out_bar_dot;
    n.z_bar = b.z_bar, n.gamma_bar = b.gamma_bar, n.beta_bar = b.beta_bar;
    n.y_bar_dot = bar_dot;
    n.gamma_out = product + layer.gamma, n.beta_out = product + layer.beta;
    return n;
  }

  const cudaStream_t stream_;
  const Network& net_;
  const int64_t tasks_;
  const int64_t images_;
  const Scratch<T, TaskMemory>& scratch_;
};

}  // namespace imaml_ext
