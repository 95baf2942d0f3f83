// Single layers, each stage under its equation. Included by common/cpu/kernels.inl inside a namespace of the
// instruction set.

// The matrices of F(m × m, 3 × 3), at the points 0, ±1, ∞ and, for m = 4, ±2.
template <int M>
struct WinogradMatrices;
template <>
struct WinogradMatrices<2> {
  static constexpr double kInput[4][4] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}};
  static constexpr double kWeight[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  static constexpr double kOutput[2][4] = {{1, 1, 1, 0}, {0, 1, -1, -1}};
};
template <>
struct WinogradMatrices<4> {
  static constexpr double kInput[6][6] = {{4, 0, -5, 0, 1, 0},  {0, -4, -4, 1, 1, 0}, {0, 4, -4, -1, 1, 0},
                                          {0, -2, -1, 2, 1, 0}, {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}};
  static constexpr double kWeight[6][3] = {{1.0 / 4, 0, 0},
                                           {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                                           {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                                           {1.0 / 24, 1.0 / 12, 1.0 / 6},
                                           {1.0 / 24, -1.0 / 12, 1.0 / 6},
                                           {0, 0, 1}};
  static constexpr double kOutput[4][6] = {
      {1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0}, {0, 1, -1, 8, -8, 1}};
};

// L of a kind: kOut × kIn, at(o, i).
template <Winograd kKind, int M>
struct WinogradMatrix {
  using L = WinogradMatrices<M>;
  static constexpr bool kOfWeight = kKind == Winograd::kWeight || kKind == Winograd::kFlippedWeight;
  static constexpr int kIn = kOfWeight ? 3 : kKind == Winograd::kOutputAdjoint ? M : M + 2;
  static constexpr int kOut = kKind == Winograd::kOutput ? M : kKind == Winograd::kWeightAdjoint ? 3 : M + 2;
  static constexpr double at(int o, int i) {
    switch (kKind) {
      case Winograd::kInput:
        return L::kInput[o][i];
      case Winograd::kWeight:
        return L::kWeight[o][i];
      case Winograd::kFlippedWeight:
        return L::kWeight[o][2 - i];
      case Winograd::kOutputAdjoint:
        return L::kOutput[i][o];
      case Winograd::kOutput:
        return L::kOutput[o][i];
      case Winograd::kWeightAdjoint:
        break;
    }
    return L::kWeight[i][o];
  }
};

template <typename T>
struct LayerPasses {
  using P = NetworkPasses<T>;
  using Vec = typename P::Vec;
  using N = BatchNormArguments<T>;
  using A = TileArguments<T>;
  static constexpr int kWidth = P::kWidth;

  static IMAML_INLINE Vec get(const T* from, int n) {
    if (n == kWidth) return P::get(from);
    Vec v{};
    std::memcpy(&v, from, n * sizeof(T));
    return v;
  }
  static IMAML_INLINE void put(T* to, Vec v, int n) {
    if (n == kWidth) return P::put(to, v);
    std::memcpy(to, &v, n * sizeof(T));
  }

  // Calls body(channel, count) for a register of channels at a time, the last of which may be short.
  template <typename Body>
  static IMAML_INLINE void over_channels(int64_t channels, const Body& body) {
    int64_t j = 0;
    for (; j + kWidth <= channels; j += kWidth) body(j, kWidth);
    if (j < channels) body(j, static_cast<int>(channels - j));
  }

  // --- Winograd's tiles
  // -----------------------------------------------------------------------------------------------

  // Σ_i L[o][i] in[i · stride], without what is multiplied by zero
  template <typename L, int kO, int kI = 0>
  static IMAML_INLINE Vec combine(const Vec* in, int stride, Vec sum) {
    if constexpr (kI == L::kIn) {
      return sum;
    } else {
      constexpr T factor = static_cast<T>(L::at(kO, kI));
      if constexpr (factor == T(1)) {
        sum = sum + in[kI * stride];
      } else if constexpr (factor == T(-1)) {
        sum = sum - in[kI * stride];
      } else if constexpr (factor != T(0)) {
        sum = P::multiply_add(P::all(factor), in[kI * stride], sum);
      }
      return combine<L, kO, kI + 1>(in, stride, sum);
    }
  }

  template <typename L, int kO = 0>
  static IMAML_INLINE void combine_all(const Vec* in, int stride, Vec* out, int out_stride) {
    if constexpr (kO < L::kOut) {
      out[kO * out_stride] = combine<L, kO>(in, stride, Vec{});
      combine_all<L, kO + 1>(in, stride, out, out_stride);
    }
  }

  // out ← L in Lᵀ
  template <typename L>
  static IMAML_INLINE void both_sides(const Vec (&in)[L::kIn * L::kIn], Vec (&out)[L::kOut * L::kOut]) {
    Vec half[L::kOut * L::kIn];
    for (int i = 0; i < L::kIn; ++i) combine_all<L>(in + i, L::kIn, half + i, L::kIn);
    for (int o = 0; o < L::kOut; ++o) combine_all<L>(half + o * L::kIn, 1, out + o * L::kOut, 1);
  }

  // Calls body(tile, the row and column of its first pixel) for every tile.
  template <typename Body>
  static IMAML_INLINE void over_tiles(const A& a, const Body& body) {
    for (int64_t row = 0; row < a.rows; ++row)
      for (int64_t col = 0; col < a.cols; ++col)
        body(row * a.cols + col, row * a.step - a.offset, col * a.step - a.offset);
  }

  template <typename L>
  static void gather(const A& a) {
    over_tiles(a, [&](int64_t tile, int64_t top, int64_t left) {
      const bool inside = top >= 0 && left >= 0 && top + L::kIn <= a.height && left + L::kIn <= a.width;
      over_channels(a.channels, [&](int64_t c, int n) {
        Vec in[L::kIn * L::kIn], out[L::kOut * L::kOut];
        for (int i = 0; i < L::kIn; ++i)
          for (int j = 0; j < L::kIn; ++j) {
            const int64_t y = top + i, x = left + j;
            const bool there = inside || (y >= 0 && x >= 0 && y < a.height && x < a.width);
            in[i * L::kIn + j] = there ? get(a.image + (y * a.width + x) * a.pixel + c, n) : Vec{};
          }
        both_sides<L>(in, out);
        T* const to = a.tiles + tile * a.channels + c;
        for (int k = 0; k < L::kOut * L::kOut; ++k) put(to + k * a.plane, out[k], n);
      });
    });
  }

  template <typename L>
  static void scatter(const A& a) {
    over_tiles(a, [&](int64_t tile, int64_t top, int64_t left) {
      over_channels(a.channels, [&](int64_t c, int n) {
        Vec in[L::kIn * L::kIn], out[L::kOut * L::kOut];
        const T* const from = a.tiles + tile * a.channels + c;
        for (int k = 0; k < L::kIn * L::kIn; ++k) in[k] = get(from + k * a.plane, n);
        both_sides<L>(in, out);
        for (int i = 0; i < L::kOut && top + i < a.height; ++i)
          for (int j = 0; j < L::kOut && left + j < a.width; ++j)
            put(a.image + ((top + i) * a.width + left + j) * a.pixel + c, out[i * L::kOut + j], n);
      });
    });
  }

  template <int M>
  static void gather_of(const A& a) {
    switch (a.matrix) {
      case Winograd::kInput:
        return gather<WinogradMatrix<Winograd::kInput, M>>(a);
      case Winograd::kWeight:
        return gather<WinogradMatrix<Winograd::kWeight, M>>(a);
      case Winograd::kFlippedWeight:
        return gather<WinogradMatrix<Winograd::kFlippedWeight, M>>(a);
      default:
        return gather<WinogradMatrix<Winograd::kOutputAdjoint, M>>(a);
    }
  }
  static void gather_tiles(const A& a) { a.m == 2 ? gather_of<2>(a) : gather_of<4>(a); }

  template <int M>
  static void scatter_of(const A& a) {
    if (a.matrix == Winograd::kOutput) return scatter<WinogradMatrix<Winograd::kOutput, M>>(a);
    scatter<WinogradMatrix<Winograd::kWeightAdjoint, M>>(a);
  }
  static void scatter_tiles(const A& a) { a.m == 2 ? scatter_of<2>(a) : scatter_of<4>(a); }

  static void add(T* to, const T* from, int64_t count) {
    over_channels(count, [&](int64_t i, int n) { put(to + i, get(to + i, n) + get(from + i, n), n); });
  }

  // --- batch norm
  // -----------------------------------------------------------------------------------------------------

  // Means over the rows of what `term` adds to its sums, four registers of channels at a time where there are so many:
  // calls finish(channel, count, means).
  template <int kSums, typename Term, typename Finish>
  static IMAML_INLINE void column_means(const N& a, const Term& term, const Finish& finish) {
    const double rows = static_cast<double>(a.rows);
    int64_t j = 0;
    const auto some = [&]<int V>() {
      double total[kSums][V * kWidth];
      P::template column_sums<V, kSums>(
          a.rows,
          [&](int64_t r, Vec(&sum)[kSums][V]) {
            for (int v = 0; v < V; ++v) {
              Vec terms[kSums];
              const int64_t c = j + v * kWidth;
              const int n = static_cast<int>(std::min<int64_t>(kWidth, a.channels - c));
              term(r, c, V == 1 ? n : kWidth, terms);
              for (int s = 0; s < kSums; ++s) sum[s][v] += terms[s];
            }
          },
          total);
      for (int v = 0; v < V; ++v, j += kWidth) {
        double means[kSums][kWidth];
        for (int s = 0; s < kSums; ++s)
          for (int l = 0; l < kWidth; ++l) means[s][l] = total[s][v * kWidth + l] / rows;
        finish(j, static_cast<int>(std::min<int64_t>(kWidth, a.channels - j)), means);
      }
    };
    while (j + 4 * kWidth <= a.channels) some.template operator()<4>();
    while (j < a.channels) some.template operator()<1>();
  }

  static IMAML_INLINE Vec narrow(const double (&values)[kWidth]) {
    T narrowed[kWidth];
    for (int l = 0; l < kWidth; ++l) narrowed[l] = static_cast<T>(values[l]);
    return P::get(narrowed);
  }

  // x̂ of a row's channels
  static IMAML_INLINE Vec hat(const N& a, int64_t r, int64_t c, int n) {
    return (get(a.x + r * a.channels + c, n) - get(a.mean + c, n)) * get(a.scale + c, n);
  }

  static void norm(const N& a) {
    column_means<1>(
        a, [&](int64_t r, int64_t c, int n, Vec(&sum)[1]) { sum[0] = get(a.x + r * a.channels + c, n); },
        [&](int64_t c, int n, const double (&means)[1][kWidth]) { put(a.mean + c, narrow(means[0]), n); });
    column_means<1>(
        a,
        [&](int64_t r, int64_t c, int n, Vec(&sum)[1]) {
          const Vec centred = get(a.x + r * a.channels + c, n) - get(a.mean + c, n);
          sum[0] = centred * centred;
        },
        [&](int64_t c, int n, const double (&means)[1][kWidth]) {
          for (int l = 0; l < n; ++l) a.scale[c + l] = static_cast<T>(1.0 / std::sqrt(means[0][l] + a.eps));
        });
    for (int64_t r = 0; r < a.rows; ++r)
      over_channels(a.channels, [&](int64_t c, int n) {
        put(a.z + r * a.channels + c, P::multiply_add(get(a.gamma + c, n), hat(a, r, c, n), get(a.beta + c, n)), n);
      });
  }

  // x̄ = γ s (z̄ − mean z̄ − x̂ mean(z̄ x̂)),  γ̄ = Σ z̄ x̂,  β̄ = Σ z̄
  static void norm_backward(const N& a) {
    const T rows = static_cast<T>(a.rows);
    column_means<2>(
        a,
        [&](int64_t r, int64_t c, int n, Vec(&sum)[2]) {
          sum[0] = get(a.z_bar + r * a.channels + c, n);
          sum[1] = sum[0] * hat(a, r, c, n);
        },
        [&](int64_t c, int n, const double (&means)[2][kWidth]) {
          const Vec mean = narrow(means[0]), along = narrow(means[1]);
          put(a.beta_bar + c, mean * P::all(rows), n);
          put(a.gamma_bar + c, along * P::all(rows), n);
        });
    const Vec share = P::all(T(1) / rows);
    for (int64_t r = 0; r < a.rows; ++r)
      over_channels(a.channels, [&](int64_t c, int n) {
        const Vec centred = get(a.z_bar + r * a.channels + c, n) - get(a.beta_bar + c, n) * share;
        const Vec along = hat(a, r, c, n) * get(a.gamma_bar + c, n) * share;
        put(a.x_bar + r * a.channels + c, get(a.gamma + c, n) * get(a.scale + c, n) * (centred - along), n);
      });
  }

  // With a = z̄, g = ẋ and means m(·):   F = n γ s K + n γ̇ m(a x̂) + n β̇ m(a),   K = m(g a) − m(g) m(a) − m(g x̂) m(a x̂)
  //   ∂F/∂a = γ s (g − m(g) − x̂ m(g x̂)) + γ̇ x̂ + β̇,   ∂F/∂γ = n s K
  //   ∂F/∂x = s (h − m(h) − x̂ m(h x̂)) − γ s² x̂ K,   h = ∂F/∂x̂ = −γ s (g m(a x̂) + a m(g x̂)) + γ̇ a
  static void norm_second(const N& a) {
    const auto sum_of = [&](int which, int64_t c) { return a.sums + which * a.channels + c; };
    column_means<5>(
        a,
        [&](int64_t r, int64_t c, int n, Vec(&sum)[5]) {
          const Vec z = get(a.z_bar + r * a.channels + c, n), g = get(a.x_dot + r * a.channels + c, n);
          const Vec x = hat(a, r, c, n);
          sum[0] = z, sum[1] = g, sum[2] = g * z, sum[3] = z * x, sum[4] = g * x;
        },
        [&](int64_t c, int n, const double (&means)[5][kWidth]) {
          double curvature[kWidth];  // K
          for (int l = 0; l < kWidth; ++l)
            curvature[l] = means[2][l] - means[1][l] * means[0][l] - means[4][l] * means[3][l];
          const Vec z = narrow(means[0]), g = narrow(means[1]), zx = narrow(means[3]), gx = narrow(means[4]);
          const Vec K = narrow(curvature), s = get(a.scale + c, n), gs = get(a.gamma + c, n) * s;
          const Vec gamma_dot = get(a.gamma_dot + c, n);
          put(a.gamma_bar + c, s * K * P::all(static_cast<T>(a.rows)), n);
          put(sum_of(0, c), g, n), put(sum_of(1, c), zx, n), put(sum_of(2, c), gx, n);
          put(sum_of(3, c), gamma_dot * z - gs * (g * zx + z * gx), n);              // m(h)
          put(sum_of(4, c), gamma_dot * zx - gs * (gx * zx + gx * zx) + gs * K, n);  // m(h x̂) + γ s K
        });
    for (int64_t r = 0; r < a.rows; ++r)
      over_channels(a.channels, [&](int64_t c, int n) {
        const int64_t at = r * a.channels + c;
        const Vec z = get(a.z_bar + at, n), g = get(a.x_dot + at, n), x = hat(a, r, c, n);
        const Vec s = get(a.scale + c, n), gs = get(a.gamma + c, n) * s, gamma_dot = get(a.gamma_dot + c, n);
        const Vec zx = get(sum_of(1, c), n), gx = get(sum_of(2, c), n);
        const Vec by_z = gs * (g - get(sum_of(0, c), n) - x * gx) + gamma_dot * x + get(a.beta_dot + c, n);
        const Vec h = gamma_dot * z - gs * (g * zx + z * gx);
        put(a.z_bar_bar + at, by_z, n);
        put(a.x_bar + at, s * (h - get(sum_of(3, c), n) - x * get(sum_of(4, c), n)), n);
      });
  }

  static constexpr LayerKernels<T> kTable = {gather_tiles, scatter_tiles, add, norm, norm_backward, norm_second};
};
