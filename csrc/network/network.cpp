#include "network/storage.h"

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace imaml_ext {
namespace {

constexpr int64_t kHeader = 3;
constexpr int64_t kPerLayer = 6;
constexpr int64_t kMostPatchChannels = 8;
constexpr int64_t kMostStride = int64_t{1} << 30;

// A window along an axis of `size` pixels: 3 wide with zero padding, one pixel, or all of them. A stride beyond the
// axis leaves the one pixel that a stride of its size does, and would make classes of pixels that there are not.
Window convolution(int64_t size, int64_t stride) {
  stride = std::min(stride, size);
  return {3, static_cast<int32_t>(stride), 1, static_cast<int32_t>(size),
          static_cast<int32_t>((size - 1) / stride + 1)};
}
Window identity(int64_t size) { return {1, 1, 0, static_cast<int32_t>(size), static_cast<int32_t>(size)}; }
Window everything(int64_t size) {
  return {static_cast<int32_t>(size), static_cast<int32_t>(size), 0, static_cast<int32_t>(size), 1};
}

}  // namespace

Network Network::parse(std::span<const int64_t> description) {
  const at::IntArrayRef d(description.data(), description.size());
  const int64_t size = static_cast<int64_t>(d.size());
  TORCH_CHECK_VALUE(size > kHeader && (size - kHeader) % kPerLayer == 0,
                    "network must hold 3 numbers and 6 a layer, got ", size);
  TORCH_CHECK_VALUE(std::all_of(d.begin(), d.begin() + kHeader, [](int64_t n) { return n >= 1; }),
                    "network must begin with channels, height and width of at least 1, got ", d.slice(0, kHeader));
  Network net{d[0], d[1], d[2], 0, {}, 0};
  int64_t channels = net.in_channels, height = net.height, width = net.width;
  for (int64_t at = kHeader; at < size; at += kPerLayer) {
    const int64_t kernel = d[at], stride = d[at + 1];
    Layer layer{};
    layer.channels = d[at + 2];
    layer.norm = static_cast<Norm>(d[at + 3]);
    layer.activation = static_cast<Activation>(d[at + 4]);
    layer.pool = static_cast<Pool>(d[at + 5]);
    TORCH_CHECK_VALUE(
        (kernel == 0 || kernel == 3) && stride >= 1 && stride <= kMostStride && layer.channels >= 1 && d[at + 3] >= 0 &&
            d[at + 3] <= 1 && d[at + 4] >= 0 && d[at + 4] <= 2 && d[at + 5] >= 0 && d[at + 5] <= 2,
        "network must describe each layer by kernel (0 or 3), stride, channels, norm (0 or 1), activation "
        "(0 to 2) and pool (0 to 2), got ",
        d.slice(at, kPerLayer));
    TORCH_CHECK_VALUE(layer.activation != Activation::kTanh || (layer.norm == Norm::kBias && layer.pool != Pool::kMax),
                      "network must have no tanh after a batch norm or before max-pooling, got ",
                      d.slice(at, kPerLayer));
    const bool first = net.layers.empty();
    layer.depth = channels;
    layer.pixels_in = height * width;
    layer.down = kernel == 0 ? everything(height) : convolution(height, stride);
    layer.across = kernel == 0 ? everything(width) : convolution(width, stride);
    layer.rows = layer.down.count, layer.cols = layer.across.count;
    if (kernel != 0 && first && channels <= kMostPatchChannels) {
      net.patch_stride = stride;
      layer.depth = 9 * channels;
      layer.pixels_in = layer.pixels();
      layer.down = identity(layer.rows), layer.across = identity(layer.cols);
    }
    layer.taps = static_cast<int64_t>(layer.down.kernel) * layer.across.kernel;
    height = layer.rows, width = layer.cols;
    if (layer.pool == Pool::kMax) height /= 2, width /= 2;
    if (layer.pool == Pool::kMean) height = width = 1;
    TORCH_CHECK_VALUE(height >= 1 && width >= 1,
                      "network must leave a pixel after every pooling, got none after layer ", net.layers.size());
    layer.pixels_out = height * width;
    channels = layer.channels;
    layer.weight = net.parameters;
    net.parameters += layer.taps * layer.depth * layer.channels;
    if (layer.norm == Norm::kBatch) layer.gamma = net.parameters, net.parameters += layer.channels;
    layer.beta = net.parameters, net.parameters += layer.channels;
    net.layers.push_back(std::move(layer));
  }
  return net;
}

// The middle tap of a convolution comes first; of any other layer the first one, which is as good: it reaches every
// pixel too.
std::vector<Tap> taps_of(const Layer& layer) {
  const Window &down = layer.down, &across = layer.across;
  const int64_t middle = down.padding * across.kernel + across.padding;
  std::vector<Tap> taps;
  for (int64_t k = 0; k < layer.taps; ++k) {
    const int64_t index = k == 0 ? middle : k <= middle ? k - 1 : k;
    Tap& tap = taps.emplace_back(Tap{index, {}});
    for (int64_t i = 0; i < layer.rows; ++i) {
      for (int64_t j = 0; j < layer.cols; ++j) {
        const int64_t y = down.stride * i + index / across.kernel - down.padding;
        const int64_t x = across.stride * j + index % across.kernel - across.padding;
        if (y < 0 || y >= down.size || x < 0 || x >= across.size) continue;
        tap.pairs.push_back({static_cast<int32_t>(y * across.size + x), static_cast<int32_t>(i * layer.cols + j)});
      }
    }
  }
  return taps;
}

int64_t network_tape_size(std::span<const int64_t> description, int64_t images, int64_t item_size) {
  const Network net = Network::parse(description);
  return item_size == sizeof(float) ? tape_size<float>(net, images) : tape_size<double>(net, images);
}

}  // namespace imaml_ext
