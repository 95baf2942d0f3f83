// Shifted systems that follow a step of the rows, on CUDA: a launch that decides, and one over the vectors [B J, N].
#include "cg/cuda/work.cuh"

namespace imaml_ext {
namespace {

constexpr int kDeciders = 128;  // threads of a block, one per shift of a row

__global__ void __launch_bounds__(kDeciders)
    shift_kernel(const RowState* state, const double* sigma, ShiftState* shift_state, int64_t shifts, int64_t systems) {
  wait_for_launch_ahead();
  const int64_t system = static_cast<int64_t>(blockIdx.x) * kDeciders + threadIdx.x;
  if (system < systems) shift_step(state[system / shifts], shift_state[system], sigma[system]);
}

// x ← x + α p,   then   p ← ζ r + β p   unless the system follows no more
template <typename T>
__global__ void __launch_bounds__(kShortThreads)
    follow_kernel(const __grid_constant__ CgShifts<T> a, const __grid_constant__ RowPlan plan) {
  wait_for_launch_ahead();
  constexpr int V = kPackSize<T>;
  using C = compute_t<T>;
  const RowPart<V, false> part(plan);
  if (part.row >= plan.rows) return;
  const ShiftState& state = a.shift_state[part.row];
  if (state.alpha == 0.0) return;
  const C alpha = static_cast<C>(state.alpha);
  const C beta = static_cast<C>(state.beta);
  const C zeta = static_cast<C>(state.zeta);
  const bool turn = state.zeta != 0.0 && !a.last;
  const T* const r_row = a.r + part.row / a.shifts * a.cols + part.begin;
  T* const x_row = a.x + part.start();
  T* const p_row = a.p + part.start();
  part.for_each_tile([&](const Tile<V>& tile) {
    const Pack<C, V> p = widened(tile.load(p_row));
    Pack<T, V> next = tile.load(x_row);
#pragma unroll
    for (int k = 0; k < V; ++k) next.v[k] = static_cast<T>(fused(alpha, p.v[k], static_cast<C>(next.v[k])));
    tile.store(x_row, next);
    if (!turn) return;
    const Pack<T, V> r = tile.load(r_row);
#pragma unroll
    for (int k = 0; k < V; ++k) next.v[k] = static_cast<T>(fused(beta, p.v[k], zeta * static_cast<C>(r.v[k])));
    tile.store(p_row, next);
  });
}

}  // namespace

template <typename T>
void cg_shifts_step(OnCuda device, const CgShiftsArguments<T>& a) {
  const int64_t systems = a.rows * a.shifts;
  const auto blocks = static_cast<unsigned>((systems + kDeciders - 1) / kDeciders);
  launch<shift_kernel>(device.stream, {dim3(blocks), dim3(kDeciders)}, a.state, a.sigma, a.shift_state, a.shifts,
                       systems);
  const CgShifts<T>& shifts = a;
  const RowPlan plan = elementwise_plan<T>(systems, a.cols, can_pack<T>(a.cols, a.r, a.x, a.p));
  launch<follow_kernel<T>>(device.stream, shape_of(plan, 0), shifts, plan);
}

IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_CG_SHIFTS, OnCuda)

}  // namespace imaml_ext
