// Solves whose loop the device would end: the loop stands in for the while nodes of a CUDA graph.
#include <ATen/ATen.h>

#include <cmath>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "cg/row.h"
#include "cg/solver.h"
#include "check.h"
#include "common/device_loop.h"
#include "minres/solver.h"

using namespace imaml_ext;

namespace {

// What a solve has returned and what it has asked of its callbacks.
struct Run {
  CgResult result;
  int products = 0, preconditionings = 0, nodes = 0;
  std::set<const void*> arguments;  // where the vectors given to hvp lie
};

bool same_bits(const at::Tensor& a, const at::Tensor& b) { return a.view(at::kByte).equal(b.view(at::kByte)); }

// Diagonal systems that end in every way: rows that converge sooner and later, at once, never, or not at all.
struct Systems {
  at::Tensor d, b;
  explicit Systems(at::ScalarType dtype) {
    const int64_t rows = 9, cols = 67;
    const auto wide = at::TensorOptions().dtype(at::kDouble);
    d = at::pow(at::logspace(0, 3, rows, 10.0, wide).unsqueeze(1), -at::rand({rows, cols}, wide));
    b = at::randn({rows, cols}, wide);
    d[1].fill_(-1.0);
    d[2][7] = std::nan("");
    d[3].fill_(0.75);
    b[4][0] = INFINITY;
    b[5].zero_();
    d = d.to(dtype), b = b.to(dtype);
  }
};

Run solve(const Systems& systems, CgOptions options, const at::Tensor& m, bool on_device) {
  Run run;
  const auto of = [](const at::Tensor& all, RowRange rows) { return all.narrow(0, rows.first, rows.count()); };
  if (m.defined()) {
    options.preconditioner = [&](const at::Tensor& r, RowRange rows) {
      ++run.preconditionings;
      return of(m, rows) * r;
    };
  }
  if (on_device) {
    options.device_loop = [&](const at::Tensor& flag, const std::function<void()>& body) {
      ++run.nodes;
      while (flag.item<bool>()) body();
    };
  }
  const RowOperator hvp = [&](const at::Tensor& p, RowRange rows) {
    ++run.products;
    run.arguments.insert(p.const_data_ptr());
    return of(systems.d, rows) * p;
  };
  run.result = cg(hvp, systems.b, options);
  return run;
}

void compare(const Systems& systems, const CgOptions& options, const at::Tensor& m = {}) {
  const Run host = solve(systems, options, m, /*on_device=*/false);
  const Run device = solve(systems, options, m, /*on_device=*/true);
  EXPECT(same_bits(device.result.x, host.result.x));
  EXPECT(device.result.status.equal(host.result.status));
  EXPECT(device.result.iterations.equal(host.result.iterations));
  EXPECT(same_bits(device.result.residual_norm, host.result.residual_norm));
  EXPECT(device.products == host.products && device.preconditionings == host.preconditionings);
  const int64_t blocks = options.rows_per_block > 0 ? (systems.b.size(0) - 1) / options.rows_per_block + 1 : 1;
  EXPECT(device.nodes <= 2 * blocks && (device.nodes > 0) == (options.max_iterations > 0));
  // What a captured body reads has one place: p, and x where a warm start is multiplied.
  EXPECT(std::ssize(device.arguments) <= (options.x0 ? 1 + blocks : 1));
  EXPECT(!device.arguments.contains(systems.b.const_data_ptr()));
}

void has_the_bits_of_a_solve_that_the_host_looks_at() {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    const Systems systems(dtype);
    const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
    for (const int64_t max_iterations : {0, 1, 2, 7, 12, 60}) {
      for (const int64_t check_every : {1, 2, 3, 7, 100}) {
        CgOptions options;
        options.max_iterations = max_iterations;
        options.check_every = check_every;
        options.rtol = at::full({1}, 1e-2, at::kDouble);
        compare(systems, options);

        options.shift = at::rand({9, 1}, wide);
        options.rows_per_block = 4;
        compare(systems, options);

        options.rows_per_block = 0;
        options.x0 = at::randn({9, 67}).to(dtype);
        compare(systems, options, at::rand({9, 67}).to(dtype) + 0.5);

        // Not positive definite: where that is found, it is found before the last iteration or not at all.
        options.x0 = std::nullopt;
        options.inverse_diagonal = at::rand({1, 67}, wide) - 0.1;
        compare(systems, options);
        options.inverse_diagonal = at::Tensor();
        compare(systems, options, at::rand({9, 67}).to(dtype) - 0.1);
      }
    }
  }
}

