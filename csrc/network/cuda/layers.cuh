// The layers of all tasks at once, as NetworkPass calls them: a kernel launch or a few for each.
#pragma once

#include <algorithm>
#include <initializer_list>

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
    of_norm = std::max(of_norm, norm_partial_size(layer, images));
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
  using Terms = std::initializer_list<Term<Read>>;
  using Values = LayerValues<T, TaskMemory>;
  using Bars = LayerBars<T, TaskMemory>;
  using Dots = LayerDots<T, TaskMemory>;

  BatchKernels(cudaStream_t stream, const Network& net, int64_t tasks, int64_t images,
               const Scratch<T, TaskMemory>& scratch)
      : stream_(stream), net_(net), tasks_(tasks), images_(images), scratch_(scratch) {}

  void read_input(Read x, P input) const {
    const Layer& first = net_.layers.front();
    InputArguments<T> a;
    a.x = x, a.input = input;
    a.channels = narrow(net_.in_channels), a.height = narrow(net_.height), a.width = narrow(net_.width);
    a.stride = narrow(net_.patch_stride);
    a.cols = narrow(net_.patch_stride == 0 ? net_.width : first.cols);
    a.pixels = narrow(first.pixels_in), a.row_width = narrow(first.depth_width());
    launch_elements<input_kernel<T>>(stream_, a, images_ * first.pixels_in * first.depth_width(), tasks_);
  }

  void multiply(const Layer& layer, P out, Terms operands) const {
    ProductArguments<T> a = product(layer, out, operands);
    a.from_width = narrow(layer.depth_width()), a.out_width = narrow(layer.width());
    a.depth = narrow(layer.depth), a.channels = narrow(layer.channels);
    launch_product<false>(stream_, a, tasks_);
  }
  void multiply_transposed(const Layer& layer, P in_bar, Terms operands) const {
    ProductArguments<T> a = product(layer, in_bar, operands);
    a.from_width = narrow(layer.width()), a.out_width = narrow(layer.depth_width());
    a.depth = narrow(layer.channels), a.channels = narrow(layer.depth);
    launch_product<true>(stream_, a, tasks_);
  }
  void outer(const Layer& layer, P weight_bar, Terms pairs) const {
    OuterArguments<T> a{};
    for (const auto& [in, out_bar] : pairs) a.in[a.pairs] = in, a.out_bar[a.pairs++] = out_bar;
    a.down = layer.down, a.across = layer.across;
    a.images = narrow(images_);
    a.depth = narrow(layer.depth), a.channels = narrow(layer.channels);
    a.depth_width = narrow(layer.depth_width()), a.width = narrow(layer.width());
    a.rows_a_slice = narrow(rows_a_slice(layer)), a.slices = narrow(slices_of(layer, images_));
    launch_outer(stream_, a, weight_bar, scratch_.outer, tasks_);
  }

  void norm(const Layer& layer, Read params, const Values& v) const {
    launch_norm<norm_kernel<T>>(stream_, arguments(layer, params, v), layer.norm == Norm::kBatch, tasks_);
    if (layer.pool == Pool::kMax) {
      launch_elements<max_pool_kernel<T>>(stream_, pooling(layer, params, v), pooled_size(layer, images_), tasks_);
    }
    if (layer.pool == Pool::kMean) mean_pool(layer, v.act, v.out);
  }

  void norm_backward(const Layer& layer, Read params, const Values& v, const Bars& b, P gradient) const {
    NormRows<T> n = arguments(layer, params, v);
    n.out_bar = layer.pool == Pool::kNone ? b.z_bar : b.out_bar;
    n.z_bar = b.z_bar, n.y_bar = b.y_bar, n.gamma_bar = b.gamma_bar, n.beta_bar = b.beta_bar;
    n.gamma_out = gradient + layer.gamma, n.beta_out = gradient + layer.beta;
    launch_norm<norm_backward_kernel<T>>(stream_, n, true, tasks_);
  }

  void norm_tangent(const Layer& layer, Read params, Read direction, const Values& v, const Dots& d) const {
    launch_norm<norm_tangent_kernel<T>>(stream_, arguments(layer, params, direction, v, d), layer.norm == Norm::kBatch,
                                        tasks_);
    if (layer.pool == Pool::kMax) {
      PoolArguments<T> a = pooling(layer, params, v);
      a.gamma_dot = direction + layer.gamma, a.beta_dot = direction + layer.beta;
      a.hat_dot = d.hat_dot, a.act_dot = d.act_dot;
      launch_elements<max_pool_tangent_kernel<T>>(stream_, a, pooled_size(layer, images_), tasks_);
    }
    if (layer.pool == Pool::kMean) mean_pool(layer, d.act_dot, d.out_dot);
  }

  // From out_bar_dot, the derivative of the bar of what leaves the layer, to ȳ˙ in bar_dot.
  void norm_second(const Layer& layer, Read params, Read direction, const Values& v, const Bars& b, const Dots& d,
                   P out_bar_dot, P bar_dot, P product) const {
    NormRows<T> n = arguments(layer, params, direction, v, d);
    n.out_bar = out_bar_dot;
    n.z_bar = b.z_bar, n.gamma_bar = b.gamma_bar, n.beta_bar = b.beta_bar;
    n.y_bar_dot = bar_dot;
    n.gamma_out = product + layer.gamma, n.beta_out = product + layer.beta;
    launch_norm<norm_second_kernel<T>>(stream_, n, true, tasks_);
  }

 private:
  static int narrow(int64_t number) { return static_cast<int>(number); }  // NetworkCall's sizes fit: check_sizes

  ProductArguments<T> product(const Layer& layer, P out, Terms operands) const {
    ProductArguments<T> a{};
    for (const auto& [rows, weight] : operands) a.rows[a.terms] = rows, a.weight[a.terms++] = weight;
    a.out = out;
    a.down = layer.down, a.across = layer.across;
    a.images = narrow(images_);
    return a;
  }

  NormRows<T> arguments(const Layer& layer, Read params, const Values& v) const {
    NormRows<T> n;
    n.norm = layer.norm, n.activation = layer.activation, n.pool = layer.pool;
    n.images = narrow(images_), n.rows = narrow(layer.rows), n.cols = narrow(layer.cols);
    n.channels = narrow(layer.channels), n.width = narrow(layer.width());
    n.slices = narrow(norm_slices(images_ * layer.pixels()));
    n.activates = layer.pool != Pool::kMax && !(v.act == v.hat);
    n.gamma = params + layer.gamma, n.beta = params + layer.beta;
    n.hat = v.hat, n.act = v.act, n.scale = v.scale, n.winner = v.winner;
    n.partial = scratch_.norm;
    return n;
  }
  NormRows<T> arguments(const Layer& layer, Read params, Read direction, const Values& v, const Dots& d) const {
    NormRows<T> n = arguments(layer, params, v);
    n.gamma_dot = direction + layer.gamma, n.beta_dot = direction + layer.beta;
    n.hat_dot = d.hat_dot, n.act_dot = d.act_dot, n.pull = d.pull;
    return n;
  }

  PoolArguments<T> pooling(const Layer& layer, Read params, const Values& v) const {
    PoolArguments<T> a{};
    a.norm = layer.norm, a.activation = layer.activation;
    a.rows = narrow(layer.rows), a.cols = narrow(layer.cols);
    a.channels = narrow(layer.channels), a.width = narrow(layer.width());
    a.gamma = params + layer.gamma, a.beta = params + layer.beta;
    a.hat = v.hat, a.winner = v.winner, a.act = v.act;
    return a;
  }

  void mean_pool(const Layer& layer, Read in, P out) const {
    MeanArguments<T> a;
    a.in = in, a.out = out;
    a.pixels = narrow(layer.pixels()), a.width = narrow(layer.width());
    launch_elements<mean_pool_kernel<T>>(stream_, a, pooled_size(layer, images_), tasks_);
  }

  const cudaStream_t stream_;
  const Network& net_;
  const int64_t tasks_;
  const int64_t images_;
  const Scratch<T, TaskMemory>& scratch_;
};

}  // namespace imaml_ext
