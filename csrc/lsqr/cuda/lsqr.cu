// The least-squares ops on CUDA: the phases of an op over rows of one length (common/cuda/row_team.cuh).
//
// As in cg.cu, `fused` rounds once, so that a vector kept from the phase before has the bits of one computed again.
#include "common/cuda/arithmetic.cuh"
#include "common/cuda/row_team.cuh"
#include "lsqr/arguments.h"

namespace imaml_ext {
namespace {

// What is known of a row.
struct LsqrDecision {
  LsqrState state;
  double scale;  // of the vectors in the sums of the first phase, and of x there
  double x_scale;
  ResidualMove residual;
  DirectionMove direction;
  int32_t status;
  int32_t iterations;
  bool from_solution;  // q is M x
  bool with_solution;  // the first phase sums x too
  bool summed;         // the first phase has its sums
  bool was_active;
};

// The phases of each op: sums, once more where squares of float64 numbers have left their range, then what the row
// does.
template <typename T>
struct LsqrWork {
  using Number = T;
  using Decision = LsqrDecision;
  using C = typename LsqrRows<T>::C;
  static constexpr int V = kPackSize<T>;
  using Numbers = Pack<C, V>;
  static constexpr int kSumPhases = LsqrRows<T>::wide() ? 2 : 1;
  static constexpr int kPhases = kSumPhases + 2;
  LsqrRows<T> a;

  __device__ bool is_over(const Decision& d) const { return !d.was_active; }

  __device__ void begin(int64_t row, Decision& d) const {
    copy_state(a.state[row], d.state);
    d.scale = d.x_scale = 1.0;
    d.residual = {0.0, 0.0};
    d.direction.gradient = d.direction.keep = 0.0;
    d.direction.take_step = d.direction.clear_solution = false;
    d.direction.best = Best::kNothing;
    d.status = a.status[row];
    d.iterations = a.iterations != nullptr ? a.iterations[row] : 0;
    d.was_active = row_is_active(d.status);
    d.from_solution = d.status == kVerifying;
    d.with_solution = d.summed = false;
  }
  __device__ void end(int64_t row, const Decision& d) const {
    copy_state(d.state, a.state[row]);
    a.status[row] = d.status;
    if (a.iterations != nullptr) a.iterations[row] = d.iterations;
  }

  // 1 / value of a power of two. In float64 a division for each tile would take registers too.
  static __device__ __forceinline__ C inverse_of_power(double value) {
    if constexpr (!LsqrRows<T>::wide()) return static_cast<C>(1.0 / value);
    return std::bit_cast<double>((uint64_t{2046} << 52) - std::bit_cast<uint64_t>(value));
  }

  // Whether the sums of this phase stand; if not, the next one takes them again.
  static __device__ bool settle_scale(int phase, double squares, double& scale) {
    if (phase + 1 == kSumPhases) return true;
    scale = row_scale_of_sum(squares);
    return scale == 1.0;
  }

  __device__ __forceinline__ Numbers load(const Tile<V>& tile, const T* row) const { return widened(tile.load(row)); }
};

// ‖y‖,   r̂ = y / ρ
template <typename T>
struct LsqrBegin : LsqrWork<T> {
  using typename LsqrWork<T>::C, typename LsqrWork<T>::Decision, typename LsqrWork<T>::Numbers;
  using LsqrWork<T>::V, LsqrWork<T>::a, LsqrWork<T>::kSumPhases;
  static constexpr int kPhases = kSumPhases + 1;
  static constexpr int kSums = 1;
  static constexpr bool kKeeps = false;

  __device__ void begin(int64_t, Decision& d) const {
    d.scale = 1.0;
    d.iterations = 0;
    d.status = kBeginning;
    d.was_active = true;
    d.summed = false;
  }

  template <typename Part>
  __device__ void pass(int, const Part& part, const Decision& d, double (&sums)[kSums]) const {
    if (d.summed) return;
    part.for_each_tile([&](const Tile<V>& tile) {
      const Numbers y = this->load(tile, a.y + part.start());
      const Numbers packed = scaled(tile.settled(part.template place<C>(tile), y), d.scale);
      add_products(sums[0], packed, packed);
    });
  }

  __device__ void decide(int phase, int64_t row, Decision& d, const double (&sums)[kSums]) const {
    if (d.summed) return;
    d.summed = this->settle_scale(phase, sums[0], d.scale);
    if (!d.summed) return;
    lsqr_begin_row(d.state, sqrt(sums[0]) / d.scale, a.rtol[row * a.rtol_stride], a.atol[row * a.atol_stride], a.warm,
                   a.numbers());
  }

