// A step of CG and of MINRES in one launch, with vectors kept in shared memory, against the same step in a launch for
// each phase, which keeps nothing: the same bits, for rows of every fate, aligned or not. On the machine of
// cuda_on_cpu.
#include "cg/cuda/cg.cu"
#include "minres/cuda/minres.cu"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"

namespace imaml_ext {
namespace {

constexpr int64_t kRows = 5;

// A launch of the work, in one of three ways.
template <typename T, typename Work>
void launch_step(const Work& work, int64_t cols, bool packed, bool together) {
  RowPlan plan = row_plan<T>(kRows, cols, packed, true, 200 * 1024);
  EXPECT(plan.together);
  plan.together = together;
  std::vector<double> memory;
  launch_rows(nullptr, work, plan, [&](int64_t bytes) {
    memory.assign(bytes / sizeof(double), NAN);
    return reinterpret_cast<char*>(memory.data());
  });
}

template <typename T>
struct System {
  std::vector<T> b, hp, x, r, p, best;
  std::vector<compute_t<T>> shift, inverse_diagonal;
  std::vector<RowState> state = std::vector<RowState>(kRows);
  std::vector<int32_t> status = std::vector<int32_t>(kRows, kIterating);
  std::vector<int32_t> iterations = std::vector<int32_t>(kRows, 2);

  explicit System(int64_t cols) {
    std::mt19937 draw(static_cast<unsigned>(cols));
    std::normal_distribution<double> normal;
    for (auto* vector : {&b, &hp, &x, &r, &p, &best}) {
      for (int64_t i = 0; i < kRows * cols; ++i) vector->push_back(static_cast<T>(static_cast<float>(normal(draw))));
    }
    b = p;  // with `first` that is the direction
    for (int64_t i = 0; i < cols; ++i) shift.push_back(static_cast<compute_t<T>>(0.5 + std::fabs(normal(draw))));
    inverse_diagonal = shift;
    // Rows that go on and keep their x, of negative curvature, that verify in vain and take back `best`, that overflow,
    // and that have a NaN.
    for (int64_t i = 0; i < kRows * cols; ++i) {
      const double p_i = static_cast<double>(p[i]);
      hp[i] = static_cast<T>(static_cast<float>(i / cols == 1 ? -4 * p_i : i / cols == 3 ? 1e-3 * p_i : p_i));
    }
    for (int64_t row = 0; row < kRows; ++row) {
      const double before =
          std::sqrt(cols) / 8;  // of the residual: a step of these vectors makes it some ten times that
      const double unit = CgRows<T>::wide() ? 4.0 : 1.0;
      state[row] = {1.0 * cols, before, 1e-3, unit, 1.0, 1.0, before, kInfinity, kInfinity, 0.0, 0.0, 0.0};
    }
    status[2] = kVerifying;
    state[2].stalls = 4.0;
    state[2].kept = state[2].measured = 0.5;
    state[0].solution_bound = 1e-2;  // which the step exceeds by far
    state[1].solution_bound = 0.0;
    state[3].rz = std::sqrt(CgRows<T>::largest());
    hp[4 * cols + 7] = static_cast<T>(NAN);
  }

  std::vector<char> bytes() const {
    std::vector<char> all;
    const auto add = [&](const auto& vector) {
      const auto* const from = reinterpret_cast<const char*>(vector.data());
      all.insert(all.end(), from, from + vector.size() * sizeof(vector[0]));
    };
    add(x), add(r), add(p), add(best), add(state), add(status), add(iterations);
    return all;
  }

  void step(int64_t cols, bool with_diagonal, bool first, bool packed, bool together) {
    CgStep<T> work;
    CgRows<T>& a = work.a;
    a.rows = kRows, a.cols = cols;
    a.b = b.data(), a.hp = hp.data(), a.x = x.data(), a.r = r.data(), a.p = p.data(), a.best = best.data();
    a.shift = {shift.data(), 0, 1};
    if (with_diagonal) a.inverse_diagonal = {inverse_diagonal.data(), 0, 1};
    a.state = state.data(), a.status = status.data(), a.iterations = iterations.data();
    a.first = first;
    launch_step<T>(work, cols, packed, together);
  }
};

template <typename T>
void has_the_same_bits() {
  for (const int64_t cols : {40, 200, 1000, 16'000, 30'000}) {
    for (const bool with_diagonal : {false, true}) {
      for (const bool first : {false, true}) {
        System<T> kept(cols), read_again(cols), words(cols);
        kept.step(cols, with_diagonal, first, true, true);
        read_again.step(cols, with_diagonal, first, true, false);
        words.step(cols, with_diagonal, first, false, false);
        EXPECT(kept.bytes() == read_again.bytes());
        EXPECT(kept.bytes() == words.bytes());
        EXPECT(kept.status[0] == kIterating);
        EXPECT(kept.state[0].kept == std::sqrt(cols) / 8);
        EXPECT(kept.status[1] == kNegativeCurvature);
        EXPECT(kept.status[2] == kStagnated && kept.state[2].residual == 0.5);
        EXPECT(kept.status[4] == kNonFinite);
        EXPECT(kept.iterations[0] == 3);
      }
    }
  }
}

template <typename T>
struct MinresSystem {
  std::vector<T> b, hp, x, v, v_next, q, q_next, best;
  std::vector<compute_t<T>> shift;
  std::vector<double> diagonal = std::vector<double>(kRows * 4), off_diagonal = std::vector<double>(kRows * 3);
  std::vector<MinresState> state = std::vector<MinresState>(kRows);
  std::vector<int32_t> status = std::vector<int32_t>(kRows, kIterating);
  std::vector<int32_t> iterations = std::vector<int32_t>(kRows, 2);