void minres_has_them_too() {
  for (const auto dtype : {at::kDouble, at::kFloat}) {
    const Systems systems(dtype);
    const RowOperator hvp = [&](const at::Tensor& p, RowRange rows) {
      return systems.d.narrow(0, rows.first, rows.count()) * p;
    };
    for (const int64_t max_iterations : {0, 1, 2, 3, 7, 12, 60}) {
      for (const int64_t check_every : {1, 2, 5, 100}) {
        MinresOptions options;
        options.max_iterations = max_iterations;
        options.check_every = check_every;
        options.rows_per_block = check_every == 2 ? 4 : 0;
        options.rtol = at::full({1}, 1e-2, at::kDouble);
        const MinresResult host = minres(hvp, systems.b, options);
        int nodes = 0;
        options.device_loop = [&](const at::Tensor& flag, const std::function<void()>& body) {
          ++nodes;
          while (flag.item<bool>()) body();
        };
        const MinresResult device = minres(hvp, systems.b, options);
        EXPECT(same_bits(device.x, host.x) && device.status.equal(host.status));
        EXPECT(device.iterations.equal(host.iterations) && same_bits(device.residual_norm, host.residual_norm));
        EXPECT((nodes > 0) == (max_iterations > 1));  // the first one is no round
      }
    }
  }
}

void multiplies_nothing_where_no_row_is_at_work() {
  Systems systems(at::kFloat);
  systems.b.zero_();
  CgOptions options;
  options.max_iterations = 50;
  options.check_every = 3;
  const Run run = solve(systems, options, {}, /*on_device=*/true);
  EXPECT(run.products == 0 && run.nodes == 2 && run.result.x.eq(0).all().item<bool>());
  options.check_every = 0;  // and whoever never looks has no loop on the device
  EXPECT(solve(systems, options, {}, /*on_device=*/true).nodes == 0);
}

void goes_as_many_rounds_as_it_may() {
  const auto status = at::full({1500}, 16, at::kInt);
  const DeviceLoop loop = [](const at::Tensor& flag, const std::function<void()>& body) {
    while (flag.item<bool>()) body();
  };
  int rounds = 0;
  const auto count = [&] { ++rounds; };
  for (const int most : {0, 1, 5}) {
    rounds = 0;
    rounds_on_device(loop, status, 16, most, count);
    EXPECT(rounds == most);
  }
  rounds = 0;
  rounds_on_device(loop, status, 17, 5, count);
  EXPECT(rounds == 0);
  rounds_on_device(loop, status, 16, 5, [&] {
    if (++rounds == 3) status.fill_(2);
  });
  EXPECT(rounds == 3);
}

void says_what_is_missing() {
  EXPECT(why_no_while_node(true, 12040, 12040).empty() && why_no_while_node(true, 13000, 13010).empty());
  for (const auto& why : {why_no_while_node(false, 13000, 12080), why_no_while_node(true, 12030, 12080),
                          why_no_while_node(true, 13000, 12020)}) {
    for (const char* part : {"torch 2.14 or later, CUDA 12.4 or later", "check_every=0 can be captured"}) {
      EXPECT(why.find(part) != std::string::npos);
    }
  }
  EXPECT(why_no_while_node(true, 12030, 12020).find("CUDA 12.3 and a driver for CUDA 12.2") != std::string::npos);
}

void the_host_looks_where_nothing_is_captured() { EXPECT(!captured_loop(at::zeros({2, 3}))); }

}  // namespace

int main() {
  at::manual_seed(20191909);
  return run_tests({{"has_the_bits_of_a_solve_that_the_host_looks_at", has_the_bits_of_a_solve_that_the_host_looks_at},
                    {"minres_has_them_too", minres_has_them_too},
                    {"multiplies_nothing_where_no_row_is_at_work", multiplies_nothing_where_no_row_is_at_work},
                    {"goes_as_many_rounds_as_it_may", goes_as_many_rounds_as_it_may},
                    {"says_what_is_missing", says_what_is_missing},
                    {"the_host_looks_where_nothing_is_captured", the_host_looks_where_nothing_is_captured}});
}
