// The conjugate-gradient ops on CUDA: the phases of an op over rows (common/cuda/row_team.cuh).
//
// Where a product meets a sum of vectors' elements, `fma` says that it is rounded once. So it makes no difference which
// compiler contracts what, nor whether a vector was kept from the phase before or is computed again.
//
// No pointer is __restrict__: H p may be p itself, where a callback returns its argument, and p may be b. A tile is
// loaded as a whole before any of it is stored.
#include "cg/cuda/work.cuh"
#include "common/cuda/start.cuh"

namespace imaml_ext {
namespace {

template <typename T>
struct CgBegin : CgWork<T> {
  using typename CgWork<T>::C, typename CgWork<T>::Decision, typename CgWork<T>::Numbers;
  using CgWork<T>::V, CgWork<T>::a;
  static constexpr int kPhases = CgRows<T>::wide() ? 3 : 2;  // float64 sums that have left their range: once more
  static constexpr int kSums = 4;
  static constexpr bool kKeeps = false;

  __device__ void begin(int64_t, Decision& d) const {
    d.b_scale = d.r_scale = 1.0;
    d.alpha = 0.0;
    d.iterations = 0;
    d.take_step = d.summed = false;
  }
  __device__ bool is_over(const Decision& d) const { return d.summed; }

  // r = b − (H x0 + shift x0), or b itself (written where there is an r);   ‖b‖², ‖r‖², ‖x0‖², rᵀ M r
  template <typename Part>
  __device__ void pass(int, const Part& part, const Decision& d, double (&sums)[kSums]) const {
    if (d.summed) return;
    part.for_each_tile([&](const Tile<V>& tile) {
      Numbers packed_r;
      const Pack<T, V> r = residual_at_start(part, tile, a, d.b_scale, d.r_scale, sums, packed_r);
      if (a.r != nullptr) tile.store(a.r + part.start(), r);
      if (a.inverse_diagonal.data != nullptr) {
        const Numbers packed_z =
            tile.settled(part.template place<C>(tile), this->preconditioned(part, tile, widened(r)));
        add_products(sums[3], packed_r, scaled(packed_z, d.r_scale));
      }
    });
  }

  __device__ void decide(int phase, int64_t row, Decision& d, const double (&sums)[kSums]) const {
    if (d.summed) return;
    const BeginSums of_row{a.hp != nullptr ? sums[0] : sums[1], sums[1], sums[2]};
    if (kPhases > 2 && phase == 0) {
      d.b_scale = row_scale_of_sum(of_row.bb), d.r_scale = row_scale_of_sum(of_row.rr);
      if (d.b_scale != 1.0 || d.r_scale != 1.0) return;
    }
    d.summed = true;
    d.status = row_begin(d.state, of_row, d.b_scale, d.r_scale, a.rtol[row * a.rtol_stride],
                         a.atol[row * a.atol_stride], a.wide(), d.clear_solution);
    if (a.update_direction) {
      const double rz = a.inverse_diagonal.data != nullptr ? sums[3] : sums[1];
      row_direction(d.state, d.status, row_rescaled(d.state, d.r_scale, rz), a.largest());
    }
  }

  // p = z. x = 0 unless it is a warm start to keep. Even a row that is over has a direction, for the operator to be
  // given something finite.
  template <typename Part>
  __device__ void last_pass(const Part& part, const Decision& d) const {
    if (a.x == nullptr) return;
    this->update(part, d);
    this->clear(part, d.clear_solution || a.hp == nullptr, !a.update_direction || !row_is_active(d.status));
  }
};

// In shared memory a step keeps p, and A p, then r in its place: a row is read and written once, seven words per
// unknown.
template <typename T>
struct CgStep : CgWork<T> {
  using typename CgWork<T>::C, typename CgWork<T>::Decision, typename CgWork<T>::Numbers;
  using CgWork<T>::V, CgWork<T>::a;
  static constexpr int kPhases = 3;
  static constexpr int kSums = 3;
  static constexpr bool kKeeps = true;

