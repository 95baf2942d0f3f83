// The conjugate-gradient ops on CUDA: one launch an op, a team of blocks a row (common/cuda/row_team.cuh).
#include "cg/arguments.h"
#include "common/cuda/row_team.cuh"

namespace imaml_ext {
namespace {

// The elements of a row that a thread works on: packs of V, dealt out in turn to the threads of the team. With a second
// parameter the body is also given where, in a vector that each block keeps of its part of the row, this pack stands.
template <int V, typename Body>
__device__ __forceinline__ void for_each_pack(int64_t cols, int rank, int size, const Body& body) {
  const int64_t stride = static_cast<int64_t>(size) * kThreads * V;
  int kept = static_cast<int>(threadIdx.x) * V;
  for (int64_t i = (static_cast<int64_t>(rank) * kThreads + threadIdx.x) * V; i < cols; i += stride) {
    if constexpr (std::is_invocable_v<Body, int64_t, int>) {
      body(i, kept);
    } else {
      body(i);
    }
    kept += kThreads * V;
  }
}

// Elements of a row of `cols` that one block of a team has, in whole packs.
template <int V>
int64_t part_of_row(int64_t cols, int size) {
  const int64_t stride = static_cast<int64_t>(size) * kThreads * V;
  return (cols + stride - 1) / stride * kThreads * V;
}

// What thread 0 of each block decides from the team's sums, for the others to read.
struct TeamDecision {
  RowState state;
  int32_t status;
  int32_t iterations;
  double alpha;
  double beta;
  bool may_overflow;
  bool take_scaled_rhs;
  bool take_step;
  bool clear_solution;
};

// x ← 0,   p ← 0
template <typename T, int V>
__device__ __forceinline__ void clear(const CgArguments<T>& a, const RowTeam<3>& team, bool solution, bool direction) {
  if (!solution && !direction) return;
  const int64_t start = team.row() * a.cols;
  Pack<T, V> zero;
#pragma unroll
  for (int k = 0; k < V; ++k) zero.v[k] = static_cast<T>(0.0f);
  for_each_pack<V>(a.cols, team.rank(), team.size(), [&](int64_t i) {
    if (solution) store_pack<V>(a.x + start + i, zero);
    if (direction) store_pack<V>(a.p + start + i, zero);
  });
}

template <int V, typename T>
__device__ __forceinline__ auto widened(const Pack<T, V>& from) {
  Pack<compute_t<T>, V> wide;
#pragma unroll
  for (int k = 0; k < V; ++k) wide.v[k] = static_cast<compute_t<T>>(from.v[k]);
  return wide;
}

// M r or r, from column `col` of a row on
template <int V, typename T, typename C>
__device__ __forceinline__ Pack<C, V> preconditioned(const CgArguments<T>& a, int64_t row, int64_t col, Pack<C, V> r) {
  if (a.inverse_diagonal.data != nullptr) {
#pragma unroll
    for (int k = 0; k < V; ++k) r.v[k] = at(a.inverse_diagonal, row, col + k) * r.v[k];
  }
  return r;
}

// z, a callable's, M r or r, from column `col` of a row on
template <typename T, int V>
__device__ __forceinline__ auto load_z(const CgArguments<T>& a, int64_t row, int64_t col) {
  return preconditioned<V>(a, row, col, widened<V>(load_pack<V>((a.z != nullptr ? a.z : a.r) + row * a.cols + col)));
}

// Vectors of a block's part of a row in shared memory, where a step keeps them from pass to pass; a thread finds what
// it has put there itself. Null where the part does not fit.
template <typename C>
struct StagedRow {
  C* p = nullptr;
  C* r = nullptr;  // A p before
};

// x ← x + α p,   then   p ← z + β p   or   p ← x
template <typename T, int V, bool kKeep = false>
__device__ __forceinline__ void update(const CgArguments<T>& a, const RowTeam<3>& team, const TeamDecision& decision,
                                       const StagedRow<typename CgArguments<T>::C>& row_part = {}) {
  using C = typename CgArguments<T>::C;
  const int64_t row = team.row();
  const int64_t start = row * a.cols;
  const bool to_direction = a.update_direction && decision.status == kIterating;
  const bool to_solution = a.update_direction && decision.status == kVerifying;
  if (!decision.take_step && !to_direction && !to_solution) return;
  const C alpha = static_cast<C>(decision.alpha);
  const C beta = static_cast<C>(decision.beta);
  for_each_pack<V>(a.cols, team.rank(), team.size(), [&](int64_t i, int kept) {
    const auto p = kKeep ? load_pack<V>(row_part.p + kept) : widened<V>(load_pack<V>(a.p_now() + start + i));
    if (decision.take_step || to_solution) {
      Pack<T, V> x;
      if (!a.first) x = load_pack<V>(a.x + start + i);
      if (decision.take_step) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const C from = a.first ? C(0) : static_cast<C>(x.v[k]);
          x.v[k] = static_cast<T>(from + alpha * p.v[k]);
        }
        store_pack<V>(a.x + start + i, x);
      }
      if (to_solution) store_pack<V>(a.p + start + i, x);
    }
    if (to_direction) {
      const auto z = kKeep ? preconditioned<V>(a, row, i, load_pack<V>(row_part.r + kept)) : load_z<T, V>(a, row, i);
      Pack<T, V> next;
#pragma unroll
      for (int k = 0; k < V; ++k) next.v[k] = static_cast<T>(beta == C(0) ? z.v[k] : z.v[k] + beta * p.v[k]);
      store_pack<V>(a.p + start + i, next);
    }
  });
}

