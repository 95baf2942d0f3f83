// Single layers on the CPU: images, or tasks, side by side.
#include "layers/layers.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "common/cpu/kernels.h"

namespace imaml_ext {
namespace {

// Calls body(pixel of the image or −1, row of patches) for the patches of one image, in their order.
template <typename Body>
void over_taps(const ConvolutionAxis& y_axis, const ConvolutionAxis& x_axis, const Body& body) {
  int64_t at = 0;
  for (int64_t i = 0; i < y_axis.count(); ++i)
    for (int64_t j = 0; j < x_axis.count(); ++j)
      for (int64_t u = 0; u < y_axis.kernel; ++u) {
        const int64_t y = y_axis.stride * i + y_axis.dilation * u - y_axis.padding;
        for (int64_t v = 0; v < x_axis.kernel; ++v, ++at) {
          const int64_t x = x_axis.stride * j + x_axis.dilation * v - x_axis.padding;
          const bool there = y >= 0 && y < y_axis.size && x >= 0 && x < x_axis.size;
          body(there ? y * x_axis.size + x : -1, at);
        }
      }
}

int64_t patch_size(const ConvolutionAxis& y_axis, const ConvolutionAxis& x_axis, int64_t channels) {
  return y_axis.count() * x_axis.count() * y_axis.kernel * x_axis.kernel * channels;
}

// The pixels that a tap carries from the input to the output.
using Pairs = std::vector<std::pair<int64_t, int64_t>>;

std::vector<Pairs> pairs_of(const Convolution& c) {
  const int64_t taps = c.y_axis.kernel * c.x_axis.kernel;
  std::vector<Pairs> pairs(taps);
  over_taps(c.y_axis, c.x_axis, [&](int64_t pixel, int64_t at) {
    if (pixel >= 0) pairs[at % taps].emplace_back(pixel, at / taps);
  });
  return pairs;
}

// Calls body(rows of `in`, rows of `out`, count) for the pairs of `images` images, a few hundred at a time.
template <typename T, typename Body>
void over_rows(const Pairs& pairs, int64_t images, const T* in, int64_t in_image, int64_t in_width, const T* out,
               int64_t out_image, int64_t out_width, const Body& body) {
  constexpr int64_t kAtOnce = 480;  // a multiple of every tile of the products
  const T* in_rows[kAtOnce];
  const T* out_rows[kAtOnce];
  int64_t count = 0;
  for (const auto& [from, to] : pairs)
    for (int64_t image = 0; image < images; ++image) {
      in_rows[count] = in + image * in_image + from * in_width;
      out_rows[count] = out + image * out_image + to * out_width;
      if (++count == kAtOnce) body(in_rows, out_rows, std::exchange(count, 0));
    }
  if (count > 0) body(in_rows, out_rows, count);
}

// Calls work(row, first image, number of images): whole rows side by side, or images where there are fewer rows than
// threads.
template <typename Work>
void over_images(int64_t rows, int64_t images, const Work& work) {
  if (rows >= at::get_num_threads()) {
    at::parallel_for(0, rows, 1, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) work(row, 0, images);
    });
  } else {
    at::parallel_for(0, rows * images, 1, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last;) {
        const int64_t count = std::min(last - k, images - k % images);
        work(k / images, k % images, count);
        k += count;
      }
    });
  }
}

}  // namespace

template <typename T>
void patches(OnCpu, const T* x, const ConvolutionAxis& y_axis, const ConvolutionAxis& x_axis, int64_t images,
             int64_t channels, T* patches) {
  at::parallel_for(0, images, 1, [&](int64_t first, int64_t last) {
    for (int64_t image = first; image < last; ++image) {
      const T* const from = x + image * y_axis.size * x_axis.size * channels;
      T* const to = patches + image * patch_size(y_axis, x_axis, channels);
      over_taps(y_axis, x_axis, [&](int64_t pixel, int64_t row) {
        if (pixel < 0) {
          std::fill(to + row * channels, to + (row + 1) * channels, T(0));
        } else {
          std::memcpy(to + row * channels, from + pixel * channels, channels * sizeof(T));
        }
      });
    }
  });
}