  // Even a row that is not finite has a residual, for the operator to be given something finite.
  template <typename Part>
  __device__ void last_pass(const Part& part, const Decision& d) const {
    const bool finite = is_finite(d.state.rhs);
    const C inverse = static_cast<C>(1.0 / d.state.unit);
    part.for_each_tile([&](const Tile<V>& tile) {
      const Numbers y = this->load(tile, a.y + part.start());
      Pack<T, V> r{};
#pragma unroll
      for (int k = 0; k < V; ++k) r.v[k] = static_cast<T>(finite ? y.v[k] * inverse : C(0));
      tile.store(a.r + part.start(), r);
    });
  }
};

// In shared memory it keeps q, or y − q of a row that verifies: three words per unknown of y.
template <typename T>
struct LsqrResidual : LsqrWork<T> {
  using typename LsqrWork<T>::C, typename LsqrWork<T>::Decision, typename LsqrWork<T>::Numbers;
  using LsqrWork<T>::V, LsqrWork<T>::a, LsqrWork<T>::kSumPhases;
  static constexpr int kSums = 1;
  static constexpr bool kKeeps = true;

  // q   or   y − q
  template <typename Part>
  __device__ __forceinline__ Numbers load_product(const Part& part, const Tile<V>& tile, const Decision& d) const {
    Numbers q = this->load(tile, a.q + part.start());
    if (d.from_solution) {
      const Numbers y = this->load(tile, a.y + part.start());
#pragma unroll
      for (int k = 0; k < V; ++k) q.v[k] = y.v[k] - q.v[k];
    }
    return q;
  }

  template <typename Part>
  __device__ void pass(int phase, const Part& part, const Decision& d, double (&sums)[kSums]) const {
    if (!row_is_active(d.status)) return;
    if (phase < kSumPhases) {
      if (!d.summed) product(part, d, sums);
    } else {
      residual(part, d, sums);
    }
  }

  // ‖q‖²   or   ‖y − q‖²
  template <typename Part>
  __device__ __forceinline__ void product(const Part& part, const Decision& d, double (&sums)[kSums]) const {
    part.for_each_tile([&](const Tile<V>& tile) {
      const Numbers q = load_product(part, tile, d);
      const Numbers packed = scaled(tile.settled(part.template place<C>(tile), q), d.scale);
      add_products(sums[0], packed, packed);
    });
  }

  // r̂ ← keep r̂ − step q   or   r̂ ← step (y − q);   ‖r̂‖²
  template <typename Part>
  __device__ __forceinline__ void residual(const Part& part, const Decision& d, double (&sums)[kSums]) const {
    const C keep = static_cast<C>(d.residual.keep);
    const C step = static_cast<C>(d.residual.step);
    part.for_each_tile([&](const Tile<V>& tile) {
      const Numbers q = part.keeps() ? tile.kept(part.template place<C>(tile)) : load_product(part, tile, d);
      Pack<T, V> r{};
      if (!d.from_solution) r = tile.load(a.r + part.start());
#pragma unroll
      for (int k = 0; k < V; ++k) {
        r.v[k] = static_cast<T>(d.from_solution ? step * q.v[k] : fused(-step, q.v[k], keep * static_cast<C>(r.v[k])));
      }
      tile.store(a.r + part.start(), r);
      const Numbers packed = tile.settled(part.template place<C>(tile, 1), widened(r));
      add_products(sums[0], packed, packed);
    });
  }

  __device__ void decide(int phase, int64_t, Decision& d, const double (&sums)[kSums]) const {
    if (!row_is_active(d.status)) return;
    if (phase >= kSumPhases) {
      lsqr_residual_known(d.state, d.status, sums[0]);
    } else if (!d.summed) {
      d.summed = this->settle_scale(phase, sums[0], d.scale);
      if (d.summed) d.residual = lsqr_step_length(d.state, d.status, sqrt(sums[0]) / d.scale, a.numbers());
    }
  }

  template <typename Part>
  __device__ void last_pass(const Part&, const Decision&) const {}
};

// In shared memory it keeps ŝ and, where it was summed, x with its step: six words per unknown. A loop for each vector:
// with all in one there would be more numbers than registers.
template <typename T>
struct LsqrDirection : LsqrWork<T> {
  using typename LsqrWork<T>::C, typename LsqrWork<T>::Decision, typename LsqrWork<T>::Numbers;
  using LsqrWork<T>::V, LsqrWork<T>::a, LsqrWork<T>::kSumPhases;
  static constexpr int kSums = 4;
  static constexpr bool kKeeps = true;

