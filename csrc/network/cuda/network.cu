// The reference networks on CUDA: every kernel works on all tasks at once, layer after layer, and nothing looks at the
// device or allocates outside torch's allocator: each op can be captured in a CUDA graph.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>

#include "common/checks.h"
#include "network/call.h"
#include "network/cuda/layers.cuh"
#include "prox/arguments.h"
#include "prox/cuda/prox.cuh"

namespace imaml_ext {
namespace {

// Kernels count a task's pixels and channels in 32 bits, its numbers in 64.
void check_sizes(const char* op, const NetworkCall& call) {
  constexpr int64_t kMost = int64_t{1} << 30;
  for (const Layer& layer : call.net.layers) {
    const int64_t pixels = call.images * std::max(layer.pixels(), layer.pixels_in);
    const int64_t depth = static_cast<int64_t>(layer.taps.size()) * layer.depth_width();
    TORCH_CHECK_VALUE(pixels <= kMost && depth <= kMost && layer.width() <= kMost, op, ": on CUDA a layer has at most ",
                      kMost, " pixels a task, and as many weights a channel, got ", pixels, " and ", depth);
  }
}

// The first task's part of a tensor, a row or `count` numbers a task.
template <typename T>
PerTask<const T> rows_of(const at::Tensor& tensor, int64_t count) {
  return {tensor.const_data_ptr<T>(), count};
}
template <typename T>
PerTask<T> mutable_rows_of(const at::Tensor& tensor, int64_t count) {
  return {tensor.mutable_data_ptr<T>(), count};
}

// Memory of all tasks, laid out by `layout`, a function of an Arena or a TaskMemory.
template <typename Layout>
class Workspace {
 public:
  Workspace(int64_t tasks, const at::TensorOptions& options, const Layout& layout) : layout_(layout) {
    Arena measure(nullptr);
    layout(measure);
    bytes_ = measure.used();
    memory_ = at::empty({tasks, bytes_}, options.dtype(at::kByte));
  }
  auto take() {
    TaskMemory memory(memory_.mutable_data_ptr(), bytes_);
    return layout_(memory);
  }

