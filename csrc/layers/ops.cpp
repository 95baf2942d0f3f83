// Ops of single layers, CPU only: what the handlers of imaml_ext/models/task_functions.py are made of. They have no
// derivatives of their own; the functions that call them do.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "layers/layers.h"
#include "layers/memory.h"
#include "network/network.h"

namespace imaml_ext {
namespace {

void check(const char* op, const char* name, const at::Tensor& tensor, int64_t dim) {
  const bool real = tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble;
  TORCH_CHECK_TYPE(real, op, ": ", name, " must be float32 or float64, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == dim && tensor.is_contiguous(), op, ": ", name, " must be contiguous and have ", dim,
                    " dimensions, got shape ", tensor.sizes(), " and strides ", tensor.strides());
}

at::Tensor kept_like(const at::Tensor& tensor) { return empty_kept(tensor.sizes(), tensor.options()); }

std::pair<ConvolutionAxis, ConvolutionAxis> axes(const char* op, at::IntArrayRef size, at::IntArrayRef kernel,
                                                 at::IntArrayRef stride, at::IntArrayRef padding,
                                                 at::IntArrayRef dilation) {
  const ConvolutionAxis y{size[0], kernel[0], stride[0], padding[0], dilation[0]};
  const ConvolutionAxis x{size[1], kernel[1], stride[1], padding[1], dilation[1]};
  for (const ConvolutionAxis& axis : {y, x}) {
    TORCH_CHECK_VALUE(axis.kernel > 0 && axis.stride > 0 && axis.dilation > 0 && axis.padding >= 0, op,
                      ": kernel, stride and dilation must be positive and padding not negative, got ", kernel, ", ",
                      stride, ", ", dilation, " and ", padding);
    TORCH_CHECK_VALUE(axis.size + 2 * axis.padding > axis.dilation * (axis.kernel - 1), op,
                      ": the kernel must not exceed the padded image, got kernel ", kernel, " and image ", size);
  }
  return {y, x};
}

at::Tensor patches_op(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation) {
  check("layer_patches", "x", x, 4);
  const auto [y_axis, x_axis] = axes("layer_patches", x.sizes().slice(1, 2), kernel, stride, padding, dilation);
  const at::Tensor out =
      empty_kept({x.size(0), y_axis.count(), x_axis.count(), kernel[0] * kernel[1] * x.size(3)}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "imaml_ext", [&] {
    patches<scalar_t>(OnCpu{}, x.const_data_ptr<scalar_t>(), y_axis, x_axis, x.size(0), x.size(3),
                      out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

at::Tensor patches_adjoint_op(const at::Tensor& given, at::IntArrayRef size, at::IntArrayRef kernel,
                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const char* const op = "layer_patches_adjoint";
  check(op, "patches", given, 4);
  const auto [y_axis, x_axis] = axes(op, size, kernel, stride, padding, dilation);
  const int64_t taps = kernel[0] * kernel[1], channels = given.size(3) / taps;
  check_table(op, "patches", given, given.scalar_type(),
              {given.size(0), y_axis.count(), x_axis.count(), taps * channels}, given);
  const at::Tensor x = empty_kept({given.size(0), size[0], size[1], channels}, given.options());
  AT_DISPATCH_FLOATING_TYPES(given.scalar_type(), "imaml_ext", [&] {
    patches_adjoint<scalar_t>(OnCpu{}, given.const_data_ptr<scalar_t>(), y_axis, x_axis, given.size(0), channels,
                              x.mutable_data_ptr<scalar_t>());
  });
  return x;
}

at::Tensor turn_weights_op(const at::Tensor& w, bool back) {
  check("layer_turn_weights", "w", w, 4);
  const int64_t out = w.size(back ? 3 : 1), taps = w.size(back ? 1 : 3);
  const at::Tensor turned = empty_kept({w.size(0), w.size(3), w.size(2), w.size(1)}, w.options());
  AT_DISPATCH_FLOATING_TYPES(w.scalar_type(), "imaml_ext", [&] {
    turn_weights<scalar_t>(OnCpu{}, w.const_data_ptr<scalar_t>(), turned.mutable_data_ptr<scalar_t>(), w.size(0), out,
                           w.size(2), taps, back);
  });
  return turned;
}

// Reads the sizes of x [R, S, H, W, C], w [R, kh, kw, C, O] and y [R, S, H', W', O], of which one is to be made.
struct ConvolutionCall {
  Convolution c;
  std::vector<int64_t> x, w, y;

  ConvolutionCall(const char* op, at::IntArrayRef x_sizes, at::IntArrayRef w_sizes, at::IntArrayRef stride,
                  at::IntArrayRef padding, at::IntArrayRef dilation)
      : x(x_sizes.vec()), w(w_sizes.vec()) {
    std::tie(c.y_axis, c.x_axis) = axes(op, x_sizes.slice(2, 2), w_sizes.slice(1, 2), stride, padding, dilation);
    c.rows = x[0], c.images = x[1], c.channels = x[4], c.out = w[4];
    y = {c.rows, c.images, c.y_axis.count(), c.x_axis.count(), c.out};
    TORCH_CHECK_VALUE(w[0] == c.rows && w[3] == c.channels, op, ": w must have shape [", c.rows, ", kh, kw, ",
                      c.channels, ", O], got ", w_sizes);
    TORCH_CHECK_VALUE(c.channels % kChannelBlock == 0 && c.out % kChannelBlock == 0, op,
                      ": numbers of channels must be multiples of ", kChannelBlock, ", got ", c.channels, " and ",
                      c.out);
  }
};

at::Tensor convolve_op(const at::Tensor& x, const at::Tensor& w, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation) {
  check("task_convolve", "x", x, 5);
  check("task_convolve", "w", w, 5);
  const ConvolutionCall call("task_convolve", x.sizes(), w.sizes(), stride, padding, dilation);
  check_table("task_convolve", "w", w, x.scalar_type(), call.w, x);
  const at::Tensor y = empty_kept(call.y, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "imaml_ext", [&] {
    convolve<scalar_t>(OnCpu{}, call.c, x.const_data_ptr<scalar_t>(), w.const_data_ptr<scalar_t>(),
                       y.mutable_data_ptr<scalar_t>());
  });
  return y;
}

at::Tensor convolve_back_op(const at::Tensor& y_bar, const at::Tensor& w, at::IntArrayRef size, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation) {
  const char* const op = "task_convolve_back";
  check(op, "y_bar", y_bar, 5);
  check(op, "w", w, 5);
  const std::vector<int64_t> sizes{y_bar.size(0), y_bar.size(1), size[0], size[1], w.size(3)};
  const ConvolutionCall call(op, sizes, w.sizes(), stride, padding, dilation);
  check_table(op, "y_bar", y_bar, w.scalar_type(), call.y, w);
  const at::Tensor x_bar = empty_kept(call.x, w.options());
  AT_DISPATCH_FLOATING_TYPES(w.scalar_type(), "imaml_ext", [&] {
    convolve_back<scalar_t>(OnCpu{}, call.c, y_bar.const_data_ptr<scalar_t>(), w.const_data_ptr<scalar_t>(),
                            x_bar.mutable_data_ptr<scalar_t>());
  });
  return x_bar;
}

at::Tensor convolve_weight_op(const at::Tensor& x, const at::Tensor& y_bar, at::IntArrayRef kernel,
                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const char* const op = "task_convolve_weight";
  check(op, "x", x, 5);
  check(op, "y_bar", y_bar, 5);
  const std::vector<int64_t> sizes{x.size(0), kernel[0], kernel[1], x.size(4), y_bar.size(4)};
  const ConvolutionCall call(op, x.sizes(), sizes, stride, padding, dilation);
  check_table(op, "y_bar", y_bar, x.scalar_type(), call.y, x);
  const at::Tensor w_bar = empty_kept(call.w, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "imaml_ext", [&] {
    convolve_weight<scalar_t>(OnCpu{}, call.c, x.const_data_ptr<scalar_t>(), y_bar.const_data_ptr<scalar_t>(),
                              w_bar.mutable_data_ptr<scalar_t>());
  });
  return w_bar;
}

// The images of one row, a few at a time, so that their tiles stay in the cache.
struct WinogradCall {
  int64_t m, padding, images, at_once;
  int64_t tiles_y, tiles_x;

  WinogradCall(const char* op, int64_t m, int64_t padding, int64_t images, int64_t height, int64_t width,
               int64_t channels)
      : m(m), padding(padding), images(images) {  // height and width of y
    TORCH_CHECK_VALUE(m == 2 || m == 4, op, ": m must be 2 or 4, got ", m);
    TORCH_CHECK_VALUE(0 <= padding && padding <= 2 && height > 0 && width > 0, op,
                      ": padding must be 0, 1 or 2 and y must have pixels, got padding ", padding, " and y ", height,
                      " by ", width);
    tiles_y = (height + m - 1) / m, tiles_x = (width + m - 1) / m;
    constexpr int64_t kNumbers = int64_t{1} << 19;
    at_once = std::clamp<int64_t>(kNumbers / (numbers() * tiles_y * tiles_x * channels), 1, images);
  }
  int64_t numbers() const { return (m + 2) * (m + 2); }
  int64_t tiles(int64_t count) const { return count * tiles_y * tiles_x; }

  // L X Lᵀ of the tiles of x [S, H, W, C], or the pixels of x from its tiles z [K, S · tiles, C].
  template <typename T>
  void run(Winograd matrix, const at::Tensor& x, const at::Tensor& z) const {
    TileArguments<T> a = of<T>(matrix, x.size(1), x.size(2), x, z);
    a.channels = a.pixel = x.size(3);
    a.offset = matrix == Winograd::kInput ? padding : 0, a.step = m, a.rows = tiles_y, a.cols = tiles_x;
    winograd_tiles<T>(OnCpu{}, a, x.size(0), x.size(1) * x.size(2) * x.size(3));
  }
  // The same of a weight w [3, 3, C, O], every input channel one image of one tile.
  template <typename T>
  void run_weight(Winograd matrix, const at::Tensor& w, const at::Tensor& z) const {
    TileArguments<T> a = of<T>(matrix, 3, 3, w, z);
    a.channels = w.size(3), a.pixel = w.size(2) * w.size(3);
    a.step = 3, a.rows = a.cols = 1;
    winograd_tiles<T>(OnCpu{}, a, w.size(2), w.size(3));
  }

 private:
  template <typename T>
  TileArguments<T> of(Winograd matrix, int64_t height, int64_t width, const at::Tensor& x, const at::Tensor& z) const {
    TileArguments<T> a;
    a.matrix = matrix, a.m = m, a.height = height, a.width = width;
    a.image = const_cast<T*>(x.const_data_ptr<T>()), a.tiles = const_cast<T*>(z.const_data_ptr<T>());
    a.plane = z.size(1) * z.size(2);
    return a;
  }
};

// conv(x, w), or with `back` its adjoint in x, which is a convolution with the flipped and transposed weight.
at::Tensor winograd_convolve_op(const at::Tensor& x, const at::Tensor& w, int64_t m, int64_t padding, bool back) {
  const char* const op = "winograd_convolve";
  check(op, "x", x, 5);
  check(op, "w", w, 5);
  check_table(op, "w", w, x.scalar_type(), {x.size(0), 3, 3, w.size(3), w.size(4)}, x);
  const int64_t in = x.size(4), out = w.size(back ? 3 : 4);
  TORCH_CHECK_VALUE(w.size(back ? 4 : 3) == in, op, ": w must have ", in, " channels for x, got ", w.sizes());
  const int64_t height = x.size(2) - 2 + 2 * padding, width = x.size(3) - 2 + 2 * padding;
  const WinogradCall call(op, m, padding, x.size(1), height, width, std::max(in, out));
  const at::Tensor y = empty_kept({x.size(0), x.size(1), height, width, out}, x.options());
  const at::Tensor U = empty_kept({call.numbers(), w.size(3), w.size(4)}, x.options());
  const at::Tensor by = back ? U.transpose(1, 2) : U;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "imaml_ext", [&] {
    for (int64_t row = 0; row < x.size(0); ++row) {
      call.run_weight<scalar_t>(back ? Winograd::kFlippedWeight : Winograd::kWeight, w[row], U);
      for (int64_t first = 0; first < call.images; first += call.at_once) {
        const int64_t count = std::min(call.at_once, call.images - first);
        const at::Tensor V = empty_kept({call.numbers(), call.tiles(count), in}, x.options());
        at::Tensor Z = empty_kept({call.numbers(), call.tiles(count), out}, x.options());
        call.run<scalar_t>(Winograd::kInput, x[row].narrow(0, first, count), V);
        at::bmm_out(Z, V, by);
        call.run<scalar_t>(Winograd::kOutput, y[row].narrow(0, first, count), Z);
      }
    }
  });
  return y;
}

at::Tensor winograd_weight_op(const at::Tensor& x, const at::Tensor& y_bar, int64_t m, int64_t padding) {
  const char* const op = "winograd_weight";
  check(op, "x", x, 5);
  const int64_t height = x.size(2) - 2 + 2 * padding, width = x.size(3) - 2 + 2 * padding;
  check_table(op, "y_bar", y_bar, x.scalar_type(), {x.size(0), x.size(1), height, width, y_bar.size(4)}, x);
  const int64_t in = x.size(4), out = y_bar.size(4);
  const WinogradCall call(op, m, padding, x.size(1), height, width, std::max(in, out));
  const at::Tensor w_bar = empty_kept({x.size(0), 3, 3, in, out}, x.options());
  at::Tensor M = empty_kept({call.numbers(), in, out}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "imaml_ext", [&] {
    for (int64_t row = 0; row < x.size(0); ++row) {
      for (int64_t first = 0; first < call.images; first += call.at_once) {
        const int64_t count = std::min(call.at_once, call.images - first);
        const at::Tensor V = empty_kept({call.numbers(), call.tiles(count), in}, x.options());
        const at::Tensor A = empty_kept({call.numbers(), call.tiles(count), out}, x.options());
        call.run<scalar_t>(Winograd::kInput, x[row].narrow(0, first, count), V);
        call.run<scalar_t>(Winograd::kOutputAdjoint, y_bar[row].narrow(0, first, count), A);
        if (first == 0) {
          at::bmm_out(M, V.transpose(1, 2), A);
        } else {
          M.baddbmm_(V.transpose(1, 2), A);
        }
      }
      call.run_weight<scalar_t>(Winograd::kWeightAdjoint, w_bar[row], M);
    }
  });
  return w_bar;
}

// x [B, P, C] and vectors [B, C] of its dtype.
void check_norm(const char* op, const at::Tensor& x,
                std::initializer_list<std::pair<const char*, const at::Tensor*>> vectors) {
  check(op, "x", x, 3);
  TORCH_CHECK_VALUE(x.size(1) > 0, op, ": x must have at least one row per task, got shape ", x.sizes());
  for (const auto& [name, vector] : vectors) {
    check_table(op, name, *vector, x.scalar_type(), {x.size(0), x.size(2)}, x);
  }
}

template <typename T>
BatchNormArguments<T> norm_arguments(const at::Tensor& x, const at::Tensor& gamma) {
  BatchNormArguments<T> a;
  a.rows = x.size(1), a.channels = x.size(2);
  a.x = x.const_data_ptr<T>(), a.gamma = gamma.const_data_ptr<T>();
  return a;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_op(const at::Tensor& x, const at::Tensor& gamma,
                                                             const at::Tensor& beta, double eps) {
  check_norm("task_batch_norm", x, {{"gamma", &gamma}, {"beta", &beta}});
  const at::Tensor z = kept_like(x), mean = kept_like(gamma), scale = kept_like(gamma);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "imaml_ext", [&] {
    auto a = norm_arguments<scalar_t>(x, gamma);
    a.eps = eps, a.beta = beta.const_data_ptr<scalar_t>();
    a.z = z.mutable_data_ptr<scalar_t>();
    a.mean = mean.mutable_data_ptr<scalar_t>(), a.scale = scale.mutable_data_ptr<scalar_t>();
    batch_norm<scalar_t>(OnCpu{}, NormPass::kForward, a, x.size(0));
  });
  return {z, mean, scale};
}

template <typename T>
void read_statistics(BatchNormArguments<T>& a, const at::Tensor& mean, const at::Tensor& scale,
                     const at::Tensor& z_bar) {
  a.mean = const_cast<T*>(mean.const_data_ptr<T>()), a.scale = const_cast<T*>(scale.const_data_ptr<T>());  // read alone
  a.z_bar = z_bar.const_data_ptr<T>();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_backward_op(const at::Tensor& x, const at::Tensor& mean,
                                                                      const at::Tensor& scale, const at::Tensor& gamma,
                                                                      const at::Tensor& z_bar) {
  check_norm("task_batch_norm_backward", x, {{"mean", &mean}, {"scale", &scale}, {"gamma", &gamma}});
  check_table("task_batch_norm_backward", "z_bar", z_bar, x.scalar_type(), x.sizes(), x);
  const at::Tensor x_bar = kept_like(x), gamma_bar = kept_like(gamma), beta_bar = kept_like(gamma);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "imaml_ext", [&] {
    auto a = norm_arguments<scalar_t>(x, gamma);
    read_statistics(a, mean, scale, z_bar);
    a.x_bar = x_bar.mutable_data_ptr<scalar_t>();
    a.gamma_bar = gamma_bar.mutable_data_ptr<scalar_t>(), a.beta_bar = beta_bar.mutable_data_ptr<scalar_t>();
    batch_norm<scalar_t>(OnCpu{}, NormPass::kBackward, a, x.size(0));
  });
  return {x_bar, gamma_bar, beta_bar};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_second_op(const at::Tensor& x, const at::Tensor& mean,
                                                                    const at::Tensor& scale, const at::Tensor& gamma,
                                                                    const at::Tensor& z_bar, const at::Tensor& x_dot,
                                                                    const at::Tensor& gamma_dot,
                                                                    const at::Tensor& beta_dot) {
  const char* const op = "task_batch_norm_second";
  check_norm(
      op, x,
      {{"mean", &mean}, {"scale", &scale}, {"gamma", &gamma}, {"gamma_dot", &gamma_dot}, {"beta_dot", &beta_dot}});
  check_table(op, "z_bar", z_bar, x.scalar_type(), x.sizes(), x);
  check_table(op, "x_dot", x_dot, x.scalar_type(), x.sizes(), x);
  const at::Tensor by_x = kept_like(x), by_gamma = kept_like(gamma), by_z_bar = kept_like(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "imaml_ext", [&] {
    auto a = norm_arguments<scalar_t>(x, gamma);
    read_statistics(a, mean, scale, z_bar);
    a.x_dot = x_dot.const_data_ptr<scalar_t>();
    a.gamma_dot = gamma_dot.const_data_ptr<scalar_t>(), a.beta_dot = beta_dot.const_data_ptr<scalar_t>();
    a.x_bar = by_x.mutable_data_ptr<scalar_t>(), a.gamma_bar = by_gamma.mutable_data_ptr<scalar_t>();
    a.z_bar_bar = by_z_bar.mutable_data_ptr<scalar_t>();
    batch_norm<scalar_t>(OnCpu{}, NormPass::kSecond, a, x.size(0));
  });
  return {by_x, by_gamma, by_z_bar};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(imaml_ext, m) {
  // x [N, H, W, C] to patches [N, H', W', kh kw C], and back to the sum of what the patches hold of every pixel.
  m.def("layer_patches(Tensor x, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation) -> Tensor");
  m.def(
      "layer_patches_adjoint(Tensor patches, int[2] size, int[2] kernel, int[2] stride, int[2] padding, "
      "int[2] dilation) -> Tensor");
  // Weights [R, O, C, taps] to [R, taps, C, O], or back.
  m.def("layer_turn_weights(Tensor w, bool back) -> Tensor");
  // Every task's convolution, x [R, S, H, W, C] with w [R, kh, kw, C, O] to y [R, S, H', W', O], and its adjoints;
  // channels in multiples of 16.
  m.def("task_convolve(Tensor x, Tensor w, int[2] stride, int[2] padding, int[2] dilation) -> Tensor");
  m.def(
      "task_convolve_back(Tensor y_bar, Tensor w, int[2] size, int[2] stride, int[2] padding, int[2] dilation) -> "
      "Tensor");
  m.def(
      "task_convolve_weight(Tensor x, Tensor y_bar, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation) -> "
      "Tensor");
  // The same of 3×3 weights and stride 1 by Winograd's F(m × m, 3 × 3); `back` is the adjoint in x, with padding 2 − p.
  m.def("winograd_convolve(Tensor x, Tensor w, int m, int padding, bool back) -> Tensor");
  m.def("winograd_weight(Tensor x, Tensor y_bar, int m, int padding) -> Tensor");
  // x [B, P, C] normalised over P, gamma and beta [B, C]; its derivatives as BatchNormArguments has them.
  m.def("task_batch_norm(Tensor x, Tensor gamma, Tensor beta, float eps) -> (Tensor z, Tensor mean, Tensor scale)");
  m.def(
      "task_batch_norm_backward(Tensor x, Tensor mean, Tensor scale, Tensor gamma, Tensor z_bar) -> "
      "(Tensor x_bar, Tensor gamma_bar, Tensor beta_bar)");
  m.def(
      "task_batch_norm_second(Tensor x, Tensor mean, Tensor scale, Tensor gamma, Tensor z_bar, Tensor x_dot, "
      "Tensor gamma_dot, Tensor beta_dot) -> (Tensor by_x, Tensor by_gamma, Tensor by_z_bar)");
}
TORCH_LIBRARY_IMPL(imaml_ext, CPU, m) {
  m.impl("layer_patches", &patches_op);
  m.impl("layer_patches_adjoint", &patches_adjoint_op);
  m.impl("layer_turn_weights", &turn_weights_op);
  m.impl("task_convolve", &convolve_op);
  m.impl("task_convolve_back", &convolve_back_op);
  m.impl("task_convolve_weight", &convolve_weight_op);
  m.impl("winograd_convolve", &winograd_convolve_op);
  m.impl("winograd_weight", &winograd_weight_op);
  m.impl("task_batch_norm", &batch_norm_op);
  m.impl("task_batch_norm_backward", &batch_norm_backward_op);
  m.impl("task_batch_norm_second", &batch_norm_second_op);
}

}  // namespace imaml_ext