  __device__ void begin(int64_t row, Decision& d) const {
    LsqrWork<T>::begin(row, d);
    d.direction.take_step = d.status == kIterating && d.state.step > 0.0;
    d.with_solution = d.was_active && lsqr_asks_for_solution(d.state, d.status, a.damped(), a.numbers().largest);
  }

  // x with its step, as it will be stored
  template <typename Part>
  __device__ __forceinline__ Pack<T, V> load_solution(const Part& part, const Tile<V>& tile, const Decision& d) const {
    Pack<T, V> x = tile.load(a.x + part.start());
    if (d.direction.take_step) {
      const C step = static_cast<C>(d.state.unit * d.state.step);
      const Numbers p = this->load(tile, a.p + part.start());
#pragma unroll
      for (int k = 0; k < V; ++k) x.v[k] = static_cast<T>(fused(step, p.v[k], static_cast<C>(x.v[k])));
    }
    return x;
  }

  // vᵀS v: float32 has too few exponents for S v
  template <typename Part>
  __device__ __forceinline__ void add_damped(double& sum, const Part& part, const Tile<V>& tile, C* place,
                                             const Numbers& packed_v) const {
    const Numbers shift = tile.settled(place, part.load(tile, a.shift));
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const double v = static_cast<double>(packed_v.v[k]);
      sum = fma(v * v, static_cast<double>(shift.v[k]), sum);
    }
  }

  // ŝ = Mᵀr̂ − S x / ρ
  template <typename Part>
  __device__ __forceinline__ Numbers gradient_of(const Part& part, const Tile<V>& tile, const Decision& d, Numbers t,
                                                 const Numbers& x) const {
    if (!a.damped()) return t;
    const C inverse = this->inverse_of_power(d.state.unit * d.state.r_scale);
    const Numbers shift = part.load(tile, a.shift);
#pragma unroll
    for (int k = 0; k < V; ++k) t.v[k] = fused(-shift.v[k], inverse * x.v[k], t.v[k]);
    return t;
  }

  template <typename Part>
  __device__ void pass(int phase, const Part& part, const Decision& d, double (&sums)[kSums]) const {
    if (phase < kSumPhases) {
      if (row_is_active(d.status) && !d.summed) gradient(part, d, sums);
    } else {
      update(part, d, sums);
    }
  }

  // ‖x‖², xᵀS x;   ‖ŝ‖², ‖Mᵀr̂‖²
  template <typename Part>
  __device__ __forceinline__ void gradient(const Part& part, const Decision& d, double (&sums)[kSums]) const {
    if (d.with_solution) {
      part.for_each_tile([&](const Tile<V>& tile) {
        const Numbers x = widened(load_solution(part, tile, d));
        const Numbers packed = scaled(tile.settled(part.template place<C>(tile), x), d.x_scale);
        add_products(sums[2], packed, packed);
        if (a.damped()) add_damped(sums[3], part, tile, part.template place<C>(tile, 1), packed);
      });
    }
    part.for_each_tile([&](const Tile<V>& tile) {
      C* const place = part.template place<C>(tile, 1);
      Numbers t = this->load(tile, a.t + part.start());
      const Numbers packed = scaled(tile.settled(place, t), d.scale);
      add_products(sums[1], packed, packed);
      if (!d.with_solution || !a.damped()) return;
      t = gradient_of(part, tile, d, t,
                      part.keeps() ? tile.kept(part.template place<C>(tile)) : widened(load_solution(part, tile, d)));
      const Numbers packed_s = scaled(tile.settled(place, t), d.scale);
      add_products(sums[0], packed_s, packed_s);
    });
  }