// rᵀz, a sum over the team in slot `slot`
template <typename T, int V>
__device__ __forceinline__ double dot_rz(const CgArguments<T>& a, RowTeam<3>& team, int slot) {
  using C = typename CgArguments<T>::C;
  const int64_t row = team.row();
  const int64_t start = row * a.cols;
  double rz[1] = {0.0};
  for_each_pack<V>(a.cols, team.rank(), team.size(), [&](int64_t i) {
    const auto r = load_pack<V>(a.r + start + i);
    const auto z = load_z<T, V>(a, row, i);
#pragma unroll
    for (int k = 0; k < V; ++k) rz[0] += static_cast<double>(static_cast<C>(r.v[k])) * static_cast<double>(z.v[k]);
  });
  team.sum(slot, rz);
  return team.storage.team_sums[slot][0];
}

// r = b − (H x0 + shift x0), or b itself (written where there is an r);   ‖b‖², ‖r‖², ‖x0‖²
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) begin_kernel(CgArguments<T> a) {
  wait_for_launch_ahead();
  using C = typename CgArguments<T>::C;
  __shared__ TeamStorage<3> storage;
  __shared__ TeamDecision decision;
  RowTeam<3> team(storage);
  const int64_t row = team.row();
  const int64_t start = row * a.cols;

  double sums[3] = {0.0, 0.0, 0.0};
  for_each_pack<V>(a.cols, team.rank(), team.size(), [&](int64_t i) {
    const auto b = load_pack<V>(a.b + start + i);
    Pack<T, V> r = b;
    if (a.hp != nullptr) {
      const auto hx = load_pack<V>(a.hp + start + i);
      const auto x = load_pack<V>(a.x + start + i);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const C x_k = static_cast<C>(x.v[k]);
        r.v[k] = static_cast<T>(static_cast<C>(b.v[k]) - (static_cast<C>(hx.v[k]) + at(a.shift, row, i + k) * x_k));
        sums[2] += static_cast<double>(x_k) * static_cast<double>(x_k);
      }
    }
    if (a.r != nullptr) store_pack<V>(a.r + start + i, r);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const double b_k = static_cast<double>(static_cast<C>(b.v[k]));
      const double r_k = static_cast<double>(static_cast<C>(r.v[k]));
      sums[0] += b_k * b_k;
      sums[1] += r_k * r_k;
    }
  });
  team.sum(0, sums);
  if (threadIdx.x == 0) {
    const double* s = storage.team_sums[0];
    decision.status = row_begin(decision.state, s[0], s[1], s[2], a.rtol[row * a.rtol_stride],
                                a.atol[row * a.atol_stride], a.unit_roundoff(), decision.clear_solution);
    decision.take_step = false;
    decision.alpha = 0.0;
    decision.beta = 0.0;
  }
  __syncthreads();

  // z = M r,  rᵀz,  p = z (written where there is a p)
  if (a.update_direction && row_is_active(decision.status)) {
    double rz = storage.team_sums[0][1];
    if (a.inverse_diagonal.data != nullptr) rz = dot_rz<T, V>(a, team, 1);
    __syncthreads();  // every thread has read the status
    if (threadIdx.x == 0) decision.beta = row_direction(decision.state, decision.status, rz, a.largest());
    __syncthreads();
    if (a.p != nullptr) update<T, V>(a, team, decision);
  }

  // x = 0 unless it is a warm start to keep. Even a row that is over has a direction, for the operator to be given
  // something finite.
  if (a.x != nullptr) {
    clear<T, V>(a, team, decision.clear_solution || a.hp == nullptr,
                !a.update_direction || !row_is_active(decision.status));
  }
  team.sync();  // no block leaves while another may still read its sums
  if (team.leads()) {
    a.state[row] = decision.state;
    a.status[row] = decision.status;
    a.iterations[row] = 0;
  }
}

