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
  TaskMemory memory(a.tape, tape_size<T>(a.net, a.images));
  return BatchStorage<T>(a.net, a.images, Keep::kBars, true, memory);
}

template <typename T>
PerTask<const T> rows(const NetworkArguments<T>& a, const T* first) {
  return {first, a.net.parameters};
}
template <typename T>
PerTask<T> rows(const NetworkArguments<T>& a, T* first) {
  return {first, a.net.parameters};
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
  if (a.labels != nullptr) c.labels = {a.labels, a.targets_per_task()};
  if (a.targets != nullptr) c.targets = {a.targets, a.targets_per_task()};
  c.values = storage.values.back().out;
  c.probabilities = storage.probabilities;
  return c;
}

template <typename T>
void write_outputs(OnCuda device, const NetworkArguments<T>& a, const BatchStorage<T>& storage) {
  CriterionArguments<T> c = criterion_of(a, storage);
  c.outputs = a.outputs;
  launch_elements<outputs_kernel<T>>(device.stream, c, a.images * a.net.outputs(), a.tasks);
}

// Forward, criterion and backward: losses [B], the gradient in rows of parameters.
template <typename T>
void pass_both_ways(OnCuda device, const NetworkArguments<T>& a, const BatchPass<T>& pass,
                    const BatchStorage<T>& storage, PerTask<const T> params, T* losses, PerTask<T> gradient) {
  pass.forward(params, storage);
  CriterionArguments<T> criterion = criterion_of(a, storage);
  criterion.bar = storage.bars.back().out_bar;
  criterion.losses = losses;
  launch<criterion_kernel<T>>(device.stream, {grid_of(1, a.tasks), kCriterionThreads}, criterion);
  pass.backward(params, storage, gradient);
}

// The derivative of every task's values along the direction and the criterion's second derivative of it in output_bar,
// and then finish(pass, storage, dots, criterion).
template <typename T, typename Finish>
void along(OnCuda device, const NetworkArguments<T>& a, const Finish& finish) {
  const auto [scratch, dots] = take_memory(a, [&]<typename Memory>(Memory& memory) {
    const auto scratch = take_scratch<T>(a.net, a.images, memory);
    return std::pair(scratch, DotStorage<T, Memory>(a.net, a.images, memory));
  });
  const BatchStorage<T> storage = storage_on_tape(a);
  const BatchKernels<T> kernels(device.stream, a.net, a.tasks, a.images, scratch);
  const BatchPass<T> pass(a.net, kernels);
  pass.tangent(rows(a, a.params), rows(a, a.direction), storage, dots);
  CriterionArguments<T> criterion = criterion_of(a, storage);
  criterion.values = dots.dots.back().out_dot;
  criterion.bar = pass.output_bar(dots);
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
  BatchPass<T>(a.net, kernels).forward(rows(a, a.params), storage);
  write_outputs(device, a, storage);
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
  pass_both_ways(device, a, BatchPass<T>(a.net, kernels), storage, rows(a, a.params), a.losses, rows(a, a.gradient));
  write_outputs(device, a, storage);
}

template <typename T>
void network_descend(OnCuda device, const NetworkArguments<T>& a, const ProxArguments<T>& prox, int64_t steps) {
  const auto [scratch, storage] = take_memory(a, [&]<typename Memory>(Memory& memory) {
    const auto scratch = take_scratch<T>(a.net, a.images, memory);
    return std::pair(scratch, Storage<T, Memory>(a.net, a.images, Keep::kNothing, true, memory));
  });
  ProxArguments<T> step = prox;
  step.grad = reinterpret_cast<T*>(a.allocate(prox.rows * prox.cols * static_cast<int64_t>(sizeof(T))));
  const BatchKernels<T> kernels(device.stream, a.net, a.tasks, a.images, scratch);
  const BatchPass<T> pass(a.net, kernels);
  kernels.read_input(images_of(a), storage.input);
  for (int64_t k = 0; k < steps; ++k) {
    pass_both_ways(device, a, pass, storage, rows(a, a.params), a.losses + k * a.tasks, rows(a, step.grad));
    prox_update(device, ProxUpdate::kSgd, step);
  }
}

template <typename T>
void network_product(OnCuda device, const NetworkArguments<T>& a, bool gauss_newton) {
  along(device, a,
        [&](const BatchPass<T>& pass, const BatchStorage<T>& storage, const DotStorage<T, TaskMemory>& dots,
            const CriterionArguments<T>&) {
          if (gauss_newton) {
            pass.gauss_newton(rows(a, a.params), storage, dots, rows(a, a.product));
          } else {
            pass.second(rows(a, a.params), rows(a, a.direction), storage, dots, rows(a, a.product));
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
