// The layers, each stage under its equation. Included by common/cpu/kernels.inl inside a namespace of the instruction
// set.

template <typename T>
struct NetworkPasses {
  typedef T Vec __attribute__((vector_size(IMAML_REGISTER_BYTES)));
  static constexpr int kWidth = IMAML_REGISTER_BYTES / sizeof(T);
  // A tile of the products: kTileRows × kTileVectors accumulators beside the operands, in 32 registers or 16.
  static constexpr int kTileRows = 6;
  static constexpr int kTileVectors = IMAML_REGISTER_BYTES == 64 ? 4 : 2;
  using N = NormArguments<T>;

  static IMAML_INLINE Vec get(const T* from) {
    Vec v;
    std::memcpy(&v, from, sizeof(v));
    return v;
  }
  static IMAML_INLINE void put(T* to, Vec v) { std::memcpy(to, &v, sizeof(v)); }
  static IMAML_INLINE Vec all(T value) { return value - Vec{}; }

  // a b + c, rounded once where there is an instruction for it
  static IMAML_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__x86_64__) && IMAML_REGISTER_BYTES == 64
    if constexpr (std::is_same_v<T, float>) {
      return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    } else {
      return (Vec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
    }
#elif defined(__x86_64__) && IMAML_REGISTER_BYTES == 32
    if constexpr (std::is_same_v<T, float>) {
      return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    } else {
      return (Vec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
    }
#else
    return a * b + c;
#endif
  }

  // Calls body.template operator()<V>(column) with V registers of columns at a time.
  template <int kMost, typename Body>
  static IMAML_INLINE void over_columns(int64_t first, int64_t last, const Body& body) {
    int64_t j = first;
    for (; j + kMost * kWidth <= last; j += kMost * kWidth) body.template operator()<kMost>(j);
    if constexpr (kMost > 1) over_columns<kMost / 2>(j, last, body);
  }

  // --- products
  // -------------------------------------------------------------------------------------------------------

  template <int R, int V>
  static IMAML_INLINE void multiply_tile(const T* const* a, T* const* c, int64_t j, int64_t depth, const T* b,
                                         int64_t width, bool add) {
    const T* rows[R];
    Vec sum[R][V];
    for (int r = 0; r < R; ++r) {
      rows[r] = a[r];
      for (int v = 0; v < V; ++v) sum[r][v] = add ? get(c[r] + j + v * kWidth) : Vec{};
    }
    const T* at = b + j;
    for (int64_t k = 0; k < depth; ++k, at += width) {
      Vec column[V];
      for (int v = 0; v < V; ++v) column[v] = get(at + v * kWidth);
      for (int r = 0; r < R; ++r) {
        const Vec value = all(rows[r][k]);
        for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(value, column[v], sum[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) put(c[r] + j + v * kWidth, sum[r][v]);
  }

  static void multiply(const T* const* a, T* const* c, int64_t rows, int64_t depth, const T* b, int64_t width,
                       bool add) {
    over_columns<kTileVectors>(0, width, [&]<int V>(int64_t j) {
      int64_t r = 0;
      for (; r + kTileRows <= rows; r += kTileRows) multiply_tile<kTileRows, V>(a + r, c + r, j, depth, b, width, add);
      switch (rows - r) {
        case 5:
          return multiply_tile<5, V>(a + r, c + r, j, depth, b, width, add);
        case 4:
          return multiply_tile<4, V>(a + r, c + r, j, depth, b, width, add);
        case 3:
          return multiply_tile<3, V>(a + r, c + r, j, depth, b, width, add);
        case 2:
          return multiply_tile<2, V>(a + r, c + r, j, depth, b, width, add);
        case 1:
          return multiply_tile<1, V>(a + r, c + r, j, depth, b, width, add);
        default:
          return;
      }
    });
  }

  template <int R, int V>
  static IMAML_INLINE void outer_tile(const T* const* a, const T* const* g, int64_t rows, int64_t k, int64_t j,
                                      int64_t channels, T* w, bool add) {
    Vec sum[R][V] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const T* const row = a[r] + k;
      const T* const grad = g[r] + j;
      Vec column[V];
      for (int v = 0; v < V; ++v) column[v] = get(grad + v * kWidth);
      for (int i = 0; i < R; ++i) {
        const Vec value = all(row[i]);
        for (int v = 0; v < V; ++v) sum[i][v] = multiply_add(value, column[v], sum[i][v]);
      }
    }
    for (int i = 0; i < R; ++i) {
      T* const to = w + (k + i) * channels + j;
      if (j + V * kWidth <= channels) {
        for (int v = 0; v < V; ++v) put(to + v * kWidth, add ? get(to + v * kWidth) + sum[i][v] : sum[i][v]);
      } else {
        T values[V * kWidth];
        std::memcpy(values, sum[i], sizeof(values));
        for (int64_t l = 0; l < channels - j && l < V * kWidth; ++l) to[l] = add ? to[l] + values[l] : values[l];
      }
    }
  }

  static void outer(const T* const* a, const T* const* g, int64_t rows, int64_t first, int64_t last, int64_t channels,
                    T* w, bool add) {
    over_columns<kTileVectors>(0, padded_channels(channels), [&]<int V>(int64_t j) {
      int64_t k = first;
      for (; k + kTileRows <= last; k += kTileRows) outer_tile<kTileRows, V>(a, g, rows, k, j, channels, w, add);
      switch (last - k) {
        case 5:
          return outer_tile<5, V>(a, g, rows, k, j, channels, w, add);
        case 4:
          return outer_tile<4, V>(a, g, rows, k, j, channels, w, add);
        case 3:
          return outer_tile<3, V>(a, g, rows, k, j, channels, w, add);
        case 2:
          return outer_tile<2, V>(a, g, rows, k, j, channels, w, add);
        case 1:
          return outer_tile<1, V>(a, g, rows, k, j, channels, w, add);
        default:
          return;
      }
    });
  }

  static void transpose(const T* in, int64_t rows, int64_t cols, T* out, int64_t width) {
    constexpr int kSide = 8;
    for (int64_t j = 0; j < cols; j += kSide) {
      const int64_t wide = std::min<int64_t>(kSide, cols - j);
      for (int64_t i = 0; i < rows; i += kSide) {
        const int64_t high = std::min<int64_t>(kSide, rows - i);
        if (wide == kSide && high == kSide) {
          for (int l = 0; l < kSide; ++l)
            for (int m = 0; m < kSide; ++m) out[(j + l) * width + i + m] = in[(i + m) * cols + j + l];
        } else {
          for (int64_t l = 0; l < wide; ++l)
            for (int64_t m = 0; m < high; ++m) out[(j + l) * width + i + m] = in[(i + m) * cols + j + l];
        }
      }
      for (int64_t l = 0; l < wide; ++l) std::fill(out + (j + l) * width + rows, out + (j + l + 1) * width, T(0));
    }
  }

  // --- norm and activation
  // --------------------------------------------------------------------------------------------

  // Σ over the rows of what `term` gives of a row, V registers of columns wide; in T over kBlock rows, in double
  // beyond.
  template <int V, int kSums, typename Term>
  static IMAML_INLINE void column_sums(int64_t rows, const Term& term, double (&total)[kSums][V * kWidth]) {
    constexpr int64_t kBlock = 64;
    for (auto& sums : total) std::fill(std::begin(sums), std::end(sums), 0.0);
    for (int64_t begin = 0; begin < rows; begin += kBlock) {
      Vec sum[kSums][V] = {};
      const int64_t end = std::min(begin + kBlock, rows);
      for (int64_t r = begin; r < end; ++r) term(r, sum);
      for (int s = 0; s < kSums; ++s) {
        T values[V * kWidth];
        std::memcpy(values, sum[s], sizeof(values));
        for (int l = 0; l < V * kWidth; ++l) total[s][l] += values[l];
      }
    }
  }

  template <int V>
  static IMAML_INLINE void get_columns(const T* from, Vec (&to)[V]) {
    for (int v = 0; v < V; ++v) to[v] = get(from + v * kWidth);
  }

  template <int V>
  static IMAML_INLINE void divided(const double (&sums)[V * kWidth], double by, Vec (&to)[V]) {
    T values[V * kWidth];
    for (int l = 0; l < V * kWidth; ++l) values[l] = static_cast<T>(sums[l] / by);
    std::memcpy(to, values, sizeof(values));
  }

  template <int V>
  static IMAML_INLINE void put_columns(const double (&sums)[V * kWidth], T* to) {
    for (int l = 0; l < V * kWidth; ++l) to[l] = static_cast<T>(sums[l]);
  }

  static IMAML_INLINE Vec activate(Activation activation, Vec z) {
    switch (activation) {
      case Activation::kRelu:
        return z < 0 ? Vec{} : z;  // a NaN stays one
      case Activation::kTanh:
        for (int l = 0; l < kWidth; ++l) z[l] = std::tanh(z[l]);
        return z;
      case Activation::kIdentity:
        break;
    }
    return z;
  }

  // act′(z) d, from a = act(z)
  static IMAML_INLINE Vec through(Activation activation, Vec a, Vec d) {
    switch (activation) {
      case Activation::kRelu:
        return a > 0 ? d : Vec{};
      case Activation::kTanh:
        return d - a * a * d;
      case Activation::kIdentity:
        break;
    }
    return d;
  }

  static void norm(const N& n, int64_t first, int64_t last) {
    over_columns<4>(first, last, [&]<int V>(int64_t j) {
      const auto at = [&](T* matrix, int64_t r, int v) { return matrix + r * n.width + j + v * kWidth; };
      Vec beta[V];
      get_columns<V>(n.beta + j, beta);
      if (n.norm == Norm::kBias) {  // z = y + β
        for (int64_t r = 0; r < n.rows; ++r)
          for (int v = 0; v < V; ++v) {
            const Vec z = get(at(n.hat, r, v)) + beta[v];
            put(at(n.hat, r, v), z);
            if (n.act != nullptr) put(at(n.act, r, v), activate(n.activation, z));
          }
        return;
      }
      const double rows = static_cast<double>(n.rows);
      double total[1][V * kWidth];
      Vec mean[V], scale[V], gamma[V];
      column_sums<V, 1>(
          n.rows,
          [&](int64_t r, Vec(&sum)[1][V]) {
            for (int v = 0; v < V; ++v) sum[0][v] += get(at(n.hat, r, v));
          },
          total);
      divided<V>(total[0], rows, mean);
      column_sums<V, 1>(
          n.rows,
          [&](int64_t r, Vec(&sum)[1][V]) {
            for (int v = 0; v < V; ++v) {
              const Vec centred = get(at(n.hat, r, v)) - mean[v];
              sum[0][v] += centred * centred;
            }
          },
          total);
      for (double& t : total[0]) t = 1.0 / std::sqrt(t / rows + kBatchNormEps);
      put_columns<V>(total[0], n.scale + j);
      get_columns<V>(n.scale + j, scale);
      get_columns<V>(n.gamma + j, gamma);
      for (int64_t r = 0; r < n.rows; ++r)
        for (int v = 0; v < V; ++v) {
          const Vec hat = (get(at(n.hat, r, v)) - mean[v]) * scale[v];
          put(at(n.hat, r, v), hat);
          if (n.act != nullptr) put(at(n.act, r, v), activate(n.activation, gamma[v] * hat + beta[v]));
        }
    });
  }

  // z̄ = act′ ā;   β̄ = Σ z̄,  γ̄ = Σ z̄ x̂;   ȳ = s γ (z̄ − mean z̄ − x̂ mean(z̄ x̂))
  static void norm_backward(const N& n, int64_t first, int64_t last) {
    over_columns<4>(first, last, [&]<int V>(int64_t j) {
      const auto at = [&](T* matrix, int64_t r, int v) { return matrix + r * n.width + j + v * kWidth; };
      const bool batch = n.norm == Norm::kBatch;
      double total[2][V * kWidth];
      column_sums<V, 2>(
          n.rows,
          [&](int64_t r, Vec(&sum)[2][V]) {
            for (int v = 0; v < V; ++v) {
              Vec z_bar = get(at(n.z_bar, r, v));
              if (n.act != nullptr) put(at(n.z_bar, r, v), z_bar = through(n.activation, get(at(n.act, r, v)), z_bar));
              sum[0][v] += z_bar;
              if (batch) sum[1][v] += z_bar * get(at(n.hat, r, v));
            }
          },
          total);
      put_columns<V>(total[0], n.beta_bar + j);
      if (!batch) {
        if (n.y_bar == n.z_bar) return;
        for (int64_t r = 0; r < n.rows; ++r)
          for (int v = 0; v < V; ++v) put(at(n.y_bar, r, v), get(at(n.z_bar, r, v)));
        return;
      }
      put_columns<V>(total[1], n.gamma_bar + j);
      Vec mean[V], along[V], scale[V], gamma[V];
      divided<V>(total[0], static_cast<double>(n.rows), mean);
      divided<V>(total[1], static_cast<double>(n.rows), along);
      get_columns<V>(n.scale + j, scale);
      get_columns<V>(n.gamma + j, gamma);
      for (int v = 0; v < V; ++v) scale[v] *= gamma[v];
      for (int64_t r = 0; r < n.rows; ++r)
        for (int v = 0; v < V; ++v)
          put(at(n.y_bar, r, v), scale[v] * (get(at(n.z_bar, r, v)) - mean[v] - get(at(n.hat, r, v)) * along[v]));
    });
  }

  // x̂˙ = s (ẏ − mean ẏ − x̂ mean(x̂ ẏ));   ż = γ x̂˙ + γ̇ x̂ + β̇;   ȧ = act′ ż
  static void norm_tangent(const N& n, int64_t first, int64_t last) {
    over_columns<4>(first, last, [&]<int V>(int64_t j) {
      const auto at = [&](T* matrix, int64_t r, int v) { return matrix + r * n.width + j + v * kWidth; };
      Vec beta_dot[V];
      get_columns<V>(n.beta_dot + j, beta_dot);
      if (n.norm == Norm::kBias) {
        for (int64_t r = 0; r < n.rows; ++r)
          for (int v = 0; v < V; ++v) {
            const Vec z_dot = get(at(n.hat_dot, r, v)) + beta_dot[v];
            put(at(n.hat_dot, r, v), z_dot);
            if (n.act != nullptr) put(at(n.act_dot, r, v), through(n.activation, get(at(n.act, r, v)), z_dot));
          }
        return;
      }
      double total[2][V * kWidth];
      column_sums<V, 2>(
          n.rows,
          [&](int64_t r, Vec(&sum)[2][V]) {
            for (int v = 0; v < V; ++v) {
              const Vec y_dot = get(at(n.hat_dot, r, v));
              sum[0][v] += y_dot;
              sum[1][v] += y_dot * get(at(n.hat, r, v));
            }
          },
          total);
      Vec mean[V], pull[V], scale[V], gamma[V], gamma_dot[V];
      divided<V>(total[0], static_cast<double>(n.rows), mean);
      divided<V>(total[1], static_cast<double>(n.rows), pull);
      for (int v = 0; v < V; ++v) put(n.pull + j + v * kWidth, pull[v]);
      get_columns<V>(n.scale + j, scale);
      get_columns<V>(n.gamma + j, gamma);
      get_columns<V>(n.gamma_dot + j, gamma_dot);
      for (int64_t r = 0; r < n.rows; ++r)
        for (int v = 0; v < V; ++v) {
          const Vec hat = get(at(n.hat, r, v));
          const Vec hat_dot = scale[v] * (get(at(n.hat_dot, r, v)) - mean[v] - hat * pull[v]);
          put(at(n.hat_dot, r, v), hat_dot);
          if (n.act == nullptr) continue;
          const Vec z_dot = gamma[v] * hat_dot + gamma_dot[v] * hat + beta_dot[v];
          put(at(n.act_dot, r, v), through(n.activation, get(at(n.act, r, v)), z_dot));
        }
    });
  }

  // The derivative of norm_backward, act″ included. With u = z̄ − mean z̄ − x̂ mean(z̄ x̂),
  //   ȳ˙ = (s γ)˙ u + s γ (z̄˙ − mean z̄˙ − x̂˙ mean(z̄ x̂) − x̂ mean((z̄ x̂)˙)),   s˙ = −s² mean(x̂ ẏ)
  static void norm_second(const N& n, int64_t first, int64_t last) {
    over_columns<4>(first, last, [&]<int V>(int64_t j) {
      const auto at = [&](T* matrix, int64_t r, int v) { return matrix + r * n.width + j + v * kWidth; };
      const bool batch = n.norm == Norm::kBatch;
      double total[2][V * kWidth];
      column_sums<V, 2>(
          n.rows,
          [&](int64_t r, Vec(&sum)[2][V]) {
            for (int v = 0; v < V; ++v) {
              Vec z_bar_dot = get(at(n.y_bar_dot, r, v));
              if (n.act != nullptr) {
                const Vec a = get(at(n.act, r, v));
                z_bar_dot = through(n.activation, a, z_bar_dot);
                // tanh″ ż ā = −2 tanh ż z̄, and with a norm ż is not at hand: kTanh comes with kBias alone.
                if (n.activation == Activation::kTanh)
                  z_bar_dot -= T(2) * a * get(at(n.hat_dot, r, v)) * get(at(n.z_bar, r, v));
                put(at(n.y_bar_dot, r, v), z_bar_dot);
              }
              sum[0][v] += z_bar_dot;
              if (batch)
                sum[1][v] += z_bar_dot * get(at(n.hat, r, v)) + get(at(n.z_bar, r, v)) * get(at(n.hat_dot, r, v));
            }
          },
          total);
      put_columns<V>(total[0], n.beta_bar_dot + j);
      if (!batch) return;
      put_columns<V>(total[1], n.gamma_bar_dot + j);
      const T inverse = T(1) / static_cast<T>(n.rows);
      Vec mean[V], along[V], mean_dot[V], along_dot[V], scale[V], gamma[V], gamma_dot[V], pull[V], factor_dot[V];
      get_columns<V>(n.beta_bar + j, mean);
      get_columns<V>(n.gamma_bar + j, along);
      divided<V>(total[0], static_cast<double>(n.rows), mean_dot);
      divided<V>(total[1], static_cast<double>(n.rows), along_dot);
      get_columns<V>(n.scale + j, scale);
      get_columns<V>(n.gamma + j, gamma);
      get_columns<V>(n.gamma_dot + j, gamma_dot);
      get_columns<V>(n.pull + j, pull);
      for (int v = 0; v < V; ++v) {
        mean[v] *= inverse;
        along[v] *= inverse;
        factor_dot[v] = scale[v] * (gamma_dot[v] - scale[v] * pull[v] * gamma[v]);
        scale[v] *= gamma[v];
      }
      for (int64_t r = 0; r < n.rows; ++r)
        for (int v = 0; v < V; ++v) {
          const Vec hat = get(at(n.hat, r, v));
          const Vec u = get(at(n.z_bar, r, v)) - mean[v] - hat * along[v];
          const Vec u_dot =
              get(at(n.y_bar_dot, r, v)) - mean_dot[v] - get(at(n.hat_dot, r, v)) * along[v] - hat * along_dot[v];
          put(at(n.y_bar_dot, r, v), factor_dot[v] * u + scale[v] * u_dot);
        }
    });
  }

  static constexpr NetworkKernels<T> kTable = {multiply,      outer,        transpose,  norm,
                                               norm_backward, norm_tangent, norm_second};
};
