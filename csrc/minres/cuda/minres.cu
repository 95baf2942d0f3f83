// The MINRES ops on CUDA: the phases of an op over rows (common/cuda/row_team.cuh). What cg/cuda/cg.cu says of `fma`
// and of pointers holds here too.
#include "common/cuda/start.cuh"
#include "minres/arguments.h"

namespace imaml_ext {
namespace {

// What is known of a row.
struct MinresDecision {
  MinresState state;
  MinresStep step;
  double b_scale, r_scale;  // of minres_begin_
  int32_t status;
  int32_t iterations;
  bool was_active;  // when the op began
  bool rescaled;    // the sums of the product are to be taken again
  bool settled;     // only the last pass is left
};

template <typename T>
struct MinresWork {
  using Number = T;
  using Decision = MinresDecision;
  using C = typename MinresRows<T>::C;
  static constexpr int V = kPackSize<T>;
  using Numbers = Pack<C, V>;
  MinresRows<T> a;

  __device__ bool is_over(const Decision& d) const { return d.settled; }

  __device__ void end(int64_t row, const Decision& d) const {
    copy_state(d.state, a.state[row]);
    a.status[row] = d.status;
    a.iterations[row] = d.iterations;
    a.record(row, d.step);
  }

  __device__ __forceinline__ Numbers load(const Tile<V>& tile, const T* row) const { return widened(tile.load(row)); }

  // Sums are over packs: a tile that is packed already needs no place.
  template <typename Part>
  __device__ __forceinline__ Numbers settled(const Part& part, const Tile<V>& tile, const Numbers& numbers) const {
    return tile.settled(part.plan.tile.packed ? nullptr : part.template place<C>(tile), numbers);
  }

  // A v = H v + shift v
  template <typename Part>
  __device__ __forceinline__ Numbers product(const Part& part, const Tile<V>& tile, const Numbers& v) const {
    Numbers Av = load(tile, a.hp + part.start());
    const Numbers shift = part.load(tile, a.shift);
#pragma unroll
    for (int k = 0; k < V; ++k) Av.v[k] = fused(shift.v[k], v.v[k], Av.v[k]);
    return Av;
  }

  // b − A x, where v is x; b where there is no product
  template <typename Part>
  __device__ __forceinline__ Pack<T, V> residual(const Part& part, const Tile<V>& tile) const {
    Pack<T, V> r = tile.load(a.b + part.start());
    if (a.hp == nullptr) return r;
    const Numbers Ax = product(part, tile, load(tile, a.v + part.start()));
#pragma unroll
    for (int k = 0; k < V; ++k) r.v[k] = static_cast<T>(static_cast<C>(r.v[k]) - Ax.v[k]);
    return r;
  }

  // numbers · scale · inverse
  static __device__ __forceinline__ Pack<T, V> normalised(const Numbers& numbers, C scale, C inverse) {
    Pack<T, V> to;
#pragma unroll
    for (int k = 0; k < V; ++k) to.v[k] = static_cast<T>(numbers.v[k] * scale * inverse);
    return to;
  }
  // Of the divisor, which is next to 1: a division for each element would be a call in the middle of a loop.
  static __device__ __forceinline__ C inverse_of(const MinresStep& step) { return static_cast<C>(1.0 / step.divisor); }

  template <typename Part>
  __device__ void fill(const Part& part, T* vectors) const {
    part.for_each_tile([&](const Tile<V>& tile) { tile.store(vectors + part.start(), Pack<T, V>{}); });
  }
  template <typename Part>
  __device__ void copy(const Part& part, const T* from, T* to) const {
    part.for_each_tile([&](const Tile<V>& tile) { tile.store(to + part.start(), tile.load(from + part.start())); });
  }
  // v = (b − A x) / ‖b − A x‖
  template <typename Part>
  __device__ void new_space(const Part& part, const MinresStep& step) const {
    const C scale = static_cast<C>(step.scale), inverse = inverse_of(step);
    part.for_each_tile([&](const Tile<V>& tile) {
      tile.store(a.v_next + part.start(), normalised(widened(residual(part, tile)), scale, inverse));
    });
  }
};

template <typename T>
struct MinresBegin : MinresWork<T> {
  using typename MinresWork<T>::Decision, typename MinresWork<T>::Numbers;
  using MinresWork<T>::V, MinresWork<T>::a;
  static constexpr int kPhases = MinresRows<T>::wide() ? 3 : 2;  // float64 sums that have left their range: once more
  static constexpr int kSums = 4;
  static constexpr bool kKeeps = false;

