// The network ops: their schemas, their checks and their registration, for every device.
#include <ATen/Dispatch.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "common/on_device.h"
#include "network/arguments.h"
#include "network/call.h"
#include "network/storage.h"
#include "prox/tensors.h"

namespace imaml_ext {
namespace {

// Calls work(device, arguments) with what every op has: the call's sizes, params [B, N], x and y where they are
// defined.
template <typename T, typename Work>
void run(const NetworkCall& call, const at::Tensor& params, const at::Tensor& x, const at::Tensor& y,
         const Work& work) {
  if (call.tasks == 0) return;
  NetworkArguments<T> a(call.net);
  a.tasks = call.tasks, a.images = call.images, a.params = params.const_data_ptr<T>();
  if (x.defined()) a.x = x.const_data_ptr<T>();
  if (y.defined() && y.scalar_type() == at::kLong) a.labels = y.const_data_ptr<int64_t>();
  if (y.defined() && y.scalar_type() != at::kLong) a.targets = y.const_data_ptr<T>();
  on_device_of(params, a, work);
}

at::Tensor network_outputs_op(const at::Tensor& params, const at::Tensor& x, at::IntArrayRef network) {
  const char* const op = "network_outputs";
  NetworkCall call(op, params, network);
  call.read_x(op, x, params);
  const at::Tensor outputs = at::empty({call.tasks, call.images, call.net.outputs()}, params.options());
  AT_DISPATCH_FLOATING_TYPES(params.scalar_type(), "imaml_ext", [&] {
    run<scalar_t>(call, params, x, {}, [&](auto device, NetworkArguments<scalar_t>& a) {
      a.outputs = outputs.mutable_data_ptr<scalar_t>();
      network_outputs(device, a);
    });
  });
  return outputs;
}

// Room for tapes. On the CPU the last one is kept when it is not too large, and taken again once nobody else holds it:
// fresh memory costs about as much as filling it. (On CUDA the caching allocator does this.)
at::Tensor take_tape(int64_t tasks, int64_t bytes, const at::Tensor& params) {
  constexpr int64_t kMostKept = int64_t{256} << 20;
  static thread_local at::Tensor kept;
  const bool cpu = params.is_cpu();
  if (cpu && kept.defined() && kept.use_count() == 1 && kept.size(0) == tasks && kept.size(1) == bytes) return kept;
  const at::Tensor tape = at::empty({tasks, bytes}, params.options().dtype(at::kByte));
  if (cpu && tape.numel() <= kMostKept) kept = tape;
  return tape;
}

// Losses [B], outputs [B, S, K] and gradients [B, N]; with Keep::kBars also what second derivatives need, [B, bytes].
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> differentiate(const char* op, const at::Tensor& params,
                                                                         const at::Tensor& x, const at::Tensor& y,
                                                                         at::IntArrayRef network, Keep keep) {
  NetworkCall call(op, params, network);
  call.read_x(op, x, params);
  call.read_y(op, y, params, true);
  const at::Tensor losses = at::empty({call.tasks}, params.options());
  const at::Tensor outputs = at::empty({call.tasks, call.images, call.net.outputs()}, params.options());
  const at::Tensor gradient = at::empty_like(params);
  at::Tensor tape;
  AT_DISPATCH_FLOATING_TYPES(params.scalar_type(), "imaml_ext", [&] {
    if (keep == Keep::kBars) tape = take_tape(call.tasks, tape_size<scalar_t>(call.net, call.images), params);
    run<scalar_t>(call, params, x, y, [&](auto device, NetworkArguments<scalar_t>& a) {
      a.losses = losses.mutable_data_ptr<scalar_t>();
      a.outputs = outputs.mutable_data_ptr<scalar_t>();
      a.gradient = gradient.mutable_data_ptr<scalar_t>();
      if (tape.defined()) a.tape = static_cast<char*>(tape.mutable_data_ptr());
      network_gradient(device, a);
    });
  });
  return {losses, outputs, gradient, tape};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> network_gradient_op(const at::Tensor& params, const at::Tensor& x,
                                                                   const at::Tensor& y, at::IntArrayRef network) {
  auto [losses, outputs, gradient, tape] = differentiate("network_gradient", params, x, y, network, Keep::kNothing);
  return {losses, outputs, gradient};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> network_linearise(const at::Tensor& params,
                                                                             const at::Tensor& x, const at::Tensor& y,
                                                                             at::IntArrayRef network) {
  return differentiate("network_linearise", params, x, y, network, Keep::kBars);
}

at::Tensor network_descend_(at::Tensor& phi, const at::Tensor& theta, const at::Tensor& lam, const at::Tensor& lr,
                            const at::Tensor& x, const at::Tensor& y, at::IntArrayRef network, int64_t steps) {
  const char* const op = "network_descend_";
  NetworkCall call(op, phi, network, "phi");
  call.read_x(op, x, phi);
  call.read_y(op, y, phi, true);
  TORCH_CHECK_VALUE(steps >= 0, op, ": steps must be at least 0, got ", steps);
  ProxTensors prox;
  prox.phi = phi, prox.theta = theta, prox.lam = lam, prox.lr = lr;
  prox.check(op);
  TORCH_CHECK_VALUE(at::get_overlap_status(phi, theta) == at::MemOverlapStatus::No, op,
                    ": theta must have memory of its own, got some of that of phi, which changes");
  const at::Tensor losses = at::empty({steps, call.tasks}, phi.options());
  if (steps == 0) return losses;
  AT_DISPATCH_FLOATING_TYPES(phi.scalar_type(), "imaml_ext", [&] {
    run<scalar_t>(call, phi, x, y, [&](auto device, NetworkArguments<scalar_t>& a) {
      a.losses = losses.mutable_data_ptr<scalar_t>();
      network_descend(device, a, prox.arguments<scalar_t>(), steps);
    });
  });
  return losses;
}

// What follows on network_linearise: finish(device, arguments) with its tape and the direction p [B, N], or the
// directions [R, N] of one task.
template <typename Finish>
void along(const char* op, const at::Tensor& params, const at::Tensor& tape, const at::Tensor& y, const at::Tensor& p,
           at::IntArrayRef network, const Finish& finish) {
  NetworkCall call(op, params, network);
  call.read_direction(op, y, p, params);
  if (p.size(0) == 0) return;
  AT_DISPATCH_FLOATING_TYPES(params.scalar_type(), "imaml_ext", [&] {
    check_table(op, "tape", tape, at::kByte, {call.tasks, tape_size<scalar_t>(call.net, call.images)}, params);
    run<scalar_t>(call, params, {}, y, [&](auto device, NetworkArguments<scalar_t>& a) {
      a.tape = static_cast<char*>(const_cast<void*>(tape.const_data_ptr()));  // read alone
      a.direction = p.const_data_ptr<scalar_t>();
      a.shared = call.tasks == 1, a.tasks = p.size(0);
      finish(device, a);
    });
  });
}

at::Tensor network_product_op(const at::Tensor& params, const at::Tensor& tape, const at::Tensor& y,
                              const at::Tensor& p, at::IntArrayRef network, bool gauss_newton) {
  const at::Tensor product = at::empty_like(p);
  along("network_product", params, tape, y, p, network, [&]<typename T>(auto device, NetworkArguments<T>& a) {
    a.product = product.mutable_data_ptr<T>();
    network_product(device, a, gauss_newton);
  });
  return product;
}

at::Tensor network_curvature_op(const at::Tensor& params, const at::Tensor& tape, const at::Tensor& y,
                                const at::Tensor& p, at::IntArrayRef network) {
  const at::Tensor curvature = at::empty({p.size(0)}, params.options().dtype(at::kDouble));
  along("network_curvature", params, tape, y, p, network, [&]<typename T>(auto device, NetworkArguments<T>& a) {
    a.curvature = curvature.mutable_data_ptr<double>();
    network_curvature(device, a);
  });
  return curvature;
}

void register_ops(torch::Library& m) {
  m.impl("network_outputs", &network_outputs_op);
  m.impl("network_gradient", &network_gradient_op);
  m.impl("network_descend_", &network_descend_);
  m.impl("network_linearise", &network_linearise);
  m.impl("network_product", &network_product_op);
  m.impl("network_curvature", &network_curvature_op);
}

}  // namespace

// The reference networks, every task with parameters of its own: params [B, N], x [B, S, *], y [B, S] labels or
// [B, S, *] targets; `network` as in network.h.
TORCH_LIBRARY_FRAGMENT(imaml_ext, m) {
  m.def("network_outputs(Tensor params, Tensor x, int[] network) -> Tensor");
  m.def(
      "network_gradient(Tensor params, Tensor x, Tensor y, int[] network) -> "
      "(Tensor losses, Tensor outputs, Tensor gradient)");
  // `steps` times φ ← φ − η (∇L + λ (φ − θ)), as prox_sgd_step_; losses [steps, B] before each.
  m.def(
      "network_descend_(Tensor(a!) phi, Tensor theta, Tensor lam, Tensor lr, Tensor x, Tensor y, int[] network, "
      "int steps) -> Tensor");
  m.def(
      "network_linearise(Tensor params, Tensor x, Tensor y, int[] network) -> "
      "(Tensor losses, Tensor outputs, Tensor gradient, Tensor tape)");
  // p [B, N], or [R, N] where the others have one task, as in network_curvature.
  m.def("network_product(Tensor params, Tensor tape, Tensor y, Tensor p, int[] network, bool gauss_newton) -> Tensor");
  // pᵀ Jᵀ C J p of every row of p, float64: the way forward of the product with the Gauss-Newton matrix alone.
  m.def("network_curvature(Tensor params, Tensor tape, Tensor y, Tensor p, int[] network) -> Tensor");
}
IMAML_REGISTER(register_ops)

}  // namespace imaml_ext