  // Rows that go on, that measure and begin again, that measure in vain and take back `best`, that overflow, and that
  // have a NaN.
  explicit MinresSystem(int64_t cols) {
    std::mt19937 draw(static_cast<unsigned>(cols));
    std::normal_distribution<double> normal(0.0, 1.0 / std::sqrt(cols));
    for (auto* vector : {&b, &hp, &x, &v, &v_next, &q, &q_next, &best}) {
      for (int64_t i = 0; i < kRows * cols; ++i) vector->push_back(static_cast<T>(static_cast<float>(normal(draw))));
    }
    for (int64_t i = 0; i < cols; ++i) shift.push_back(static_cast<compute_t<T>>(0.5 + std::fabs(normal(draw))));
    for (auto& row : state) {
      row.residual = row.measured = row.unit = row.operator_unit = row.operator_norm = 1.0;
      row.beta = row.cosine = row.sine = row.delta = row.epsilon = row.gamma = row.gamma_before = 0.5;
      row.coefficients = 2.0;
    }
    status[1] = kVerifying;
    state[1].measured = 100.0;
    status[2] = kSuspect;
    state[2].stalls = 1.0, state[2].kept = 1.0, state[2].measured = state[2].residual = 0.125;
    state[3].residual = CgRows<T>::largest(), state[3].cosine = 1.0;
    for (int64_t i = 3 * cols; i < 4 * cols; ++i) q[i] = static_cast<T>(1000.0f);
    hp[4 * cols + 7] = static_cast<T>(NAN);
  }

  std::vector<char> bytes() const {
    std::vector<char> all;
    const auto add = [&](const auto& vector) {
      const auto* const from = reinterpret_cast<const char*>(vector.data());
      all.insert(all.end(), from, from + vector.size() * sizeof(vector[0]));
    };
    add(x), add(v_next), add(q_next), add(best), add(state), add(status), add(iterations);
    add(diagonal), add(off_diagonal);
    return all;
  }

  void step(int64_t cols, bool first, bool packed, bool together) {
    MinresStepWork<T> work;
    MinresRows<T>& a = work.a;
    a.rows = kRows, a.cols = cols;
    a.b = b.data(), a.hp = hp.data(), a.x = x.data(), a.best = best.data();
    a.v = v.data(), a.v_next = v_next.data(), a.q = q.data(), a.q_next = q_next.data();
    a.shift = {shift.data(), 0, 1};
    a.state = state.data(), a.status = status.data(), a.iterations = iterations.data();
    a.diagonal = diagonal.data(), a.off_diagonal = off_diagonal.data(), a.coefficients = 4;
    a.first = first;
    launch_step<T>(work, cols, packed, together);
  }
};

template <typename T>
void minres_has_the_same_bits() {
  for (const int64_t cols : {40, 200, 1000, 16'000, 30'000}) {
    MinresSystem<T> kept(cols), read_again(cols), words(cols);
    kept.step(cols, false, true, true);
    read_again.step(cols, false, true, false);
    words.step(cols, false, false, false);
    EXPECT(kept.bytes() == read_again.bytes());
    EXPECT(kept.bytes() == words.bytes());
    EXPECT(kept.status[0] == kIterating && kept.iterations[0] == 3 && kept.diagonal[2] != 0.0);
    EXPECT(kept.off_diagonal[1] == 0.5);
    EXPECT(kept.status[1] == kIterating && kept.state[1].restarts == 1.0 && kept.iterations[1] == 2);
    EXPECT(kept.status[2] == kStagnated && kept.state[2].residual == 0.125);
    EXPECT(kept.x[2 * cols] == kept.best[2 * cols]);
    EXPECT(kept.status[3] == kNonFinite && kept.status[4] == kNonFinite);
    EXPECT(static_cast<float>(kept.v_next[4 * cols]) == 0.0f);
  }
}

}  // namespace
}  // namespace imaml_ext

int main() {
  return run_tests({{"float32", imaml_ext::has_the_same_bits<float>},
                    {"float64", imaml_ext::has_the_same_bits<double>},
                    {"bfloat16", imaml_ext::has_the_same_bits<c10::BFloat16>},
                    {"float16", imaml_ext::has_the_same_bits<c10::Half>},
                    {"minres, float32", imaml_ext::minres_has_the_same_bits<float>},
                    {"minres, float64", imaml_ext::minres_has_the_same_bits<double>},
                    {"minres, bfloat16", imaml_ext::minres_has_the_same_bits<c10::BFloat16>},
                    {"minres, float16", imaml_ext::minres_has_the_same_bits<c10::Half>}});
}
