#include "network/call.h"

#include <c10/util/Exception.h>

#include <algorithm>

#include "common/checks.h"

namespace imaml_ext {

NetworkCall::NetworkCall(const char* op, const at::Tensor& params, at::IntArrayRef network, const char* name)
    : net(Network::parse({network.data(), network.size()})) {
  TORCH_CHECK_VALUE(net.layers.back().pixels_out == 1, op, ": network must end with one pixel per image, got ",
                    net.layers.back().pixels_out);
  TORCH_CHECK_TYPE(params.scalar_type() == at::kFloat || params.scalar_type() == at::kDouble, op, ": ", name,
                   " must be float32 or float64, got ", params.scalar_type());
  TORCH_CHECK_VALUE(params.dim() == 2 && params.size(1) == net.parameters && params.is_contiguous(), op, ": ", name,
                    " must be contiguous of shape [B, ", net.parameters, "], got ", params.sizes());
  tasks = params.size(0);
}

void NetworkCall::read_x(const char* op, const at::Tensor& x, const at::Tensor& params) {
  TORCH_CHECK_VALUE(x.device() == params.device(), op, ": x must be on the device of params, ", params.device(),
                    ", got ", x.device());
  TORCH_CHECK_TYPE(x.scalar_type() == params.scalar_type(), op, ": x must have the dtype of params, ",
                   params.scalar_type(), ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 3 && x.size(0) == tasks && x.size(1) >= 1 &&
                        x.numel() == tasks * x.size(1) * net.input_size() && x.is_contiguous(),
                    op, ": x must be contiguous of shape [", tasks, ", S, *] with ", net.input_size(),
                    " entries an example, got ", x.sizes());
  images = x.size(1);
  if (params.is_cuda()) check_sizes_on_cuda(op);
}

void NetworkCall::read_y(const char* op, const at::Tensor& y, const at::Tensor& params, bool check_labels) const {
  TORCH_CHECK_VALUE(y.device() == params.device(), op, ": y must be on the device of params, ", params.device(),
                    ", got ", y.device());
  const bool labels = y.scalar_type() == at::kLong;
  TORCH_CHECK_TYPE(labels || y.scalar_type() == params.scalar_type(), op,
                   ": y must be int64 labels or have the dtype of params, ", params.scalar_type(), ", got ",
                   y.scalar_type());
  const int64_t each = labels ? 1 : net.outputs();
  TORCH_CHECK_VALUE(y.dim() >= 2 && y.size(0) == tasks && y.size(1) == images && y.numel() == tasks * images * each &&
                        y.is_contiguous(),
                    op, ": y must be contiguous of shape [", tasks, ", ", images, "] with ", each,
                    " entries an example, got ", y.sizes());
  if (!labels || !check_labels || !y.is_cpu()) return;
  const int64_t* const from = y.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < y.numel(); ++i) {
    TORCH_CHECK_INDEX(from[i] >= 0 && from[i] < net.outputs(), op, ": y must hold labels in [0, ", net.outputs(),
                      "), got ", from[i]);
  }
}

void NetworkCall::read_direction(const char* op, const at::Tensor& y, const at::Tensor& p, const at::Tensor& params) {
  TORCH_CHECK_VALUE(y.dim() >= 2, op, ": y must have shape [B, S] or [B, S, *], got ", y.sizes());
  images = y.size(1);
  read_y(op, y, params, false);
  const bool shared = tasks == 1 && p.dim() == 2;
  check_like(op, "p", p, "params", shared ? params.expand({p.size(0), -1}) : params);
  if (params.is_cuda()) check_sizes_on_cuda(op);
}

void NetworkCall::check_sizes_on_cuda(const char* op) const {
  constexpr int64_t kMost = int64_t{1} << 30;
  for (const Layer& layer : net.layers) {
    const int64_t numbers = images * std::max(layer.pixels() * layer.width(), layer.pixels_in * layer.depth_width());
    const int64_t weights = layer.taps * layer.depth_width() * layer.width();
    TORCH_CHECK_VALUE(numbers <= kMost && weights <= kMost, op, ": on CUDA a layer has at most ", kMost,
                      " numbers per task, and as many weights, got ", numbers, " and ", weights);
  }
  TORCH_CHECK_VALUE(images * net.input_size() <= kMost, op, ": on CUDA an input has at most ", kMost,
                    " numbers per task, got ", images * net.input_size());
}

}  // namespace imaml_ext
