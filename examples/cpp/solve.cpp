// Solves (H_b + λ I) x_b = b_b for a batch of diagonal matrices H_b, and prints the largest error of x.
#include <ATen/ATen.h>
#include <cg/solver.h>

#include <iostream>

int main() {
  const auto type = at::dtype(at::kDouble);
  const at::Tensor diagonal = 1 + at::rand({4, 30}, type), b = at::randn({4, 30}, type);
  imaml_ext::CgOptions options;
  options.shift = at::full({1, 1}, 0.5, type);
  options.max_iterations = 60;
  options.rtol = at::full({1}, 1e-12, type);
  const auto result = imaml_ext::cg([&](const at::Tensor& p) { return diagonal * p; }, b, options);
  const double error = (result.x - b / (diagonal + 0.5)).abs().max().item<double>();
  std::cout << error << '\n';
  return error < 1e-10 ? 0 : 1;
}