  __device__ void begin(int64_t, Decision& d) const {
    d.step = MinresStep{};
    d.b_scale = d.r_scale = 1.0;
    d.iterations = 0;
    d.settled = false;
  }

  // ‖b‖², ‖r‖², ‖x0‖²
  template <typename Part>
  __device__ void pass(int, const Part& part, const Decision& d, double (&sums)[kSums]) const {
    if (d.settled) return;
    part.for_each_tile([&](const Tile<V>& tile) {
      Numbers packed_r;
      residual_at_start(part, tile, a, d.b_scale, d.r_scale, sums, packed_r);
    });
  }

  __device__ void decide(int phase, int64_t row, Decision& d, const double (&sums)[kSums]) const {
    if (d.settled) return;
    const BeginSums of_row{a.hp != nullptr ? sums[0] : sums[1], sums[1], sums[2]};
    if (kPhases > 2 && phase == 0) {
      d.b_scale = row_scale_of_sum(of_row.bb), d.r_scale = row_scale_of_sum(of_row.rr);
      if (d.b_scale != 1.0 || d.r_scale != 1.0) return;
    }
    d.settled = true;
    d.status = minres_start(d.state, of_row, d.b_scale, d.r_scale, a.rtol[row * a.rtol_stride],
                            a.atol[row * a.atol_stride], a.wide(), a.hp != nullptr, d.step);
  }

  // v = r / ‖r‖. Even a row that is over has a vector, for the operator to be given something finite.
  template <typename Part>
  __device__ void last_pass(const Part& part, const Decision& d) const {
    if (row_is_active(d.status)) {
      this->new_space(part, d.step);
    } else {
      this->fill(part, a.v_next);
    }
    if (d.step.clear_solution) this->fill(part, a.x);
    if (a.hp != nullptr) this->copy(part, a.x, a.best);
  }
};

// In shared memory a step keeps v, then q in its place, and A v, then u: ten words per unknown where a row fits.
template <typename T>
struct MinresStepWork : MinresWork<T> {
  using typename MinresWork<T>::C, typename MinresWork<T>::Decision, typename MinresWork<T>::Numbers;
  using MinresWork<T>::V, MinresWork<T>::a;
  static constexpr int kTurn = MinresRows<T>::wide() ? 2 : 1;  // phase 1 of float64: sums that have left their range
  static constexpr int kOverflow = kTurn + 1;
  static constexpr int kPhases = kOverflow + 2;
  static constexpr int kSums = 4;
  static constexpr bool kKeeps = true;

  __device__ void begin(int64_t row, Decision& d) const {
    copy_state(a.state[row], d.state);
    d.step = MinresStep{};
    d.status = a.status[row];
    d.iterations = a.iterations[row];
    d.was_active = row_is_active(d.status);
    d.rescaled = false;
    d.settled = !d.was_active;
  }

  template <typename Part>
  __device__ void pass(int phase, const Part& part, const Decision& d, double (&sums)[kSums]) const {
    if (d.settled) return;
    if (phase == 0 && minres_measures(d.status)) {
      measure(part, 1.0 / d.state.unit, sums);
    } else if (phase < kTurn) {
      if (phase == 0 || d.rescaled) lanczos(part, 1.0 / d.state.operator_unit, sums);
    } else if (phase == kTurn) {
      turn(part, d, sums);
    } else if (d.step.may_overflow) {
      sums[0] = overflows(part, static_cast<C>(d.step.tau));
    }
  }

  // ‖b − A x‖², where v is x
  template <typename Part>
  __device__ __forceinline__ void measure(const Part& part, double scale, double (&sums)[kSums]) const {
    part.for_each_tile([&](const Tile<V>& tile) {
      const Numbers packed_r = scaled(this->settled(part, tile, widened(this->residual(part, tile))), scale);
      add_products(sums[0], packed_r, packed_r);
    });
  }