template <typename T>
void patches_adjoint(OnCpu, const T* patches, const ConvolutionAxis& y_axis, const ConvolutionAxis& x_axis,
                     int64_t images, int64_t channels, T* x) {
  const auto add = layer_kernels<T>().add;
  const int64_t size = y_axis.size * x_axis.size * channels;
  at::parallel_for(0, images, 1, [&](int64_t first, int64_t last) {
    std::fill(x + first * size, x + last * size, T(0));
    for (int64_t image = first; image < last; ++image) {
      T* const to = x + image * size;
      const T* const from = patches + image * patch_size(y_axis, x_axis, channels);
      over_taps(y_axis, x_axis, [&](int64_t pixel, int64_t row) {
        if (pixel >= 0) add(to + pixel * channels, from + row * channels, channels);
      });
    }
  });
}

template <typename T>
void turn_weights(OnCpu, const T* from, T* to, int64_t rows, int64_t out, int64_t channels, int64_t taps, bool back) {
  constexpr int64_t kBlock = 16;  // a block of both stays in the nearest cache
  const int64_t size = out * channels * taps, blocks = (out + kBlock - 1) / kBlock;
  at::parallel_for(0, rows * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const T* const in = from + k / blocks * size;
      T* const turned = to + k / blocks * size;
      const int64_t first = k % blocks * kBlock, last = std::min(first + kBlock, out);
      for (int64_t start = 0; start < channels; start += kBlock)
        for (int64_t tap = 0; tap < taps; ++tap)
          for (int64_t c = start; c < std::min(start + kBlock, channels); ++c)
            for (int64_t o = first; o < last; ++o) {
              const int64_t one = (o * channels + c) * taps + tap, other = (tap * channels + c) * out + o;
              turned[back ? one : other] = in[back ? other : one];
            }
    }
  });
}

template <typename T>
void convolve(OnCpu, const Convolution& c, const T* x, const T* w, T* y) {
  const auto multiply = network_kernels<T>().multiply;
  const std::vector<Pairs> pairs = pairs_of(c);
  const int64_t x_image = c.y_axis.size * c.x_axis.size * c.channels;
  const int64_t y_image = c.y_axis.count() * c.x_axis.count() * c.out;
  over_images(c.rows, c.images, [&](int64_t row, int64_t first, int64_t images) {
    const int64_t at = row * c.images + first;
    std::fill(y + at * y_image, y + (at + images) * y_image, T(0));
    const T* weight = w + row * static_cast<int64_t>(pairs.size()) * c.channels * c.out;
    for (const Pairs& of_tap : pairs) {
      over_rows(of_tap, images, x + at * x_image, x_image, c.channels, y + at * y_image, y_image, c.out,
                [&](const T* const* in, const T* const* out, int64_t count) {
                  multiply(in, const_cast<T* const*>(out), count, c.channels, weight, c.out, true);
                });
      weight += c.channels * c.out;
    }
  });
}

template <typename T>
void convolve_back(OnCpu, const Convolution& c, const T* y_bar, const T* w, T* x_bar) {
  const auto multiply = network_kernels<T>().multiply;
  const auto transpose = network_kernels<T>().transpose;
  const std::vector<Pairs> pairs = pairs_of(c);
  const int64_t x_image = c.y_axis.size * c.x_axis.size * c.channels;
  const int64_t y_image = c.y_axis.count() * c.x_axis.count() * c.out;
  over_images(c.rows, c.images, [&](int64_t row, int64_t first, int64_t images) {
    const int64_t at = row * c.images + first;
    std::fill(x_bar + at * x_image, x_bar + (at + images) * x_image, T(0));
    std::vector<T> transposed(c.channels * c.out);
    const T* weight = w + row * static_cast<int64_t>(pairs.size()) * c.channels * c.out;
    for (const Pairs& of_tap : pairs) {
      transpose(weight, c.channels, c.out, transposed.data(), c.channels);
      over_rows(of_tap, images, x_bar + at * x_image, x_image, c.channels, y_bar + at * y_image, y_image, c.out,
                [&](const T* const* in, const T* const* out, int64_t count) {
                  multiply(out, const_cast<T* const*>(in), count, c.out, transposed.data(), c.channels, true);
                });
      weight += c.channels * c.out;
    }
  });
}