// With kKeep a row is read and written once, seven words an unknown: p and A p, then r in its place, stay in shared
// memory between the passes.
template <typename T, int V, bool kKeep>
__global__ void __launch_bounds__(kThreads) step_kernel(CgArguments<T> a, int part) {
  wait_for_launch_ahead();
  using C = typename CgArguments<T>::C;
  __shared__ TeamStorage<3> storage;
  __shared__ TeamDecision decision;
  StagedRow<C> row_part;
  if constexpr (kKeep) row_part = {dynamic_shared<C>(), dynamic_shared<C>() + part};
  RowTeam<3> team(storage);
  const int64_t row = team.row();
  const int64_t start = row * a.cols;
  const int rank = team.rank();
  const int size = team.size();
  if (threadIdx.x == 0) {
    decision.state = a.state[row];
    decision.status = a.status[row];
    decision.iterations = a.iterations[row];
  }
  __syncthreads();
  if (!row_is_active(decision.status)) {  // the same in every block: nobody has written yet, nobody will
    if (a.first) clear<T, V>(a, team, true, !a.last);
    return;
  }

  // A p = H p + shift p;   pᵀAp, ‖Ap‖², ‖p‖²
  double curvature[3] = {0.0, 0.0, 0.0};
  const auto load_Ap = [&](const Pack<C, V>& p, int64_t i) {
    Pack<C, V> Ap = widened<V>(load_pack<V>(a.hp + start + i));
#pragma unroll
    for (int k = 0; k < V; ++k) Ap.v[k] += at(a.shift, row, i + k) * p.v[k];
    return Ap;
  };
  for_each_pack<V>(a.cols, rank, size, [&](int64_t i, int kept) {
    const auto p = widened<V>(load_pack<V>(a.p_now() + start + i));
    const auto Ap = load_Ap(p, i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const double wide_Ap = static_cast<double>(Ap.v[k]);
      const double wide_p = static_cast<double>(p.v[k]);
      curvature[0] += wide_p * wide_Ap;
      curvature[1] += wide_Ap * wide_Ap;
      curvature[2] += wide_p * wide_p;
    }
    if constexpr (kKeep) {
      store_pack<V>(row_part.p + kept, p);
      store_pack<V>(row_part.r + kept, Ap);
    }
  });
  team.sum(0, curvature);
  const Curvature c{storage.team_sums[0][0], storage.team_sums[0][1], storage.team_sums[0][2]};

  // α = rᵀz / pᵀAp
  const bool verifying = decision.status == kVerifying;
  __syncthreads();
  if (threadIdx.x == 0) {
    decision.take_step = false;
    decision.beta = 0.0;
    decision.alpha =
        row_step_length(decision.state, decision.status, c, a.unit_roundoff(), a.largest(), decision.take_scaled_rhs);
    decision.may_overflow =
        row_is_active(decision.status) && row_may_overflow(decision.state, decision.alpha, c, a.largest());
    if (decision.take_scaled_rhs) {
      row_scaled_rhs(decision.state, c, a.shift.col_stride == 0, static_cast<double>(at(a.shift, row, 0)));
    }
  }
  __syncthreads();
  const C alpha = static_cast<C>(decision.alpha);

  // x ← b / shift where the shift is positive and the quotient finite
  if (decision.take_scaled_rhs) {
    for_each_pack<1>(a.cols, rank, size, [&](int64_t i) {
      const C s = at(a.shift, row, i);
      const T quotient = s > C(0) ? static_cast<T>(static_cast<C>(a.b[start + i]) / s) : static_cast<T>(0.0f);
      a.x[start + i] = is_finite(static_cast<double>(quotient)) ? quotient : static_cast<T>(0.0f);
    });
  }

  // Only looked at where a bound does not settle it: how many x + α p are not finite in T.
  if (decision.may_overflow) {
    double infinite[1] = {0.0};
    for_each_pack<1>(a.cols, rank, size, [&](int64_t i) {
      const C from = a.first ? C(0) : static_cast<C>(a.x[start + i]);
      const T x = static_cast<T>(from + alpha * static_cast<C>(a.p_now()[start + i]));
      if (!is_finite(static_cast<double>(x))) infinite[0] += 1.0;
    });
    team.sum(1, infinite);
    if (threadIdx.x == 0 && storage.team_sums[1][0] > 0.0) decision.status = kNonFinite;
    __syncthreads();
  }

  if (row_is_active(decision.status)) {
    // r ← r − α A p   or   r ← b − A x, where p is x;   rᵀr, rᵀ M r
    double residual[2] = {0.0, 0.0};
    for_each_pack<V>(a.cols, rank, size, [&](int64_t i, int kept) {
      Pack<C, V> Ap;
      if constexpr (kKeep) {
        Ap = load_pack<V>(row_part.r + kept);
      } else {
        Ap = load_Ap(widened<V>(load_pack<V>(a.p_now() + start + i)), i);
      }
      auto r = load_pack<V>((verifying ? a.b : a.r_now()) + start + i);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const C from = static_cast<C>(r.v[k]);
        r.v[k] = static_cast<T>(verifying ? from - Ap.v[k] : from - alpha * Ap.v[k]);
        const C r_k = static_cast<C>(r.v[k]);
        const double wide = static_cast<double>(r_k);
        residual[0] += wide * wide;
        if (a.inverse_diagonal.data != nullptr) {
          residual[1] += wide * static_cast<double>(at(a.inverse_diagonal, row, i + k) * r_k);
        }
      }
      if (!a.last) store_pack<V>(a.r + start + i, r);
      if constexpr (kKeep) store_pack<V>(row_part.r + kept, widened<V>(r));
    });
    team.sum(2, residual);
    if (threadIdx.x == 0) {
      const double rr = storage.team_sums[2][0];
      const double rz = a.inverse_diagonal.data != nullptr ? storage.team_sums[2][1] : rr;
      decision.take_step =
          row_residual(decision.state, decision.status, decision.iterations, decision.alpha, c, rr, a.unit_roundoff());
      if (a.update_direction) decision.beta = row_direction(decision.state, decision.status, rz, a.largest());
    }
    __syncthreads();
    update<T, V, kKeep>(a, team, decision, row_part);
  }

  // A row that is over after its first step had neither of them yet.
  if (a.first) {
    clear<T, V>(a, team, !decision.take_step && !decision.take_scaled_rhs, !a.last && !row_is_active(decision.status));
  }

  team.sync();  // every block has read the row's state, and no block leaves while another may still read its sums
  if (team.leads()) {
    a.state[row] = decision.state;
    a.status[row] = decision.status;
    a.iterations[row] = decision.iterations;
  }
}

