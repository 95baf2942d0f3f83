// The CPU's part of every op, done by the CUDA kernels that the host runs: linked in place of csrc/*/cpu, beside the
// same checks and registrations.
#include "cg/arguments.h"
#include "common/next_round.h"
#include "lsqr/arguments.h"
#include "minres/arguments.h"
#include "network/arguments.h"
#include "prox/arguments.h"

namespace imaml_ext {

constexpr OnCuda kEmulated{nullptr};

template <typename T>
void cg_begin(OnCpu, const CgArguments<T>& a) {
  cg_begin(kEmulated, a);
}
template <typename T>
void cg_direction(OnCpu, const CgArguments<T>& a) {
  cg_direction(kEmulated, a);
}
template <typename T>
void cg_step(OnCpu, const CgArguments<T>& a) {
  cg_step(kEmulated, a);
}
void next_round(OnCpu, const NextRound& a) { next_round(kEmulated, a); }
template <typename T>
void cg_shifts_step(OnCpu, const CgShiftsArguments<T>& a) {
  cg_shifts_step(kEmulated, a);
}
template <typename T>
void lsqr_begin(OnCpu, const LsqrArguments<T>& a) {
  lsqr_begin(kEmulated, a);
}
template <typename T>
void lsqr_residual(OnCpu, const LsqrArguments<T>& a) {
  lsqr_residual(kEmulated, a);
}
template <typename T>
void lsqr_direction(OnCpu, const LsqrArguments<T>& a) {
  lsqr_direction(kEmulated, a);
}
template <typename T>
void minres_begin(OnCpu, const MinresArguments<T>& a) {
  minres_begin(kEmulated, a);
}
template <typename T>
void minres_step(OnCpu, const MinresArguments<T>& a) {
  minres_step(kEmulated, a);
}
template <typename T>
void prox_update(OnCpu, ProxUpdate update, const ProxArguments<T>& a) {
  prox_update(kEmulated, update, a);
}
template <typename T>
void prox_penalty(OnCpu, const ProxArguments<T>& a) {
  prox_penalty(kEmulated, a);
}
template <typename T>
void network_outputs(OnCpu, const NetworkArguments<T>& a) {
  network_outputs(kEmulated, a);
}
template <typename T>
void network_gradient(OnCpu, const NetworkArguments<T>& a) {
  network_gradient(kEmulated, a);
}
template <typename T>
void network_descend(OnCpu, const NetworkArguments<T>& a, const ProxArguments<T>& prox, int64_t steps) {
  network_descend(kEmulated, a, prox, steps);
}
template <typename T>
void network_product(OnCpu, const NetworkArguments<T>& a, bool gauss_newton) {
  network_product(kEmulated, a, gauss_newton);
}
template <typename T>
void network_curvature(OnCpu, const NetworkArguments<T>& a) {
  network_curvature(kEmulated, a);
}

IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_CG, OnCpu)
IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_CG_SHIFTS, OnCpu)
IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_LSQR, OnCpu)
IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_MINRES, OnCpu)
IMAML_FOR_ROW_TYPES(IMAML_INSTANTIATE_PROX, OnCpu)
IMAML_INSTANTIATE_NETWORK(OnCpu, float)
IMAML_INSTANTIATE_NETWORK(OnCpu, double)

}  // namespace imaml_ext
