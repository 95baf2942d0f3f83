// Which pixels a tap carries where: the arithmetic of the CUDA kernels against the pairs that the CPU goes by.
#include <algorithm>
#include <tuple>
#include <vector>

#include "check.h"
#include "network/network.h"

using namespace imaml_ext;

namespace {

using Triple = std::tuple<int64_t, int64_t, int64_t>;  // tap, pixel of the input, pixel of the output

std::vector<Triple> pairs_of(const Layer& layer) {
  std::vector<Triple> found;
  for (const Tap& tap : taps_of(layer))
    for (const TapPair& pair : tap.pairs) found.emplace_back(tap.index, pair.from, pair.to);
  std::sort(found.begin(), found.end());
  return found;
}

// What one axis carries: tap, the pixel a product reads, the pixel it writes.
std::vector<Triple> along(const Axis& axis) {
  std::vector<Triple> found;
  for (int a = 0; a < axis.count; ++a)
    for (int u = 0; u < axis.taps; ++u) {
      const int from = axis.from + axis.from_step * a + axis.from_tap * u;
      if (from < 0 || from >= axis.size) continue;
      found.emplace_back(axis.tap + axis.tap_step * u, from, axis.to + axis.to_step * a);
    }
  return found;
}

// Both axes together; `backward`: the product reads the output.
std::vector<Triple> joined(const Layer& layer, const std::vector<Triple>& down, const std::vector<Triple>& across,
                           bool backward) {
  std::vector<Triple> found;
  for (auto [tap_y, from_y, to_y] : down)
    for (auto [tap_x, from_x, to_x] : across) {
      const int64_t tap = tap_y * layer.across.kernel + tap_x;
      if (backward) {
        found.emplace_back(tap, to_y * layer.across.size + to_x, from_y * layer.across.count + from_x);
      } else {
        found.emplace_back(tap, from_y * layer.across.size + from_x, to_y * layer.across.count + to_x);
      }
    }
  return found;
}

void both_ways_are_the_pairs() {
  for (const int64_t kernel : {0, 3})
    for (const int64_t stride : {1, 2, 3, 5})
      for (const int64_t height : {1, 2, 3, 7, 8})
        for (const int64_t width : {1, 2, 5, 6})
          for (const int64_t channels : {1, 9}) {  // patches, and pixels
            const Network net =
                Network::parse(std::vector<int64_t>{channels, height, width, kernel, stride, 4, 0, 0, 0});
            const Layer& layer = net.layers[0];
            const std::vector<Triple> expected = pairs_of(layer);
            std::vector<Triple> forward =
                joined(layer, along(layer.down.forward()), along(layer.across.forward()), false);
            std::sort(forward.begin(), forward.end());
            EXPECT(forward == expected);

            // Each pixel of the input belongs to one class, and the class of residue 0 is the largest.
            std::vector<Triple> backward;
            int64_t pixels = 0;
            for (int y = 0; y < layer.down.stride; ++y)
              for (int x = 0; x < layer.across.stride; ++x) {
                const Axis down = layer.down.backward(y), across = layer.across.backward(x);
                EXPECT(down.count <= layer.down.backward(0).count && across.count <= layer.across.backward(0).count);
                pixels += static_cast<int64_t>(down.count) * across.count;
                const std::vector<Triple> of_class = joined(layer, along(down), along(across), true);
                backward.insert(backward.end(), of_class.begin(), of_class.end());
              }
            std::sort(backward.begin(), backward.end());
            EXPECT(backward == expected);
            EXPECT(pixels == layer.pixels_in);
          }
}

}  // namespace

int main() { return run_tests({{"both ways are the pairs", both_ways_are_the_pairs}}); }
