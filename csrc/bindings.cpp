// The Python side of the native part: the loop over a Python callback, and what the build knows of itself. Everything
// else is reached through the operator registry (torch.ops.imaml_ext).
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "cg/solver.h"
#include "common/cpu/capability.h"
#include "lsqr/solver.h"
#include "minres/solver.h"
#include "network/network.h"

namespace py = pybind11;

namespace {

// A Python callable as a C++ one, of p or, where the batch is solved in blocks, of p and the slice of its rows. The
// loop runs without the GIL; it is held only in here, and an exception raised by the callable comes out of the loop as
// the same exception.
imaml_ext::RowOperator row_operator(const py::object& callable, const char* solver, const char* name, bool in_blocks) {
  return [callable = callable.ptr(), solver, name, in_blocks](const at::Tensor& argument, imaml_ext::RowRange rows) {
    py::gil_scoped_acquire gil;
    const auto function = py::reinterpret_borrow<py::object>(callable);
    const py::object result =
        in_blocks ? function(argument, py::slice(rows.first, rows.last, std::nullopt)) : function(argument);
    TORCH_CHECK_TYPE(THPVariable_Check(result.ptr()), solver, ": ", name, " must return a tensor, got ",
                     std::string(py::str(py::type::of(result).attr("__name__"))));
    return THPVariable_Unpack(result.ptr());
  };
}

// What every solver is given.
imaml_ext::SolveOptions solve_options(const at::Tensor& shift, const std::optional<at::Tensor>& x0,
                                      int64_t max_iterations, const at::Tensor& rtol, const at::Tensor& atol,
                                      int64_t check_every, int64_t rows_per_block) {
  imaml_ext::SolveOptions options;
  options.shift = shift;
  options.x0 = x0;
  options.max_iterations = max_iterations;
  options.rtol = rtol;
  options.atol = atol;
  options.check_every = check_every;
  options.rows_per_block = rows_per_block;
  return options;
}

py::tuple cg(const py::object& hvp, const at::Tensor& b, const at::Tensor& shift, const std::optional<at::Tensor>& x0,
             int64_t max_iterations, const at::Tensor& rtol, const at::Tensor& atol,
             const std::optional<at::Tensor>& inverse_diagonal, const py::object& preconditioner, int64_t check_every,
             int64_t rows_per_block, bool lanczos, const std::optional<at::Tensor>& shifts) {
  imaml_ext::CgOptions options;
  static_cast<imaml_ext::SolveOptions&>(options) =
      solve_options(shift, x0, max_iterations, rtol, atol, check_every, rows_per_block);
  if (inverse_diagonal) options.inverse_diagonal = *inverse_diagonal;
  const bool in_blocks = rows_per_block > 0;
  if (!preconditioner.is_none()) {
    options.preconditioner = row_operator(preconditioner, "cg", "preconditioner", in_blocks);
  }
  options.lanczos = lanczos;
  if (shifts) options.shifts = *shifts;
  imaml_ext::CgResult result;
  {
    py::gil_scoped_release no_gil;
    result = imaml_ext::cg(row_operator(hvp, "cg", "A", in_blocks), b, options);
  }
  py::object kept = py::none(), shifted = py::none();
  if (const auto& t = result.lanczos) kept = py::make_tuple(t->diagonal, t->off_diagonal, t->steps);
  if (const auto& s = result.shifted) shifted = py::make_tuple(s->x, s->iterations);
  return py::make_tuple(result.x, result.status, result.iterations, result.residual_norm, kept, shifted);
}

py::tuple lsqr(const py::object& matvec, const py::object& rmatvec, const at::Tensor& y, int64_t unknowns,
               const std::optional<at::Tensor>& shift, const std::optional<at::Tensor>& x0, int64_t max_iterations,
               const at::Tensor& rtol, const at::Tensor& atol, int64_t check_every) {
  const imaml_ext::LsqrOptions options{shift.value_or(at::Tensor()), x0, max_iterations, rtol, atol, check_every};
  imaml_ext::LsqrResult result;
  {
    py::gil_scoped_release no_gil;
    result = imaml_ext::lsqr(row_operator(matvec, "lsqr", "matvec", /*in_blocks=*/false),
                             row_operator(rmatvec, "lsqr", "rmatvec", /*in_blocks=*/false), y, unknowns, options);
  }
  return py::make_tuple(result.x, result.status, result.iterations, result.residual_norm, result.gradient_norm);
}

// And, where asked for, the diagonal, the off-diagonal and the order of the tridiagonal matrices.
py::tuple minres(const py::object& hvp, const at::Tensor& b, const at::Tensor& shift,
                 const std::optional<at::Tensor>& x0, int64_t max_iterations, const at::Tensor& rtol,
                 const at::Tensor& atol, int64_t check_every, int64_t rows_per_block, bool lanczos) {
  imaml_ext::MinresOptions options;
  static_cast<imaml_ext::SolveOptions&>(options) =
      solve_options(shift, x0, max_iterations, rtol, atol, check_every, rows_per_block);
  options.lanczos = lanczos;
  imaml_ext::MinresResult result;
  {
    py::gil_scoped_release no_gil;
    result = imaml_ext::minres(row_operator(hvp, "minres", "A", rows_per_block > 0), b, options);
  }
  if (!lanczos) return py::make_tuple(result.x, result.status, result.iterations, result.residual_norm);
  return py::make_tuple(result.x, result.status, result.iterations, result.residual_norm, result.lanczos.diagonal,
                        result.lanczos.off_diagonal, result.lanczos.steps);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native part of imaml_ext. Use imaml_ext.cg and imaml_ext.ops.";
  m.def("cg", torch::wrap_pybind_function(cg), py::arg("hvp"), py::arg("b"), py::kw_only(), py::arg("shift"),
        py::arg("x0"), py::arg("max_iterations"), py::arg("rtol"), py::arg("atol"), py::arg("inverse_diagonal"),
        py::arg("preconditioner"), py::arg("check_every"), py::arg("rows_per_block"), py::arg("lanczos"),
        py::arg("shifts"));
  m.def("lsqr", torch::wrap_pybind_function(lsqr), py::arg("matvec"), py::arg("rmatvec"), py::arg("y"),
        py::arg("unknowns"), py::kw_only(), py::arg("shift"), py::arg("x0"), py::arg("max_iterations"), py::arg("rtol"),
        py::arg("atol"), py::arg("check_every"));
  m.def("minres", torch::wrap_pybind_function(minres), py::arg("hvp"), py::arg("b"), py::kw_only(), py::arg("shift"),
        py::arg("x0"), py::arg("max_iterations"), py::arg("rtol"), py::arg("atol"), py::arg("check_every"),
        py::arg("rows_per_block"), py::arg("lanczos"));
  m.def("network_tape_size", [](const std::vector<int64_t>& network, int64_t images, int64_t item_size) {
    return imaml_ext::network_tape_size(network, images, item_size);
  });
  m.def("cpu_capability", [] { return imaml_ext::name_of(imaml_ext::cpu_capability()); });
#if defined(IMAML_EXT_WITH_CUDA)
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
