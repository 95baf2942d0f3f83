// What the conjugate-gradient ops share on CUDA: what is known of a row, and the passes that more than one op has.
#pragma once

#include "cg/arguments.h"
#include "common/cuda/arithmetic.cuh"
#include "common/cuda/row_team.cuh"

namespace imaml_ext {

// What is known of a row.
struct CgDecision {
  RowState state;
  Curvature curvature;
  double alpha;
  double length;  // ‖α p‖
  int32_t status;
  int32_t iterations;
  bool may_overflow;
  bool take_scaled_rhs;
  bool take_step;
  bool clear_solution;
  Best best;
  // Of cg_begin_: the scales of b and r in sums; and whether sums were all that was asked for.
  double b_scale;
  double r_scale;
  bool summed;
};

template <typename T>
struct CgWork {
  using Number = T;
  using Decision = CgDecision;
  using C = typename CgRows<T>::C;
  static constexpr int V = kPackSize<T>;
  using Numbers = Pack<C, V>;
  CgRows<T> a;

  __device__ bool is_over(const Decision& d) const { return !row_is_active(d.status); }

  __device__ void begin(int64_t row, Decision& d) const {
    copy_state(a.state[row], d.state);
    d.alpha = 0.0;
    d.status = a.status[row];
    d.iterations = a.iterations != nullptr ? a.iterations[row] : 0;
    d.may_overflow = d.take_scaled_rhs = d.take_step = false;
    d.best = Best::kNothing;
  }
  __device__ void end(int64_t row, const Decision& d) const {
    copy_state(d.state, a.state[row]);
    a.status[row] = d.status;
    if (a.iterations != nullptr) a.iterations[row] = d.iterations;
  }

  __device__ __forceinline__ Numbers load(const Tile<V>& tile, const T* row) const { return widened(tile.load(row)); }

  // M r or r
  template <typename Part>
  __device__ __forceinline__ Numbers preconditioned(const Part& part, const Tile<V>& tile, Numbers r) const {
    if (a.inverse_diagonal.data == nullptr) return r;
    const Numbers m = part.load(tile, a.inverse_diagonal);
#pragma unroll
    for (int k = 0; k < V; ++k) r.v[k] *= m.v[k];
    return r;
  }

  // x ← x + α p,   then   p ← z + β p   or   p ← x.   z is a callable's, M r or r.
  template <typename Part>
  __device__ void update(const Part& part, const Decision& d) const {
    const bool to_direction = a.update_direction && d.status == kIterating;
    T* const x_row = a.x + part.start();
    T* const p_row = a.p + part.start();
    if (d.take_step || to_direction) {
      const T* const z_row = (a.z != nullptr ? a.z : a.r) + part.start();
      const C alpha = static_cast<C>(d.alpha);
      const C beta = static_cast<C>(d.state.beta);
      part.for_each_tile([&](const Tile<V>& tile) {
        Numbers p{};
        if (part.keeps()) {
          p = tile.kept(part.template place<C>(tile));
        } else if (d.take_step || beta != C(0)) {
          p = load(tile, a.p_now() + part.start());
        }
        if (d.take_step) {
          Pack<T, V> x{};
          if (!a.first) x = tile.load(x_row);
#pragma unroll
          for (int k = 0; k < V; ++k) x.v[k] = static_cast<T>(fused(alpha, p.v[k], static_cast<C>(x.v[k])));
          tile.store(x_row, x);
        }
        if (to_direction) {
          const Numbers z =
              preconditioned(part, tile, part.keeps() ? tile.kept(part.template place<C>(tile, 1)) : load(tile, z_row));
          Pack<T, V> next;
#pragma unroll
          for (int k = 0; k < V; ++k) next.v[k] = static_cast<T>(beta == C(0) ? z.v[k] : fused(beta, p.v[k], z.v[k]));
          tile.store(p_row, next);
        }
      });
    }
    if (a.update_direction && d.status == kVerifying) {
      part.for_each_tile([&](const Tile<V>& tile) { tile.store(p_row, tile.load(x_row)); });
    }
  }

  // best ← x   or   x ← best
  template <typename Part>
  __device__ void keep_or_restore(const Part& part, const Decision& d) const {
    if (d.best == Best::kNothing) return;
    T* const x_row = a.x + part.start();
    T* const best_row = a.best + part.start();
    part.for_each_tile([&](const Tile<V>& tile) {
      if (d.best == Best::kRestore) {
        tile.store(x_row, tile.load(best_row));
      } else {
        tile.store(best_row, a.first ? Pack<T, V>{} : tile.load(x_row));
      }
    });
  }

  // x ← 0,   p ← 0
  template <typename Part>
  __device__ void clear(const Part& part, bool solution, bool direction) const {
    if (!solution && !direction) return;
    part.for_each_tile([&](const Tile<V>& tile) {
      if (solution) tile.store(a.x + part.start(), Pack<T, V>{});
      if (direction) tile.store(a.p + part.start(), Pack<T, V>{});
    });
  }
};

}  // namespace imaml_ext
