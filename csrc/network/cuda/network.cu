// The reference networks on CUDA: every kernel works on all tasks at once, layer after layer, and nothing looks at the
// device: each op can be captured in a CUDA graph.
#include <optional>
#include <utility>

#include "network/arguments.h"
#include "network/cuda/layers.cuh"

namespace imaml_ext {
namespace {

// Memory of all tasks, laid out by `layout`, a function of an Arena or a TaskMemory.
template <typename T, typename Layout>
auto take_memory(const NetworkArguments<T>& a, const Layout& layout) {
  Arena measure(nullptr);
  layout(measure);
  TaskMemory memory(a.allocate(a.tasks * measure.used()), measure.used());
  return layout(memory);
}

template <typename T>
using BatchStorage = Storage<T, TaskMemory>;
template <typename T>
using BatchPass = NetworkPass<BatchKernels<T>>;

template <typename T>
BatchStorage<T> storage_on_tape(const NetworkArguments<T>& a) {
  TaskMemory memory(a.tape, a.shared ? 0 : tape_size<T>(a.net, a.images));
  return BatchStorage<T>(a.net, a.images, Keep::kBars, true, memory);
}

template <typename T>
PerTask<const T> rows(const NetworkArguments<T>& a, const T* first) {
  return {first, a.net.parameters};
}
template <typename T>
PerTask<const T> params_of(const NetworkArguments<T>& a) {
  return {a.params, a.params_stride()};
}
template <typename T>
ParametersOut<T> rows_out(const NetworkArguments<T>& a, T* first) {
  return ParametersOut<T>({first, a.net.parameters});
}
template <typename T>
PerTask<const T> images_of(const NetworkArguments<T>& a) {
  return {a.x, a.images * a.net.input_size()};
}

template <typename T>
CriterionArguments<T> criterion_of(const NetworkArguments<T>& a, const BatchStorage<T>& storage) {
  CriterionArguments<T> c;
  c.images = static_cast<int>(a.images), c.channels = static_cast<int>(a.net.outputs());
  c.width = static_cast<int>(a.net.layers.back().width());
  if (a.labels != nullptr) c.labels = {a.labels, a.targets_stride()};
  if (a.targets != nullptr) c.targets = {a.targets, a.targets_stride()};
  c.values = storage.values.back().out;
  c.probabilities = storage.probabilities;
  return c;
}

template <typename T>
PerTask<T> outputs_of(const NetworkArguments<T>& a) {
  return {a.outputs, a.images * a.net.outputs()};
}

// Where the derivative in β of the last layer goes if the criterion sums it.
template <typename T>
ParametersOut<T> beta_of_head(const NetworkArguments<T>& a, const ParametersOut<T>& gradient) {
  const Layer& head = a.net.layers.back();
  return BatchKernels<T>::is_plain(head) ? gradient + head.beta : ParametersOut<T>();
}

// Forward, criterion and backward: losses [B], the outputs where they are wanted, the gradient in rows of parameters.
template <typename T>
void pass_both_ways(OnCuda device, const NetworkArguments<T>& a, const BatchPass<T>& pass,
                    const BatchStorage<T>& storage, PerTask<const T> params, T* losses,
                    const ParametersOut<T>& gradient) {
  pass.forward(params, storage);
  CriterionArguments<T> criterion = criterion_of(a, storage);
  criterion.bar = storage.bars.back().out_bar;
  if (a.outputs != nullptr) criterion.outputs = outputs_of(a);
  criterion.losses = losses;
  criterion.beta = beta_of_head(a, gradient);
  launch<criterion_kernel<T>>(device.stream, {grid_of(1, a.tasks), kCriterionThreads}, criterion);
  pass.backward(params, storage, gradient);
}

// The derivative of every task's values along the direction and the criterion's second derivative of it in output_bar,
// with its sum for β in `product`, and then finish(pass, storage, dots, criterion).
template <typename T, typename Finish>
void along(OnCuda device, const NetworkArguments<T>& a, const Finish& finish) {
  const auto [scratch, dots] = take_memory(a, [&]<typename Memory>(Memory& memory) {
    const auto scratch = take_scratch<T>(a.net, a.images, memory);
    return std::pair(scratch, DotStorage<T, Memory>(a.net, a.images, memory));
  });
  const BatchStorage<T> storage = storage_on_tape(a);
  const BatchKernels<T> kernels(device.stream, a.net, a.tasks, a.images, scratch);
  const BatchPass<T> pass(a.net, kernels);
  pass.tangent(params_of(a), rows(a, a.direction), storage, dots);
  CriterionArguments<T> criterion = criterion_of(a, storage);
  criterion.values = dots.dots.back().out_dot;
  criterion.bar = pass.output_bar(dots);
  if (a.product != nullptr) criterion.beta = beta_of_head(a, rows_out(a, a.product));
  launch<curve_kernel<T>>(device.stream, {grid_of(1, a.tasks), kCriterionThreads}, criterion);
  finish(pass, storage, dots, criterion);
}

}  // namespace

template <typename T>
void network_outputs(OnCuda device, const NetworkArguments<T>& a) {
  const auto [scratch, storage] = take_memory(a, [&]<typename Memory>(Memory& memory) {
    const auto scratch = take_scratch<T>(a.net, a.images, memory);
    return std::pair(scratch, Storage<T, Memory>(a.net, a.images, Keep::kNothing, false, memory));
  });
  const BatchKernels<T> kernels(device.stream, a.net, a.tasks, a.images, scratch);
  kernels.read_input(images_of(a), storage.input);
  BatchPass<T>(a.net, kernels).forward(params_of(a), storage);
  CriterionArguments<T> c = criterion_of(a, storage);
  c.outputs = outputs_of(a);
  const int64_t blocks = ceil_div(a.images * a.net.outputs(), kElementThreads);
  launch<outputs_kernel<T>>(device.stream, {grid_of(blocks, a.tasks), kElementThreads}, c, static_cast<int>(blocks));
}

template <typename T>
void network_gradient(OnCuda device, const NetworkArguments<T>& a) {
  const auto [scratch, passing] = take_memory(a, [&]<typename Memory>(Memory& memory) {
    const auto scratch = take_scratch<T>(a.net, a.images, memory);
    std::optional<Storage<T, Memory>> storage;
    if (a.tape == nullptr) storage.emplace(a.net, a.images, Keep::kNothing, true, memory);
    return std::pair(scratch, storage);
  });
  const BatchStorage<T> storage = passing ? *passing : storage_on_tape(a);
  const BatchKernels<T> kernels(device.stream, a.net, a.tasks, a.images, scratch);
  kernels.read_input(images_of(a), storage.input);
  pass_both_ways(device, a, BatchPass<T>(a.net, kernels), storage, params_of(a), a.losses, rows_out(a, a.gradient));
}

template <typename T>
void network_descend(OnCuda device, const NetworkArguments<T>& a, const ProxArguments<T>& prox, int64_t steps) {
  const auto [scratch, storage] = take_memory(a, [&]<typename Memory>(Memory& memory) {
    const auto scratch = take_scratch<T>(a.net, a.images, memory);
    return std::pair(scratch, Storage<T, Memory>(a.net, a.images, Keep::kNothing, true, memory));
  });
  const BatchKernels<T> kernels(device.stream, a.net, a.tasks, a.images, scratch);
  const BatchPass<T> pass(a.net, kernels);
  kernels.read_input(images_of(a), storage.input);
  // φ and other rows take turns: a step reads the ones and writes the others, as part of the way back. The first step
  // of an odd number of them leaves its gradient there and moves φ in a launch of its own.
  T* const others = reinterpret_cast<T*>(a.allocate(prox.rows * prox.cols * static_cast<int64_t>(sizeof(T))));
  T *from = prox.phi, *to = others;
  for (int64_t k = 0; k < steps; ++k) {
    ParametersOut<T> out = rows_out(a, to);
    const bool apart = k == 0 && steps % 2 == 1;
    if (!apart) {
      out.phi = rows<T>(a, from);
      out.theta = {prox.theta, prox.theta_row_stride};
      out.lam = prox.lam, out.lr = prox.lr;
    }
    pass_both_ways(device, a, pass, storage, rows<T>(a, from), a.losses + k * a.tasks, out);
    if (apart) {
      ProxArguments<T> step = prox;
      step.grad = others;
      prox_update(device, ProxUpdate::kSgd, step);
    } else {
      std::swap(from, to);
    }
  }
}

template <typename T>
void network_product(OnCuda device, const NetworkArguments<T>& a, bool gauss_newton) {
  along(device, a,
        [&](const BatchPass<T>& pass, const BatchStorage<T>& storage, const DotStorage<T, TaskMemory>& dots,
            const CriterionArguments<T>&) {
          if (gauss_newton) {
            pass.gauss_newton(params_of(a), storage, dots, rows_out(a, a.product));
          } else {
            pass.second(params_of(a), rows(a, a.direction), storage, dots, rows_out(a, a.product));
          }
        });
}

template <typename T>
void network_curvature(OnCuda device, const NetworkArguments<T>& a) {
  along(device, a,
        [&](const BatchPass<T>&, const BatchStorage<T>&, const DotStorage<T, TaskMemory>&,
            const CriterionArguments<T>& criterion) {
          launch<curvature_kernel<T>>(device.stream, {grid_of(1, a.tasks), kCriterionThreads}, criterion, a.curvature);
        });
}

IMAML_INSTANTIATE_NETWORK(OnCuda, float)
IMAML_INSTANTIATE_NETWORK(OnCuda, double)

}  // namespace imaml_ext
