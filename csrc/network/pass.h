// The way through a network and back, in the order of its equations, over the kernels of a device.
//
// Kernels has T, Memory, Gradient, where derivatives in a row of parameters go, and for a layer
//   forward        out[to] = Σ_operands Σ_tap in[from] · weight[tap], then norm, activation and pooling
//   tangent        the derivative of that
//   norm_back      the way back through pooling, activation and norm (NormBackward, NormSecond); the derivatives in γ
//                  and β go into a row of parameters
//   outer          weight_bar[tap] = Σ_pairs Σ in[from]ᵀ out_bar[to]
//   products_back  outer, in_bar[from] = Σ_operands Σ_tap out_bar[to] · weight[tap]ᵀ, and norm_back of the layer below
// A dot stands for the derivative along a direction of the parameters, a bar for that of the loss.
#pragma once

#include <initializer_list>
#include <vector>

#include "network/storage.h"

namespace imaml_ext {

// One term of a product: rows of pixels times a weight, or, for `outer`, times other rows.
template <typename P>
struct Term {
  P left, right;
};

// The derivative of the norm: from b.out_bar, the bar of what leaves the layer, to b.y_bar.
template <typename Kernels>
struct NormBackward {
  using Memory = typename Kernels::Memory;
  const Layer& layer;
  typename Memory::template Pointer<const typename Kernels::T> params;
  const LayerValues<typename Kernels::T, Memory>& v;
  const LayerBars<typename Kernels::T, Memory>& b;
  typename Kernels::Gradient gradient;
};

// The derivative of NormBackward along the direction: from out_bar_dot to ȳ˙ in bar_dot.
template <typename Kernels>
struct NormSecond {
  using T = typename Kernels::T;
  using Memory = typename Kernels::Memory;
  const Layer& layer;
  typename Memory::template Pointer<const T> params, direction;
  const LayerValues<T, Memory>& v;
  const LayerBars<T, Memory>& b;
  const LayerDots<T, Memory>& d;
  typename Memory::template Pointer<T> out_bar_dot, bar_dot;
  typename Kernels::Gradient product;
};

template <typename Kernels>
class NetworkPass {
 public:
  using T = typename Kernels::T;
  using Memory = typename Kernels::Memory;
  using P = typename Memory::template Pointer<T>;
  using Read = typename Memory::template Pointer<const T>;
  using Values = Storage<T, Memory>;
  using Dots = DotStorage<T, Memory>;
  using Gradient = typename Kernels::Gradient;

  NetworkPass(const Network& net, const Kernels& kernels) : net_(net), kernels_(kernels) {}

  // The outputs are values.back().out, [S, width].
  void forward(Read params, const Values& s) const {
    Read in = s.input;
    for (size_t l = 0; l < net_.layers.size(); ++l) {
      const Layer& layer = net_.layers[l];
      const auto& v = s.values[l];
      kernels_.forward(layer, params, v, {{in, params + layer.weight}});
      in = v.out;
    }
  }

  // From bars.back().out_bar, the derivative in the outputs: Jᵀ of it in `gradient`, a row of parameters.
  void backward(Read params, const Values& s, Gradient gradient) const { backward(params, s, s.bars, gradient); }

  // The derivative of the values along `direction`; that of the outputs is dots.back().out_dot.
  void tangent(Read params, Read direction, const Values& s, const Dots& t) const {
    Read in = s.input;
    for (size_t l = 0; l < net_.layers.size(); ++l) {
      const Layer& layer = net_.layers[l];
      const auto& v = s.values[l];
      const auto& d = t.dots[l];
      if (l == 0) {
        kernels_.tangent(layer, params, direction, v, d, {{in, direction + layer.weight}});
      } else {
        const Read in_dot = t.dots[l - 1].out_dot;
        kernels_.tangent(layer, params, direction, v, d,
                         {{in, direction + layer.weight}, {in_dot, params + layer.weight}});
      }
      in = v.out;
    }
  }

  // Where the bars of the bars begin: the derivative of the derivative in the outputs.
  P output_bar(const Dots& t) const { return turn(t, net_.layers.size() - 1); }

  // Jᵀ C J p from output_bar = C J p, with the bars of `t` and not those of the storage.
  void gauss_newton(Read params, const Values& s, const Dots& t, Gradient product) const {
    std::vector<LayerBars<T, Memory>> bars;
    for (size_t l = 0; l < net_.layers.size(); ++l) {
      const P bar = t.turns[l % 2];
      bars.push_back({bar, bar, turn(t, l), t.dots[l].gamma_bar_dot, t.dots[l].beta_bar_dot});
    }
    backward(params, s, bars, product);
  }

  // H p from output_bar, after `backward` and `tangent` along p.
  void second(Read params, Read direction, const Values& s, const Dots& t, Gradient product) const {
    const auto norm_of = [&](size_t l) {
      return NormSecond<Kernels>{net_.layers[l], params,     direction,      s.values[l], s.bars[l],
                                 t.dots[l],      turn(t, l), t.turns[l % 2], product};
    };
    size_t l = net_.layers.size() - 1;
    kernels_.norm_back(norm_of(l));
    for (; l > 0; --l) {
      const Layer& layer = net_.layers[l];
      const Read bar = s.bars[l].y_bar, bar_dot = t.turns[l % 2];
      const Read in = s.values[l - 1].out, in_dot = t.dots[l - 1].out_dot;
      kernels_.products_back(layer, product + layer.weight, {{in, bar_dot}, {in_dot, bar}}, turn(t, l - 1),
                             {{bar_dot, params + layer.weight}, {bar, direction + layer.weight}}, norm_of(l - 1));
    }
    const Layer& first = net_.layers.front();
    kernels_.outer(first, product + first.weight, {{s.input, t.turns[0]}});
  }

 private:
  P turn(const Dots& t, size_t l) const { return net_.layers[l].pool == Pool::kNone ? t.turns[l % 2] : t.pooled; }

  void backward(Read params, const Values& s, const std::vector<LayerBars<T, Memory>>& bars, Gradient gradient) const {
    const auto norm_of = [&](size_t l) {
      return NormBackward<Kernels>{net_.layers[l], params, s.values[l], bars[l], gradient};
    };
    size_t l = net_.layers.size() - 1;
    kernels_.norm_back(norm_of(l));
    for (; l > 0; --l) {
      const Layer& layer = net_.layers[l];
      kernels_.products_back(layer, gradient + layer.weight, {{s.values[l - 1].out, bars[l].y_bar}},
                             bars[l - 1].out_bar, {{bars[l].y_bar, params + layer.weight}}, norm_of(l - 1));
    }
    const Layer& first = net_.layers.front();
    kernels_.outer(first, gradient + first.weight, {{s.input, bars.front().y_bar}});
  }

  const Network& net_;
  const Kernels& kernels_;
};

}  // namespace imaml_ext
