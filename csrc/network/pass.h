// The way through a network and back, in the order of its equations, over the kernels of a device.
//
// Kernels has T, Memory, and for a layer
//   multiply             out[to] = Σ_operands Σ_tap in[from] · weight[tap]
//   multiply_transposed  in_bar[from] = Σ_operands Σ_tap out_bar[to] · weight[tap]ᵀ
//   outer                weight_bar[tap] = Σ_pairs Σ in[from]ᵀ out_bar[to]
//   norm, norm_backward, norm_tangent, norm_second   norm, activation and pooling; the derivatives in γ and β go
//                        straight into a row of parameters.
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

template <typename Kernels>
class NetworkPass {
 public:
  using T = typename Kernels::T;
  using Memory = typename Kernels::Memory;
  using P = typename Memory::template Pointer<T>;
  using Read = typename Memory::template Pointer<const T>;
  using Values = Storage<T, Memory>;
  using Dots = DotStorage<T, Memory>;

  NetworkPass(const Network& net, const Kernels& kernels) : net_(net), kernels_(kernels) {}

  // The outputs are values.back().out, [S, width].
  void forward(Read params, const Values& s) const {
    Read in = s.input;
    for (size_t l = 0; l < net_.layers.size(); ++l) {
      const Layer& layer = net_.layers[l];
      const auto& v = s.values[l];
      kernels_.multiply(layer, v.hat, {{in, params + layer.weight}});
      kernels_.norm(layer, params, v);
      in = v.out;
    }
  }

  // From bars.back().out_bar, the derivative in the outputs: Jᵀ of it in `gradient`, a row of parameters.
  void backward(Read params, const Values& s, P gradient) const { backward(params, s, s.bars, gradient); }

  // The derivative of the values along `direction`; that of the outputs is dots.back().out_dot.
  void tangent(Read params, Read direction, const Values& s, const Dots& t) const {
    Read in = s.input;
    for (size_t l = 0; l < net_.layers.size(); ++l) {
      const Layer& layer = net_.layers[l];
      const auto& v = s.values[l];
      const auto& d = t.dots[l];
      if (l == 0) {
        kernels_.multiply(layer, d.hat_dot, {{in, direction + layer.weight}});
      } else {
        const Read in_dot = t.dots[l - 1].out_dot;
        kernels_.multiply(layer, d.hat_dot, {{in, direction + layer.weight}, {in_dot, params + layer.weight}});
      }
      kernels_.norm_tangent(layer, params, direction, v, d);
      in = v.out;
    }
  }

  // Where the bars of the bars begin: the derivative of the derivative in the outputs.
  P output_bar(const Dots& t) const { return turn(t, net_.layers.size() - 1); }

  // Jᵀ C J p from output_bar = C J p, with the bars of `t` and not those of the storage.
  void gauss_newton(Read params, const Values& s, const Dots& t, P product) const {
    std::vector<LayerBars<T, Memory>> bars;
    for (size_t l = 0; l < net_.layers.size(); ++l) {
      const P bar = t.turns[l % 2];
      bars.push_back({bar, bar, turn(t, l), t.dots[l].gamma_bar_dot, t.dots[l].beta_bar_dot});
    }
    backward(params, s, bars, product);
  }

  // H p from output_bar, after `backward` and `tangent` along p.
  void second(Read params, Read direction, const Values& s, const Dots& t, P product) const {
    for (size_t l = net_.layers.size(); l-- > 0;) {
      const Layer& layer = net_.layers[l];
      const auto& b = s.bars[l];
      const P bar_dot = t.turns[l % 2];
      kernels_.norm_second(layer, params, direction, s.values[l], b, t.dots[l], turn(t, l), bar_dot, product);
      const P weight_bar = product + layer.weight;
      if (l == 0) {
        kernels_.outer(layer, weight_bar, {{s.input, bar_dot}});
        break;
      }
      const Read in = s.values[l - 1].out, in_dot = t.dots[l - 1].out_dot;
      kernels_.outer(layer, weight_bar, {{in, bar_dot}, {in_dot, b.y_bar}});
      kernels_.multiply_transposed(layer, turn(t, l - 1),
                                   {{bar_dot, params + layer.weight}, {b.y_bar, direction + layer.weight}});
    }
  }

 private:
  P turn(const Dots& t, size_t l) const { return net_.layers[l].pool == Pool::kNone ? t.turns[l % 2] : t.pooled; }

  void backward(Read params, const Values& s, const std::vector<LayerBars<T, Memory>>& bars, P gradient) const {
    for (size_t l = net_.layers.size(); l-- > 0;) {
      const Layer& layer = net_.layers[l];
      const auto& b = bars[l];
      kernels_.norm_backward(layer, params, s.values[l], b, gradient);
      const Read in = l == 0 ? s.input : s.values[l - 1].out;
      kernels_.outer(layer, gradient + layer.weight, {{in, b.y_bar}});
      if (l > 0) kernels_.multiply_transposed(layer, bars[l - 1].out_bar, {{b.y_bar, params + layer.weight}});
    }
  }

  const Network& net_;
  const Kernels& kernels_;
};

}  // namespace imaml_ext