  // A p = H p + shift p
  template <typename Part>
  __device__ __forceinline__ Numbers load_Ap(const Part& part, const Tile<V>& tile, const Numbers& p) const {
    Numbers Ap = this->load(tile, a.hp + part.start());
    const Numbers shift = part.load(tile, a.shift);
#pragma unroll
    for (int k = 0; k < V; ++k) Ap.v[k] = fused(shift.v[k], p.v[k], Ap.v[k]);
    return Ap;
  }

  template <typename Part>
  __device__ void pass(int phase, const Part& part, const Decision& d, double (&sums)[kSums]) const {
    if (!row_is_active(d.status)) return;
    if (phase == 0) {
      curvature(part, 1.0 / d.state.unit, sums);
    } else {
      residual(part, d, sums);
      if (d.may_overflow) sums[2] = overflows(part, static_cast<C>(d.alpha));
    }
  }

  // pᵀAp, ‖Ap‖², ‖p‖²
  template <typename Part>
  __device__ __forceinline__ void curvature(const Part& part, double scale, double (&sums)[kSums]) const {
    part.for_each_tile([&](const Tile<V>& tile) {
      const Numbers p = this->load(tile, a.p_now() + part.start());
      const Numbers Ap = load_Ap(part, tile, p);
      const Numbers packed_p = scaled(tile.settled(part.template place<C>(tile), p), scale);
      const Numbers packed_Ap = scaled(tile.settled(part.template place<C>(tile, 1), Ap), scale);
      add_products(sums[0], packed_p, packed_Ap);
      add_products(sums[1], packed_Ap, packed_Ap);
      add_products(sums[2], packed_p, packed_p);
    });
  }

  // r ← r − α A p   or   r ← b − A x, where p is x;   rᵀr, rᵀ M r
  template <typename Part>
  __device__ __forceinline__ void residual(const Part& part, const Decision& d, double (&sums)[kSums]) const {
    const int64_t start = part.start();
    const bool verifying = d.status == kVerifying;
    const T* const r_row = (verifying ? a.b : a.r_now()) + start;
    const C alpha = verifying ? C(1) : static_cast<C>(d.alpha);
    const double scale = 1.0 / d.state.unit;
    part.for_each_tile([&](const Tile<V>& tile) {
      C* const place = part.template place<C>(tile, 1);
      auto r = tile.load(r_row);
      const Numbers Ap = part.keeps() ? tile.kept(place) : load_Ap(part, tile, this->load(tile, a.p_now() + start));
#pragma unroll
      for (int k = 0; k < V; ++k) r.v[k] = static_cast<T>(fused(-alpha, Ap.v[k], static_cast<C>(r.v[k])));
      if (!a.last) tile.store(a.r + start, r);
      const Numbers wide = widened(r);
      if (a.inverse_diagonal.data != nullptr) {
        const Numbers packed_z = scaled(tile.settled(place, this->preconditioned(part, tile, wide)), scale);
        const Numbers packed_r = scaled(tile.settled(place, wide), scale);
        add_products(sums[0], packed_r, packed_r);
        add_products(sums[1], packed_r, packed_z);
      } else {
        const Numbers packed_r = scaled(tile.settled(place, wide), scale);
        add_products(sums[0], packed_r, packed_r);
      }
    });
  }

  // How many x + α p are not finite in T. Only looked at where a bound does not settle it.
  template <typename Part>
  __device__ double overflows(const Part& part, C alpha) const {
    double infinite = 0.0;
    part.for_each_tile([&](const Tile<V>& tile) {
      const Numbers p = this->load(tile, a.p_now() + part.start());
      Pack<T, V> x{};
      if (!a.first) x = tile.load(a.x + part.start());
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const T next = static_cast<T>(fused(alpha, p.v[k], static_cast<C>(x.v[k])));
        if (!is_finite(static_cast<double>(next))) infinite += 1.0;
      }
    });
    return infinite;
  }