// z = M r,  rᵀz,  p ← z + β p   (or p ← x for a row that verifies)
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) direction_kernel(CgArguments<T> a) {
  wait_for_launch_ahead();
  __shared__ TeamStorage<3> storage;
  __shared__ TeamDecision decision;
  RowTeam<3> team(storage);
  const int64_t row = team.row();
  if (threadIdx.x == 0) {
    decision.state = a.state[row];
    decision.status = a.status[row];
    decision.take_step = false;
    decision.alpha = 0.0;
  }
  __syncthreads();
  if (!row_is_active(decision.status)) return;
  const double rz = dot_rz<T, V>(a, team, 0);
  if (threadIdx.x == 0) decision.beta = row_direction(decision.state, decision.status, rz, a.largest());
  __syncthreads();
  update<T, V>(a, team, decision);
  team.sync();
  if (team.leads()) {
    a.state[row] = decision.state;
    a.status[row] = decision.status;
  }
}

// launch(V), V elements at a time where the layout allows it.
template <typename T, typename Launch>
void in_packs(const CgArguments<T>& a, const Launch& launch) {
  if (can_pack<T>(a.cols, a.b, a.hp, a.z, a.x, a.r, a.p)) {
    launch(std::integral_constant<int, 16 / sizeof(T)>{});
  } else {
    launch(std::integral_constant<int, 1>{});
  }
}

}  // namespace

