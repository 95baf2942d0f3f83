// The passes of the CPU kernels over a piece [begin, end) of one row: one table an instruction set.
#pragma once

#include "../cg.h"
#include "../prox.h"
#include "capability.h"
#include "network_arguments.h"

namespace imaml_ext {

enum class ResidualFrom : int {
  kRecurrence,  // r ← r − α A p
  kSolution,    // r ← b − A x, where p is x
};

enum class UpdateTo : int {
  kNothing,
  kDirection,  // p ← z + β p
  kSolution,   // p ← x
  kZero,       // p ← 0
};

struct ResidualSums {
  double rr = 0.0;  // rᵀr
  double rz = 0.0;  // rᵀ M r, M the diagonal preconditioner or the identity
};

struct BeginSums {
  double bb = 0.0;
  double rr = 0.0;
  double xx = 0.0;
};

template <typename T>
struct CgKernels {
  using A = CgArguments<T>;
  using C = typename A::C;
  BeginSums (*begin)(const A&, int64_t row, int64_t begin, int64_t end);
  Curvature (*curvature)(const A&, int64_t row, int64_t begin, int64_t end);
  bool (*step_is_finite)(const A&, int64_t row, int64_t begin, int64_t end, C alpha);
  ResidualSums (*residual)(const A&, int64_t row, int64_t begin, int64_t end, ResidualFrom from, C alpha);
  void (*update)(const A&, int64_t row, int64_t begin, int64_t end, bool take_step, C alpha, UpdateTo to, C beta);
  void (*scaled_rhs)(const A&, int64_t row, int64_t begin, int64_t end);
  double (*dot_rz)(const A&, int64_t row, int64_t begin, int64_t end);
};

template <typename T>
struct ProxKernels {
  using A = ProxArguments<T>;
  void (*gradient)(const A&, int64_t row, int64_t begin, int64_t end);
  double (*penalty)(const A&, int64_t row, int64_t begin, int64_t end);
  void (*sgd)(const A&, int64_t row, int64_t begin, int64_t end);
  void (*momentum)(const A&, int64_t row, int64_t begin, int64_t end);
  void (*adam)(const A&, int64_t row, int64_t begin, int64_t end);
};

// Layers of one task, float and double. Matrices are row-major; activations and their derivatives have `width` columns,
// a multiple of kChannelBlock, and rows over images and pixels. Products are contracted (a·b + c rounds once) where the
// instruction set can, so their last bits depend on it.
template <typename T>
struct NetworkKernels {
  // c[r][j] ← or += Σ_k a[r][k] b[k][j],   j < width, b [depth, width]
  void (*multiply)(const T* const* a, T* const* c, int64_t rows, int64_t depth, const T* b, int64_t width, bool add);
  // w[k][j] ← or += Σ_r a[r][k] g[r][j],   k in [first, last), j < channels, w [depth, channels]
  void (*outer)(const T* const* a, const T* const* g, int64_t rows, int64_t first, int64_t last, int64_t channels, T* w,
                bool add);
  // out[j][i] = in[i][j], in [rows, cols], padded with zeros to `width` columns
  void (*transpose)(const T* in, int64_t rows, int64_t cols, T* out, int64_t width);

  // Columns [first, last) of the norm and activation of a layer, of which these are the fields that each one reads and
  // writes.
  void (*norm)(const NormArguments<T>&, int64_t first, int64_t last);
  void (*norm_backward)(const NormArguments<T>&, int64_t first, int64_t last);
  void (*norm_tangent)(const NormArguments<T>&, int64_t first, int64_t last);
  void (*norm_second)(const NormArguments<T>&, int64_t first, int64_t last);
};

// The tables of the instruction set chosen by cpu_capability().
template <typename T>
const CgKernels<T>& cg_kernels();
template <typename T>
const ProxKernels<T>& prox_kernels();
template <typename T>
const NetworkKernels<T>& network_kernels();

// Each kernels_*.cpp defines cg_table<T>(), prox_table<T>() and network_table<T>() in the namespace of its instruction
// set.
#define IMAML_INSTANTIATE_TABLES                          \
  template const CgKernels<float>& cg_table();            \
  template const CgKernels<double>& cg_table();           \
  template const CgKernels<at::BFloat16>& cg_table();     \
  template const CgKernels<at::Half>& cg_table();         \
  template const ProxKernels<float>& prox_table();        \
  template const ProxKernels<double>& prox_table();       \
  template const ProxKernels<at::BFloat16>& prox_table(); \
  template const ProxKernels<at::Half>& prox_table();     \
  template const NetworkKernels<float>& network_table();  \
  template const NetworkKernels<double>& network_table();

// A row is worked on in pieces of this many elements, whoever works on them: sums depend on nothing else.
constexpr int64_t kPiece = 4096;
inline int64_t pieces_of(int64_t cols) { return (cols + kPiece - 1) / kPiece; }

}  // namespace imaml_ext