 private:
  const Layout& layout_;
  int64_t bytes_;
  at::Tensor memory_;
};

template <typename T>
using BatchStorage = Storage<T, TaskMemory>;
template <typename T>
using BatchPass = NetworkPass<BatchKernels<T>>;

template <typename T>
BatchStorage<T> storage_on(const at::Tensor& tape, const NetworkCall& call) {
  TaskMemory memory(const_cast<void*>(tape.const_data_ptr()), tape.size(1));
  return BatchStorage<T>(call.net, call.images, Keep::kBars, true, memory);
}

template <typename T>
CriterionArguments<T> criterion_of(const NetworkCall& call, const at::Tensor& y, const BatchStorage<T>& storage) {
  CriterionArguments<T> a;
  a.images = static_cast<int>(call.images), a.channels = static_cast<int>(call.net.outputs());
  a.width = static_cast<int>(call.net.layers.back().width());
  if (y.scalar_type() == at::kLong) {
    a.labels = rows_of<int64_t>(y, call.targets(y));
  } else {
    a.targets = rows_of<T>(y, call.targets(y));
  }
  a.values = storage.values.back().out;
  a.probabilities = storage.probabilities;
  return a;
}

template <typename T>
void write_outputs(const NetworkCall& call, const BatchStorage<T>& storage, const at::Tensor& outputs) {
  CriterionArguments<T> a;
  a.images = static_cast<int>(call.images), a.channels = static_cast<int>(call.net.outputs());
  a.width = static_cast<int>(call.net.layers.back().width());
  a.values = storage.values.back().out;
  a.outputs = outputs.mutable_data_ptr<T>();
  launch_elements(outputs_kernel<T>, a, call.images * call.net.outputs(), call.tasks);
}

// Forward, criterion and backward: losses [B], the gradient in rows of parameters.
template <typename T>
void pass_both_ways(const NetworkCall& call, const BatchPass<T>& pass, const BatchStorage<T>& storage,
                    PerTask<const T> params, const at::Tensor& y, T* losses, PerTask<T> gradient) {
  pass.forward(params, storage);
  CriterionArguments<T> criterion = criterion_of<T>(call, y, storage);
  criterion.bar = storage.bars.back().out_bar;
  criterion.losses = losses;
  launch(criterion_kernel<T>, grid_of(1, call.tasks), kCriterionThreads, 0, criterion);
  pass.backward(params, storage, gradient);
}

at::Tensor network_outputs(const at::Tensor& params, const at::Tensor& x, at::IntArrayRef network) {
  const char* const op = "network_outputs";
  NetworkCall call(op, params, network);
  call.read_x(op, x, params);
  check_sizes(op, call);
  const Network& net = call.net;
  const c10::cuda::CUDAGuard guard(params.device());
  const at::Tensor outputs = at::empty({call.tasks, call.images, net.outputs()}, params.options());
  if (call.tasks == 0) return outputs;
  AT_DISPATCH_FLOATING_TYPES(params.scalar_type(), "imaml_ext", [&] {
    using T = scalar_t;
    const auto layout = [&]<typename Memory>(Memory& memory) {
      const auto scratch = take_scratch<T>(net, call.images, memory);
      return std::pair(scratch, Storage<T, Memory>(net, call.images, Keep::kNothing, false, memory));
    };
    Workspace workspace(call.tasks, params.options(), layout);
    const auto [scratch, storage] = workspace.take();
    const BatchKernels<T> kernels(net, call.tasks, call.images, scratch);
    kernels.read_input(rows_of<T>(x, call.images * net.input_size()), storage.input);
    BatchPass<T>(net, kernels).forward(rows_of<T>(params, net.parameters), storage);
    write_outputs<T>(call, storage, outputs);
  });
  return outputs;
}

// Losses [B], outputs [B, S, K] and gradients [B, N]; with Keep::kBars also what second derivatives need, [B, bytes].
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> differentiate(const char* op, const at::Tensor& params,
                                                                         const at::Tensor& x, const at::Tensor& y,
                                                                         at::IntArrayRef network, Keep keep) {
  NetworkCall call(op, params, network);
  call.read_x(op, x, params);
  call.read_y(op, y, params, true);
  check_sizes(op, call);
  const Network& net = call.net;
  const c10::cuda::CUDAGuard guard(params.device());
  const at::Tensor losses = at::empty({call.tasks}, params.options());
  const at::Tensor outputs = at::empty({call.tasks, call.images, net.outputs()}, params.options());
  const at::Tensor gradient = at::empty_like(params);
  at::Tensor tape;
  AT_DISPATCH_FLOATING_TYPES(params.scalar_type(), "imaml_ext", [&] {
    using T = scalar_t;
    if (keep == Keep::kBars) {
      tape = at::empty({call.tasks, tape_size<T>(net, call.images)}, params.options().dtype(at::kByte));
    }
    if (call.tasks == 0) return;
    const auto layout = [&]<typename Memory>(Memory& memory) {
      const auto scratch = take_scratch<T>(net, call.images, memory);
      std::optional<Storage<T, Memory>> storage;
      if (keep == Keep::kNothing) storage.emplace(net, call.images, keep, true, memory);
      return std::pair(scratch, storage);
    };
    Workspace workspace(call.tasks, params.options(), layout);
    const auto [scratch, passing] = workspace.take();
    const BatchStorage<T> storage = passing ? *passing : storage_on<T>(tape, call);
    const BatchKernels<T> kernels(net, call.tasks, call.images, scratch);
    kernels.read_input(rows_of<T>(x, call.images * net.input_size()), storage.input);
    pass_both_ways<T>(call, BatchPass<T>(net, kernels), storage, rows_of<T>(params, net.parameters), y,
                      losses.mutable_data_ptr<T>(), mutable_rows_of<T>(gradient, net.parameters));
    write_outputs<T>(call, storage, outputs);
  });
  return {losses, outputs, gradient, tape};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> network_gradient(const at::Tensor& params, const at::Tensor& x,
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
  check_sizes(op, call);
  TORCH_CHECK_VALUE(steps >= 0, op, ": steps must be at least 0, got ", steps);
  ProxTensors prox;
  prox.phi = phi, prox.theta = theta, prox.lam = lam, prox.lr = lr;
  prox.check(op);
  const Network& net = call.net;
  const c10::cuda::CUDAGuard guard(phi.device());
  const at::Tensor losses = at::empty({steps, call.tasks}, phi.options());
  if (call.tasks == 0 || steps == 0) return losses;
  const at::Tensor gradient = at::empty_like(phi);
  AT_DISPATCH_FLOATING_TYPES(phi.scalar_type(), "imaml_ext", [&] {
    using T = scalar_t;
    const auto layout = [&]<typename Memory>(Memory& memory) {
      const auto scratch = take_scratch<T>(net, call.images, memory);
      return std::pair(scratch, Storage<T, Memory>(net, call.images, Keep::kNothing, true, memory));
    };
    Workspace workspace(call.tasks, phi.options(), layout);
    const auto [scratch, storage] = workspace.take();
    const BatchKernels<T> kernels(net, call.tasks, call.images, scratch);
    const BatchPass<T> pass(net, kernels);
    kernels.read_input(rows_of<T>(x, call.images * net.input_size()), storage.input);
    for (int64_t k = 0; k < steps; ++k) {
      pass_both_ways<T>(call, pass, storage, rows_of<T>(phi, net.parameters), y,
                        losses.mutable_data_ptr<T>() + k * call.tasks, mutable_rows_of<T>(gradient, net.parameters));
      prox_sgd_step_on_cuda(phi, gradient, theta, lam, lr);
    }
  });
  return losses;
}

// The derivative of every task's values along p and the criterion's second derivative of it in output_bar, and then
// finish(call, pass, storage, dots, criterion).
template <typename Finish>
void along(const char* op, const at::Tensor& params, const at::Tensor& tape, const at::Tensor& y, const at::Tensor& p,
           at::IntArrayRef network, const Finish& finish) {
  NetworkCall call(op, params, network);
  const Network& net = call.net;
  call.read_direction(op, y, p, params);
  check_sizes(op, call);
  const c10::cuda::CUDAGuard guard(params.device());
  AT_DISPATCH_FLOATING_TYPES(params.scalar_type(), "imaml_ext", [&] {
    using T = scalar_t;
    check_table(op, "tape", tape, at::kByte, {call.tasks, tape_size<T>(net, call.images)}, params);
    if (call.tasks == 0) return;
    const auto layout = [&]<typename Memory>(Memory& memory) {
      const auto scratch = take_scratch<T>(net, call.images, memory);
      return std::pair(scratch, DotStorage<T, Memory>(net, call.images, memory));
    };
    Workspace workspace(call.tasks, params.options(), layout);
    const auto [scratch, dots] = workspace.take();
    const BatchStorage<T> storage = storage_on<T>(tape, call);
    const BatchKernels<T> kernels(net, call.tasks, call.images, scratch);
    const BatchPass<T> pass(net, kernels);
    pass.tangent(rows_of<T>(params, net.parameters), rows_of<T>(p, net.parameters), storage, dots);
    CriterionArguments<T> criterion = criterion_of<T>(call, y, storage);
    criterion.values = dots.dots.back().out_dot;
    criterion.bar = pass.output_bar(dots);
    launch(curve_kernel<T>, grid_of(1, call.tasks), kCriterionThreads, 0, criterion);
    finish(call, pass, storage, dots, criterion);
  });
}

at::Tensor network_product(const at::Tensor& params, const at::Tensor& tape, const at::Tensor& y, const at::Tensor& p,
                           at::IntArrayRef network, bool gauss_newton) {
  const at::Tensor product = at::empty_like(p);
  along("network_product", params, tape, y, p, network,
        [&]<typename T>(const NetworkCall& call, const BatchPass<T>& pass, const BatchStorage<T>& storage,
                        const DotStorage<T, TaskMemory>& dots, const CriterionArguments<T>&) {
          const PerTask<const T> theta = rows_of<T>(params, call.net.parameters);
          const PerTask<T> to = mutable_rows_of<T>(product, call.net.parameters);
          if (gauss_newton) {
            pass.gauss_newton(theta, storage, dots, to);
          } else {
            pass.second(theta, rows_of<T>(p, call.net.parameters), storage, dots, to);
          }
        });
  return product;
}

at::Tensor network_curvature(const at::Tensor& params, const at::Tensor& tape, const at::Tensor& y, const at::Tensor& p,
                             at::IntArrayRef network) {
  const at::Tensor curvature = at::empty({params.size(0)}, params.options().dtype(at::kDouble));
  along("network_curvature", params, tape, y, p, network,
        [&]<typename T>(const NetworkCall& call, const BatchPass<T>&, const BatchStorage<T>&,
                        const DotStorage<T, TaskMemory>&, const CriterionArguments<T>& criterion) {
          launch(curvature_kernel<T>, grid_of(1, call.tasks), kCriterionThreads, 0, criterion,
                 curvature.mutable_data_ptr<double>());
        });
  return curvature;
}

}  // namespace

TORCH_LIBRARY_IMPL(imaml_ext, CUDA, m) {
  m.impl("network_outputs", &network_outputs);
  m.impl("network_gradient", &network_gradient);
  m.impl("network_descend_", &network_descend_);
  m.impl("network_linearise", &network_linearise);
  m.impl("network_product", &network_product);
  m.impl("network_curvature", &network_curvature);
}

}  // namespace imaml_ext