template <typename T>
void convolve_weight(OnCpu, const Convolution& c, const T* x, const T* y_bar, T* w_bar) {
  const auto outer = network_kernels<T>().outer;
  const std::vector<Pairs> pairs = pairs_of(c);
  const int64_t x_image = c.y_axis.size * c.x_axis.size * c.channels;
  const int64_t y_image = c.y_axis.count() * c.x_axis.count() * c.out;
  const auto taps = static_cast<int64_t>(pairs.size());
  at::parallel_for(0, c.rows * taps, taps, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t at = k / taps * c.images;
      T* const to = w_bar + k * c.channels * c.out;
      bool add = false;
      over_rows(pairs[k % taps], c.images, x + at * x_image, x_image, c.channels, y_bar + at * y_image, y_image, c.out,
                [&](const T* const* in, const T* const* out, int64_t count) {
                  outer(in, out, count, 0, c.channels, c.out, to, std::exchange(add, true));
                });
      if (!add) std::fill(to, to + c.channels * c.out, T(0));  // a tap that no pixel uses
    }
  });
}

template <typename T>
void winograd_tiles(OnCpu, const TileArguments<T>& first, int64_t images, int64_t next) {
  const bool scatters = first.matrix == Winograd::kOutput || first.matrix == Winograd::kWeightAdjoint;
  const auto kernel = scatters ? layer_kernels<T>().scatter : layer_kernels<T>().gather;
  at::parallel_for(0, images, std::max<int64_t>(1, 4096 / (first.rows * first.cols * first.channels)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t image = begin; image < end; ++image) {
                       TileArguments<T> a = first;
                       a.image += image * next;
                       a.tiles += image * a.rows * a.cols * a.channels;
                       kernel(a);
                     }
                   });
}

template <typename T>
void batch_norm(OnCpu, NormPass pass, const BatchNormArguments<T>& first, int64_t tasks) {
  const LayerKernels<T>& kernels = layer_kernels<T>();
  const auto kernel = pass == NormPass::kForward    ? kernels.norm
                      : pass == NormPass::kBackward ? kernels.norm_backward
                                                    : kernels.norm_second;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> sums(pass == NormPass::kSecond ? 5 * first.channels : 0);
    for (int64_t task = begin; task < end; ++task) {
      BatchNormArguments<T> a = first;
      a.sums = sums.data();
      const int64_t matrix = task * a.rows * a.channels, vector = task * a.channels;
      for (const T** p : {&a.x, &a.z_bar, &a.x_dot}) *p += *p == nullptr ? 0 : matrix;
      for (T** p : {&a.z, &a.x_bar, &a.z_bar_bar}) *p += *p == nullptr ? 0 : matrix;
      for (const T** p : {&a.gamma, &a.beta, &a.gamma_dot, &a.beta_dot}) *p += *p == nullptr ? 0 : vector;
      for (T** p : {&a.mean, &a.scale, &a.gamma_bar, &a.beta_bar}) *p += *p == nullptr ? 0 : vector;
      kernel(a);
    }
  });
}

#define IMAML_INSTANTIATE_LAYERS(T)                                                                                \
  template void patches(OnCpu, const T*, const ConvolutionAxis&, const ConvolutionAxis&, int64_t, int64_t, T*);    \
  template void patches_adjoint(OnCpu, const T*, const ConvolutionAxis&, const ConvolutionAxis&, int64_t, int64_t, \
                                T*);                                                                               \
  template void turn_weights(OnCpu, const T*, T*, int64_t, int64_t, int64_t, int64_t, bool);                       \
  template void convolve(OnCpu, const Convolution&, const T*, const T*, T*);                                       \
  template void convolve_back(OnCpu, const Convolution&, const T*, const T*, T*);                                  \
  template void convolve_weight(OnCpu, const Convolution&, const T*, const T*, T*);                                \
  template void winograd_tiles(OnCpu, const TileArguments<T>&, int64_t, int64_t);                                  \
  template void batch_norm(OnCpu, NormPass, const BatchNormArguments<T>&, int64_t);
IMAML_INSTANTIATE_LAYERS(float)
IMAML_INSTANTIATE_LAYERS(double)

}  // namespace imaml_ext