  // vᵀ A v, ‖A v‖²
  template <typename Part>
  __device__ __forceinline__ void lanczos(const Part& part, double scale, double (&sums)[kSums]) const {
    part.for_each_tile([&](const Tile<V>& tile) {
      const Numbers v = this->load(tile, a.v + part.start());
      const Numbers Av = this->product(part, tile, v);
      const Numbers packed_v = tile.settled(part.template place<C>(tile), v);
      const Numbers packed_Av = scaled(tile.settled(part.template place<C>(tile, 1), Av), scale);
      add_products(sums[0], packed_v, packed_Av);
      add_products(sums[1], packed_Av, packed_Av);
    });
  }

  // u = A v − α v − β v₋
  template <typename Part>
  __device__ __forceinline__ Numbers orthogonal(const Part& part, const Tile<V>& tile, const MinresStep& step,
                                                const Numbers& v, Numbers Av) const {
    const C alpha = static_cast<C>(step.alpha);
#pragma unroll
    for (int k = 0; k < V; ++k) Av.v[k] = fused(-alpha, v.v[k], Av.v[k]);
    return step.beta == 0.0 ? Av : without(Av, step.beta, tile, a.v_next + part.start());
  }

  // numbers − factor · vector
  __device__ __forceinline__ Numbers without(Numbers numbers, double factor, const Tile<V>& tile,
                                             const T* vector) const {
    const Numbers other = this->load(tile, vector);
    const C times = static_cast<C>(factor);
#pragma unroll
    for (int k = 0; k < V; ++k) numbers.v[k] = fused(-times, other.v[k], numbers.v[k]);
    return numbers;
  }

  // ‖u‖²;   q = v − turn q₁ − turn_before q₂;   ‖q‖², xᵀ q, ‖x‖²
  template <typename Part>
  __device__ __forceinline__ void turn(const Part& part, const Decision& d, double (&sums)[kSums]) const {
    const int64_t start = part.start();
    const double scale = 1.0 / d.state.operator_unit;
    const double x_scale = 1.0 / minres_solution_unit(d.state);
    part.for_each_tile([&](const Tile<V>& tile) {
      C* const place = part.template place<C>(tile, 1);
      const Numbers v = part.keeps() ? tile.kept(part.template place<C>(tile)) : this->load(tile, a.v + start);
      const Numbers Av = part.keeps() ? tile.kept(place) : this->product(part, tile, v);
      const Numbers packed_u = scaled(tile.settled(place, orthogonal(part, tile, d.step, v, Av)), scale);
      add_products(sums[0], packed_u, packed_u);
    });
    // A loop for each vector, so that registers suffice.
    part.for_each_tile([&](const Tile<V>& tile) {
      C* const place = part.template place<C>(tile);
      Numbers q = part.keeps() ? tile.kept(place) : this->load(tile, a.v + start);
      if (d.step.turn != 0.0) q = without(q, d.step.turn, tile, a.q + start);
      if (d.step.turn_before != 0.0) q = without(q, d.step.turn_before, tile, a.q_next + start);
      Pack<T, V> stored;
#pragma unroll
      for (int k = 0; k < V; ++k) stored.v[k] = static_cast<T>(q.v[k]);
      tile.store(a.q_next + start, stored);
      const Numbers packed_q = tile.settled(place, widened(stored));
      add_products(sums[1], packed_q, packed_q);
    });
    part.for_each_tile([&](const Tile<V>& tile) {
      C* const place = part.template place<C>(tile);
      const Numbers q = part.keeps() ? tile.kept(place) : this->load(tile, a.q_next + start);
      // x passes through the place of q, which is then kept there again.
      const Numbers packed_x = scaled(this->settled(part, tile, this->load(tile, a.x + start)), x_scale);
      const Numbers packed_q = tile.settled(place, q);
      add_products(sums[2], packed_x, packed_q);
      add_products(sums[3], packed_x, packed_x);
    });
  }

  // How many x + τ q are not finite in T. Only looked at where their norm does not settle it.
  template <typename Part>
  __device__ double overflows(const Part& part, C tau) const {
    double infinite = 0.0;
    part.for_each_tile([&](const Tile<V>& tile) {
      const Pack<T, V> x = stepped(part, tile, tau);
#pragma unroll
      for (int k = 0; k < V; ++k) infinite += is_finite(static_cast<double>(x.v[k])) ? 0.0 : 1.0;
    });
    return infinite;
  }

