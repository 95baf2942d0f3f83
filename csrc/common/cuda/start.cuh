// How every solve begins on CUDA.
#pragma once

#include "common/cuda/arithmetic.cuh"
#include "common/cuda/row_team.cuh"

namespace imaml_ext {

// A tile of r = b − (H x0 + shift x0), or of b itself; and `scaled_r`, r as it is squared. Adds up ‖b‖² (of a warm
// start alone), ‖r‖², ‖x0‖².
template <typename Part, typename A, int V, typename C = typename A::C>
__device__ __forceinline__ Pack<typename A::Number, V> residual_at_start(const Part& part, const Tile<V>& tile,
                                                                         const A& a, double b_scale, double r_scale,
                                                                         double (&sums)[4], Pack<C, V>& scaled_r) {
  using T = typename A::Number;
  C* const place = part.template place<C>(tile);
  const int64_t start = part.start();
  Pack<T, V> r;
  if (a.hp != nullptr) {
    Pack<C, V> x = widened(tile.load(a.x + start));
    const Pack<C, V> packed_x = tile.settled(place, x);
    add_products(sums[2], packed_x, packed_x);
    const Pack<C, V> shift = part.load(tile, a.shift);
    const Pack<C, V> hx = widened(tile.load(a.hp + start));
#pragma unroll
    for (int k = 0; k < V; ++k) x.v[k] = fused(shift.v[k], x.v[k], hx.v[k]);
    r = tile.load(a.b + start);
    const Pack<C, V> packed_b = scaled(tile.settled(place, widened(r)), b_scale);
    add_products(sums[0], packed_b, packed_b);
#pragma unroll
    for (int k = 0; k < V; ++k) r.v[k] = static_cast<T>(static_cast<C>(r.v[k]) - x.v[k]);
  } else {
    r = tile.load(a.b + start);
  }
  scaled_r = scaled(tile.settled(place, widened(r)), r_scale);
  add_products(sums[1], scaled_r, scaled_r);
  return r;
}

}  // namespace imaml_ext