  // x ← x + step p̂,   then   p̂ ← gradient ŝ + keep p̂   or   p̂ ← x;   ‖p̂‖², p̂ᵀS p̂
  template <typename Part>
  __device__ __forceinline__ void update(const Part& part, const Decision& d, double (&sums)[kSums]) const {
    if (d.direction.take_step) {
      part.for_each_tile([&](const Tile<V>& tile) {
        if (part.keeps() && d.with_solution) {
          tile.store(a.x + part.start(), narrowed(tile.kept(part.template place<C>(tile))));
        } else {
          tile.store(a.x + part.start(), load_solution(part, tile, d));
        }
      });
    }
    if (d.was_active && d.status == kVerifying) {
      part.for_each_tile([&](const Tile<V>& tile) { tile.store(a.p + part.start(), tile.load(a.x + part.start())); });
    }
    if (d.was_active && d.status == kIterating) turn(part, d, sums);
  }
  static __device__ __forceinline__ Pack<T, V> narrowed(const Numbers& numbers) {
    Pack<T, V> narrow;
#pragma unroll
    for (int k = 0; k < V; ++k) narrow.v[k] = static_cast<T>(numbers.v[k]);
    return narrow;
  }

  template <typename Part>
  __device__ __forceinline__ void turn(const Part& part, const Decision& d, double (&sums)[kSums]) const {
    const C of_gradient = static_cast<C>(d.direction.gradient);
    const C of_last = static_cast<C>(d.direction.keep);
    part.for_each_tile([&](const Tile<V>& tile) {
      C* const place = part.template place<C>(tile, 1);
      Numbers s;
      if (part.keeps()) {
        s = tile.kept(place);
      } else {
        s = gradient_of(part, tile, d, this->load(tile, a.t + part.start()), this->load(tile, a.x + part.start()));
      }
      Pack<T, V> p{};
      if (of_last != C(0)) p = tile.load(a.p + part.start());
#pragma unroll
      for (int k = 0; k < V; ++k) {
        p.v[k] = static_cast<T>(fused(of_gradient, s.v[k], of_last * static_cast<C>(p.v[k])));
      }
      tile.store(a.p + part.start(), p);
      const Numbers packed = tile.settled(place, widened(p));
      add_products(sums[0], packed, packed);
      if (a.damped()) add_damped(sums[1], part, tile, place, packed);
    });
  }

  __device__ void decide(int phase, int64_t, Decision& d, const double (&sums)[kSums]) const {
    if (!row_is_active(d.status)) return;
    if (phase >= kSumPhases) {
      if (d.status == kIterating) lsqr_direction_known(d.state, d.status, sums[0], sums[1]);
    } else if (!d.summed) {
      const bool first_stands = this->settle_scale(phase, sums[1], d.scale);
      const bool second_stands = !d.with_solution || this->settle_scale(phase, sums[2], d.x_scale);
      d.summed = first_stands && second_stands;
      if (!d.summed) return;
      const double s = d.with_solution && a.damped() ? sums[0] : sums[1];
      const GradientNorms norms{sqrt(s) / d.scale, sqrt(sums[1]) / d.scale, sqrt(sums[2]) / d.x_scale,
                                sqrt(sums[3]) / d.x_scale};
      d.direction.take_step = false;
      lsqr_gradient_known(d.state, d.status, d.iterations, norms, d.with_solution, d.direction, a.numbers());
    }
  }

  // best ← x   or   x ← best   or   x ← 0
  template <typename Part>
  __device__ void last_pass(const Part& part, const Decision& d) const {
    if (d.direction.best == Best::kNothing && !d.direction.clear_solution) return;
    T* const x_row = a.x + part.start();
    T* const best_row = a.best + part.start();
    part.for_each_tile([&](const Tile<V>& tile) {
      if (d.direction.clear_solution) {
        tile.store(x_row, Pack<T, V>{});
      } else if (d.direction.best == Best::kRestore) {
        tile.store(x_row, tile.load(best_row));
      } else {
        tile.store(best_row, tile.load(x_row));
      }
    });
  }
};

template <typename T, typename Work>
void run(OnCuda device, const LsqrArguments<T>& a, Work work) {
  const bool packed = can_pack<T>(a.cols, a.y, a.q, a.r, a.t, a.x, a.p, a.best) && can_pack<T>(a.cols, a.shift);
  launch_rows(device, work, a, packed);
}

}  // namespace

template <typename T>
void lsqr_begin(OnCuda device, const LsqrArguments<T>& a) {
  run(device, a, LsqrBegin<T>{});
}

template <typename T>
void lsqr_residual(OnCuda device, const LsqrArguments<T>& a) {
  run(device, a, LsqrResidual<T>{});
}

template <typename T>
void lsqr_direction(OnCuda device, const LsqrArguments<T>& a) {
  run(device, a, LsqrDirection<T>{});
}

IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_LSQR, OnCuda)

}  // namespace imaml_ext