  __device__ void decide(int phase, int64_t row, Decision& d, const double (&sums)[kSums]) const {
    if (!row_is_active(d.status)) return;
    if (phase == 0) {  // α = rᵀz / pᵀAp
      d.curvature = {sums[0], sums[1], sums[2]};
      d.alpha = row_step_length(d.state, d.status, d.curvature, a.unit_roundoff(), a.largest(), d.length,
                                d.take_scaled_rhs, d.best);
      d.may_overflow = row_is_active(d.status) && row_may_overflow(d.state, d.length, a.largest());
      if (d.take_scaled_rhs) {
        const double shift = static_cast<double>(a.shift.data[row * a.shift.row_stride]);
        row_scaled_rhs(d.state, d.curvature, a.shift.col_stride == 0, shift);
      }
    } else if (sums[2] > 0.0) {
      d.status = kNonFinite;
    } else {
      d.take_step = row_residual(d.state, d.status, d.iterations, d.length, sums[0], a.unit_roundoff(), d.best);
      const double rz = a.inverse_diagonal.data != nullptr ? sums[1] : sums[0];
      if (a.update_direction) row_direction(d.state, d.status, rz, a.largest());
    }
  }

  template <typename Part>
  __device__ void last_pass(const Part& part, const Decision& d) const {
    this->keep_or_restore(part, d);
    this->update(part, d);
    if (d.take_scaled_rhs) take_scaled_rhs(part);
    // A row that is over after its first step had neither of them yet.
    if (a.first) this->clear(part, !d.take_step && !d.take_scaled_rhs, !a.last && !row_is_active(d.status));
  }

  __device__ void end(int64_t row, Decision& d) const {
    d.state.alpha = d.take_step ? d.alpha : 0.0;
    CgWork<T>::end(row, d);
  }

  // x ← b / shift where the shift is positive and the quotient finite
  template <typename Part>
  __device__ void take_scaled_rhs(const Part& part) const {
    part.for_each_tile([&](const Tile<V>& tile) {
      auto x = tile.load(a.b + part.start());
      const Numbers shift = part.load(tile, a.shift);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (shift.v[k] > C(0)) x.v[k] = static_cast<T>(static_cast<C>(x.v[k]) / shift.v[k]);
        if (!(shift.v[k] > C(0)) || !is_finite(static_cast<double>(x.v[k]))) x.v[k] = static_cast<T>(0.0f);
      }
      tile.store(a.x + part.start(), x);
    });
  }
};

template <typename T>
struct CgDirection : CgWork<T> {
  using typename CgWork<T>::C, typename CgWork<T>::Decision, typename CgWork<T>::Numbers;
  using CgWork<T>::V, CgWork<T>::a;
  static constexpr int kPhases = 2;
  static constexpr int kSums = 1;
  static constexpr bool kKeeps = false;

  // rᵀz
  template <typename Part>
  __device__ void pass(int, const Part& part, const Decision& d, double (&sums)[kSums]) const {
    if (!row_is_active(d.status)) return;
    const int64_t start = part.start();
    const double scale = 1.0 / d.state.unit;
    part.for_each_tile([&](const Tile<V>& tile) {
      C* const place = part.template place<C>(tile);
      const Numbers r = this->load(tile, a.r + start);
      const Numbers z = this->preconditioned(part, tile, a.z != nullptr ? this->load(tile, a.z + start) : r);
      const Numbers packed_r = scaled(tile.settled(place, r), scale);
      add_products(sums[0], packed_r, scaled(tile.settled(place, z), scale));
    });
  }

  __device__ void decide(int, int64_t, Decision& d, const double (&sums)[kSums]) const {
    row_direction(d.state, d.status, sums[0], a.largest());
  }

  // p ← z + β p   (or p ← x for a row that verifies)
  template <typename Part>
  __device__ void last_pass(const Part& part, const Decision& d) const {
    this->update(part, d);
  }
};

template <typename T, typename Work>
void run(OnCuda device, const CgArguments<T>& a, Work work) {
  const bool packed = can_pack<T>(a.cols, a.b, a.hp, a.z, a.x, a.r, a.p, a.best) && can_pack<T>(a.cols, a.shift) &&
                      can_pack<T>(a.cols, a.inverse_diagonal);
  launch_rows(device, work, a, packed);
}

}  // namespace

template <typename T>
void cg_begin(OnCuda device, const CgArguments<T>& a) {
  run(device, a, CgBegin<T>{});
}

template <typename T>
void cg_direction(OnCuda device, const CgArguments<T>& a) {
  run(device, a, CgDirection<T>{});
}

template <typename T>
void cg_step(OnCuda device, const CgArguments<T>& a) {
  run(device, a, CgStep<T>{});
}

IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_CG, OnCuda)

}  // namespace imaml_ext
