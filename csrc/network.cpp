#include "network.h"

#include <c10/util/Exception.h>

#include <algorithm>

namespace imaml_ext {
namespace {

constexpr int64_t kHeader = 3;
constexpr int64_t kPerLayer = 6;
constexpr int64_t kMostPatchChannels = 8;

// 3×3 pixels around stride · (i, j), as far as they lie inside the image. The middle tap comes first.
void add_convolution_taps(Layer& layer, int64_t height, int64_t width, int64_t stride) {
  for (const int64_t tap : {4, 0, 1, 2, 3, 5, 6, 7, 8}) {
    std::vector<TapPair> pairs;
    for (int64_t i = 0; i < layer.rows; ++i) {
      for (int64_t j = 0; j < layer.cols; ++j) {
        const int64_t y = stride * i + tap / 3 - 1;
        const int64_t x = stride * j + tap % 3 - 1;
        if (y < 0 || y >= height || x < 0 || x >= width) continue;
        pairs.push_back({static_cast<int32_t>(y * width + x), static_cast<int32_t>(i * layer.cols + j)});
      }
    }
    layer.taps.push_back(std::move(pairs));
    layer.tap_index.push_back(tap);
  }
}

// Every pixel is a tap of its own, and all of them lead to the one output.
void add_linear_taps(Layer& layer) {
  for (int64_t pixel = 0; pixel < layer.pixels_in; ++pixel) {
    layer.taps.push_back({{static_cast<int32_t>(pixel), 0}});
    layer.tap_index.push_back(pixel);
  }
}

void add_identity_tap(Layer& layer) {
  layer.taps.emplace_back();
  for (int64_t pixel = 0; pixel < layer.pixels_in; ++pixel) {
    layer.taps[0].push_back({static_cast<int32_t>(pixel), static_cast<int32_t>(pixel)});
  }
  layer.tap_index.push_back(0);
}

}  // namespace

Network Network::parse(at::IntArrayRef d) {
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
        (kernel == 0 || kernel == 3) && stride >= 1 && layer.channels >= 1 && d[at + 3] >= 0 && d[at + 3] <= 1 &&
            d[at + 4] >= 0 && d[at + 4] <= 2 && d[at + 5] >= 0 && d[at + 5] <= 2,
        "network must describe each layer by kernel (0 or 3), stride, channels, norm (0 or 1), activation "
        "(0 to 2) and pool (0 to 2), got ",
        d.slice(at, kPerLayer));
    TORCH_CHECK_VALUE(layer.activation != Activation::kTanh || (layer.norm == Norm::kBias && layer.pool != Pool::kMax),
                      "network must have no tanh after a batch norm or before max-pooling, got ",
                      d.slice(at, kPerLayer));
    const bool first = net.layers.empty();
    layer.depth = channels;
    layer.pixels_in = height * width;
    layer.rows = kernel == 0 ? 1 : (height - 1) / stride + 1;
    layer.cols = kernel == 0 ? 1 : (width - 1) / stride + 1;
    if (kernel == 0) {
      add_linear_taps(layer);
    } else if (first && channels <= kMostPatchChannels) {
      net.patch_stride = stride;
      layer.depth = 9 * channels;
      layer.pixels_in = layer.pixels();
      add_identity_tap(layer);
    } else {
      add_convolution_taps(layer, height, width, stride);
    }
    height = layer.rows, width = layer.cols;
    if (layer.pool == Pool::kMax) height /= 2, width /= 2;
    if (layer.pool == Pool::kMean) height = width = 1;
    TORCH_CHECK_VALUE(height >= 1 && width >= 1,
                      "network must leave a pixel after every pooling, got none after layer ", net.layers.size());
    layer.pixels_out = height * width;
    channels = layer.channels;
    layer.weight = net.parameters;
    net.parameters += static_cast<int64_t>(layer.taps.size()) * layer.depth * layer.channels;
    if (layer.norm == Norm::kBatch) layer.gamma = net.parameters, net.parameters += layer.channels;
    layer.beta = net.parameters, net.parameters += layer.channels;
    net.layers.push_back(std::move(layer));
  }
  return net;
}

}  // namespace imaml_ext