  // x + τ q
  template <typename Part>
  __device__ __forceinline__ Pack<T, V> stepped(const Part& part, const Tile<V>& tile, C tau) const {
    Pack<T, V> x = tile.load(a.x + part.start());
    const Numbers q =
        part.keeps() ? tile.kept(part.template place<C>(tile)) : this->load(tile, a.q_next + part.start());
#pragma unroll
    for (int k = 0; k < V; ++k) x.v[k] = static_cast<T>(fused(tau, q.v[k], static_cast<C>(x.v[k])));
    return x;
  }

  __device__ void decide(int phase, int64_t, Decision& d, const double (&sums)[kSums]) const {
    if (d.settled) return;
    if (phase == 0 && minres_measures(d.status)) {
      minres_measured(d.state, d.status, sums[0], a.wide(), d.step);
      d.settled = true;
      return;
    }
    if (phase < kTurn) {
      if (phase == 0) d.rescaled = a.wide() && minres_rescale(d.state, {sums[0], sums[1]});
      // Where float64 sums are taken again, they are those of phase 1.
      if (phase == 0 ? !d.rescaled : d.rescaled) minres_product(d.state, d.status, {sums[0], sums[1]}, d.step);
    } else if (phase == kTurn) {
      minres_turn(d.state, d.status, {sums[0], sums[1], sums[2], sums[3]}, a.unit_roundoff(), a.largest(), d.step);
    }
    d.settled = d.status != kIterating;
    if (d.settled || phase < kTurn || (phase == kTurn && d.step.may_overflow)) return;
    minres_take(d.state, d.status, d.iterations, phase == kOverflow && sums[0] > 0.0, a.unit_roundoff(), a.wide(),
                d.step);
    d.settled = true;
  }

  // x ← x + τ q,   then   the vector that the operator is given next
  template <typename Part>
  __device__ void last_pass(const Part& part, const Decision& d) const {
    if (d.step.best == Best::kKeep) this->copy(part, a.x, a.best);
    if (d.step.best == Best::kRestore) this->copy(part, a.best, a.x);
    if (d.step.clear_solution) this->fill(part, a.x);
    if (d.step.take_step) step(part, static_cast<C>(d.step.tau));
    if (!a.last && d.status == kIterating) {
      if (d.step.restart) {
        this->new_space(part, d.step);
      } else {
        next_vector(part, d.step);
      }
    }
    if (!a.last && minres_measures(d.status)) this->copy(part, a.x, a.v_next);
    if (!a.last && !row_is_active(d.status) && (d.was_active || a.first)) this->fill(part, a.v_next);
  }

  // x ← x + τ q
  template <typename Part>
  __device__ void step(const Part& part, C tau) const {
    part.for_each_tile([&](const Tile<V>& tile) { tile.store(a.x + part.start(), stepped(part, tile, tau)); });
  }

  // v₊ = u / β₊
  template <typename Part>
  __device__ void next_vector(const Part& part, const MinresStep& step) const {
    const int64_t start = part.start();
    const C scale = static_cast<C>(step.scale), inverse = this->inverse_of(step);
    if (part.keeps()) {
      part.for_each_tile([&](const Tile<V>& tile) {
        const Numbers u = tile.kept(part.template place<C>(tile, 1));
        tile.store(a.v_next + start, this->normalised(u, scale, inverse));
      });
      return;
    }
    part.for_each_tile([&](const Tile<V>& tile) {
      const Numbers v = this->load(tile, a.v + start);
      const Numbers u = orthogonal(part, tile, step, v, this->product(part, tile, v));
      tile.store(a.v_next + start, this->normalised(u, scale, inverse));
    });
  }
};

template <typename T, typename Work>
void run(OnCuda device, const MinresArguments<T>& a, Work work) {
  const bool packed =
      can_pack<T>(a.cols, a.b, a.hp, a.x, a.v, a.v_next, a.q, a.q_next, a.best) && can_pack<T>(a.cols, a.shift);
  launch_rows(device, work, a, packed);
}

}  // namespace

template <typename T>
void minres_begin(OnCuda device, const MinresArguments<T>& a) {
  run(device, a, MinresBegin<T>{});
}

template <typename T>
void minres_step(OnCuda device, const MinresArguments<T>& a) {
  run(device, a, MinresStepWork<T>{});
}

IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_MINRES, OnCuda)

}  // namespace imaml_ext