template <typename T>
void cg_begin(OnCuda device, const CgArguments<T>& a) {
  in_packs(a, [&]<int V>(std::integral_constant<int, V>) {
    launch_row_teams<begin_kernel<T, V>>(device.stream, a.rows, a.cols, 0, a);
  });
}

template <typename T>
void cg_direction(OnCuda device, const CgArguments<T>& a) {
  in_packs(a, [&]<int V>(std::integral_constant<int, V>) {
    launch_row_teams<direction_kernel<T, V>>(device.stream, a.rows, a.cols, 0, a);
  });
}

template <typename T>
void cg_step(OnCuda device, const CgArguments<T>& a) {
  in_packs(a, [&]<int V>(std::integral_constant<int, V>) {
    // The same bits either way: what a step keeps of a row is what it would read or compute again.
    constexpr auto kKeeping = step_kernel<T, V, true>;
    const int64_t part = part_of_row<V>(a.cols, team_size<kKeeping>(a.cols));
    const int64_t bytes = 2 * part * static_cast<int64_t>(sizeof(compute_t<T>));
    if (bytes <= kernel_facts<kKeeping>().most_shared) {
      launch_row_teams<kKeeping>(device.stream, a.rows, a.cols, bytes, a, static_cast<int>(part));
    } else {
      launch_row_teams<step_kernel<T, V, false>>(device.stream, a.rows, a.cols, 0, a, 0);
    }
  });
}

#define IMAML_INSTANTIATE(T)                                 \
  template void cg_begin(OnCuda, const CgArguments<T>&);     \
  template void cg_direction(OnCuda, const CgArguments<T>&); \
  template void cg_step(OnCuda, const CgArguments<T>&);
IMAML_INSTANTIATE(float)
IMAML_INSTANTIATE(double)
IMAML_INSTANTIATE(c10::BFloat16)
IMAML_INSTANTIATE(c10::Half)
#undef IMAML_INSTANTIATE

}  // namespace imaml_ext
