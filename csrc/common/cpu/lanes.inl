// Sixteen numbers side by side, in as many registers as the instruction set needs. Included by kernels.inl inside
// an anonymous namespace, after IMAML_REGISTER_BYTES is set; not a header.
//
// Sums are kept in sixteen float64 lanes and folded by a fixed tree, whatever the register width, and products are
// never contracted: a kernel gives the same bits with every instruction set.

constexpr int kLanes = 16;

template <typename C>
struct Lanes {
  static constexpr int kWidth = IMAML_REGISTER_BYTES / sizeof(C);
  static constexpr int kParts = kLanes / kWidth;
  typedef C Part __attribute__((vector_size(kWidth * sizeof(C))));
  Part part[kParts];
};

#define IMAML_INLINE inline __attribute__((always_inline))
// All that a pass calls is compiled into it. Left to itself GCC keeps the body of a loop that has a tail, and so two
// callers, outside: a call, and the registers through memory, every sixteen numbers.
#define IMAML_PASS __attribute__((flatten)) static

// Calls body(k) for every part, k a constant: a loop over parts is unrolled too late for GCC to keep them in registers.
template <typename C, typename Body>
IMAML_INLINE void each_part(const Body& body) {
  [&]<int... k>(std::integer_sequence<int, k...>) {
    (body(std::integral_constant<int, k>{}), ...);
  }(std::make_integer_sequence<int, Lanes<C>::kParts>{});
}

#define IMAML_LANES_OPERATOR(op)                                            \
  template <typename C>                                                     \
  IMAML_INLINE Lanes<C> operator op(const Lanes<C>& a, const Lanes<C>& b) { \
    Lanes<C> out;                                                           \
    each_part<C>([&](auto k) { out.part[k] = a.part[k] op b.part[k]; });    \
    return out;                                                             \
  }
IMAML_LANES_OPERATOR(+)
IMAML_LANES_OPERATOR(-)
IMAML_LANES_OPERATOR(*)
IMAML_LANES_OPERATOR(/)
#undef IMAML_LANES_OPERATOR

template <typename C>
IMAML_INLINE Lanes<C> broadcast(C value) {
  Lanes<C> out;
  each_part<C>([&](auto k) { out.part[k] = value - (typename Lanes<C>::Part){}; });
  return out;
}

template <typename C>
IMAML_INLINE Lanes<C> square_root(Lanes<C> a) {
  each_part<C>([&](auto k) {
    for (int l = 0; l < Lanes<C>::kWidth; ++l) a.part[k][l] = std::sqrt(a.part[k][l]);
  });
  return a;
}

template <typename C>
IMAML_INLINE Lanes<double> widen(const Lanes<C>& a) {
  if constexpr (std::is_same_v<C, double>) {
    return a;
  } else {
    // One instruction for half a register, where GCC makes several of __builtin_convertvector.
    Lanes<double> out;
    each_part<C>([&](auto k) {
      constexpr int low = 2 * k, high = 2 * k + 1;
#if IMAML_REGISTER_BYTES == 64 && defined(__x86_64__)
      const __m512 part = (__m512)a.part[k];
      out.part[low] = (typename Lanes<double>::Part)_mm512_cvtps_pd(_mm512_castps512_ps256(part));
      out.part[high] = (typename Lanes<double>::Part)_mm512_cvtps_pd(_mm512_extractf32x8_ps(part, 1));
#elif IMAML_REGISTER_BYTES == 32 && defined(__x86_64__)
      const __m256 part = (__m256)a.part[k];
      out.part[low] = (typename Lanes<double>::Part)_mm256_cvtps_pd(_mm256_castps256_ps128(part));
      out.part[high] = (typename Lanes<double>::Part)_mm256_cvtps_pd(_mm256_extractf128_ps(part, 1));
#else
      constexpr int half = Lanes<double>::kWidth;
      for (int l = 0; l < half; ++l) {
        out.part[low][l] = a.part[k][l];
        out.part[high][l] = a.part[k][half + l];
      }
#endif
    });
    return out;
  }
}

// The first `count` numbers of a register, which may be less than one or more than all. By masks where there are some:
// through memory, a load that follows narrower stores waits for them.
#if defined(__x86_64__) && IMAML_REGISTER_BYTES == 64
IMAML_INLINE unsigned mask_of(int count, int width) { return count >= width ? (1u << width) - 1 : (1u << count) - 1; }
IMAML_INLINE __m512 load_some(const float* from, int count) { return _mm512_maskz_loadu_ps(mask_of(count, 16), from); }
IMAML_INLINE __m512d load_some(const double* from, int count) { return _mm512_maskz_loadu_pd(mask_of(count, 8), from); }
IMAML_INLINE void store_some(float* to, __m512 part, int count) { _mm512_mask_storeu_ps(to, mask_of(count, 16), part); }
IMAML_INLINE void store_some(double* to, __m512d part, int count) {
  _mm512_mask_storeu_pd(to, mask_of(count, 8), part);
}
#define IMAML_HAS_MASKS 1
#elif defined(__x86_64__) && IMAML_REGISTER_BYTES == 32
IMAML_INLINE __m256i mask_of(const float*, int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
IMAML_INLINE __m256i mask_of(const double*, int count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
IMAML_INLINE __m256 load_some(const float* from, int count) { return _mm256_maskload_ps(from, mask_of(from, count)); }
IMAML_INLINE __m256d load_some(const double* from, int count) { return _mm256_maskload_pd(from, mask_of(from, count)); }
IMAML_INLINE void store_some(float* to, __m256 part, int count) { _mm256_maskstore_ps(to, mask_of(to, count), part); }
IMAML_INLINE void store_some(double* to, __m256d part, int count) { _mm256_maskstore_pd(to, mask_of(to, count), part); }
#define IMAML_HAS_MASKS 1
#else
#define IMAML_HAS_MASKS 0
#endif

// `count` < 16 marks the end of a row: absent lanes read as zero and are not written.
template <typename T>
IMAML_INLINE Lanes<compute_t<T>> load(const T* from, int count = kLanes) {
  using C = compute_t<T>;
  Lanes<C> out;
  if constexpr (std::is_same_v<T, C>) {
    constexpr int kWidth = Lanes<C>::kWidth;
    if (count == kLanes) {
      each_part<C>([&](auto k) { std::memcpy(&out.part[k], from + k * kWidth, sizeof(out.part[k])); });
      return out;
    }
#if IMAML_HAS_MASKS
    each_part<C>([&](auto k) {
      const int left = count - k * kWidth;
      out.part[k] = left > 0 ? (typename Lanes<C>::Part)load_some(from + k * kWidth, left) : typename Lanes<C>::Part{};
    });
    return out;
#endif
  }
  C values[kLanes] = {};
  for (int l = 0; l < count; ++l) values[l] = static_cast<C>(from[l]);
  std::memcpy(&out, values, sizeof(out));
  return out;
}

template <typename T>
IMAML_INLINE void store(T* to, const Lanes<compute_t<T>>& lanes, int count = kLanes) {
  using C = compute_t<T>;
  if constexpr (std::is_same_v<T, C>) {
    constexpr int kWidth = Lanes<T>::kWidth;
    if (count == kLanes) {
      each_part<T>([&](auto k) { std::memcpy(to + k * kWidth, &lanes.part[k], sizeof(lanes.part[k])); });
      return;
    }
#if IMAML_HAS_MASKS
    each_part<T>([&](auto k) {
      const int left = count - k * kWidth;
      if (left > 0) store_some(to + k * kWidth, lanes.part[k], left);
    });
    return;
#endif
  }
  C values[kLanes];
  std::memcpy(values, &lanes, sizeof(lanes));
  for (int l = 0; l < count; ++l) to[l] = static_cast<T>(values[l]);
}

// What storing in T and reading again gives.
template <typename T>
IMAML_INLINE Lanes<compute_t<T>> rounded(const Lanes<compute_t<T>>& lanes) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    return lanes;
  } else {
    T values[kLanes];
    store(values, lanes);
    return load(values);
  }
}

// Row `row` of a coefficient: one number, or one per column.
template <typename C>
struct NumberRow {
  Lanes<C> value;
  IMAML_INLINE const Lanes<C>& at(int64_t, int) const { return value; }
};
template <typename C>
struct VectorRow {
  const C* data;
  IMAML_INLINE Lanes<C> at(int64_t i, int count) const { return load(data + i, count); }
};

// Calls body(row of the coefficient), compiled for either kind, so that no loop asks which it is.
template <typename C, typename Body>
IMAML_INLINE void with_row(const Coefficient<C>& c, int64_t row, const Body& body) {
  if (c.col_stride != 0) {
    body(VectorRow<C>{c.data + row * c.row_stride});
  } else {
    body(NumberRow<C>{broadcast(c.data[row * c.row_stride])});
  }
}

// The same where the kind is not worth a loop of its own; zero where the coefficient is absent.
template <typename C>
struct CoefficientRow {
  const C* data;  // null where the row has one value
  C value;

  IMAML_INLINE CoefficientRow(const Coefficient<C>& c, int64_t row)
      : data(c.col_stride != 0 ? c.data + row * c.row_stride : nullptr),
        value(c.data == nullptr || c.col_stride != 0 ? C(0) : c.data[row * c.row_stride]) {}

  IMAML_INLINE Lanes<C> at(int64_t i, int count) const {
    return data != nullptr ? load(data + i, count) : broadcast(value);
  }
};

// The halves of a vector of two numbers or more, added up again and again.
template <typename Vector>
IMAML_INLINE double folded(const Vector& v) {
  constexpr int half = sizeof(Vector) / sizeof(double) / 2;
#if __has_builtin(__builtin_shufflevector)
  if constexpr (half > 1) {
    return [&]<int... l>(std::integer_sequence<int, l...>) {
      return folded(__builtin_shufflevector(v, v, l...) + __builtin_shufflevector(v, v, (half + l)...));
    }(std::make_integer_sequence<int, half>{});
  }
  return v[0] + v[1];
#else  // GCC 11: the same sums, through memory
  double sum[2 * half];
  std::memcpy(sum, &v, sizeof(v));
  for (int width = half; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) sum[l] += sum[l + width];
  return sum[0];
#endif
}

struct Sum {
  Lanes<double> lanes;
  IMAML_INLINE Sum() : lanes(broadcast(0.0)) {}
  IMAML_INLINE void add(const Lanes<double>& a) { lanes = lanes + a; }
  IMAML_INLINE double total() const {
    Lanes<double> sum = lanes;
    for (int half = Lanes<double>::kParts / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) sum.part[k] += sum.part[k + half];
    return folded(sum.part[0]);
  }
};

// Calls body(i, count) for [begin, end) in steps of sixteen; count is a constant 16 but for the last call.
template <typename Body>
IMAML_INLINE void sweep(int64_t begin, int64_t end, Body&& body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, kLanes);
  if (i < end) body(i, static_cast<int>(end - i));
}

// What is squared or multiplied in a sum: of float64 numbers, whose squares may leave their range, `scale` times them.
template <typename C>
IMAML_INLINE Lanes<double> scaled(const Lanes<C>& lanes, double scale) {
  if constexpr (std::is_same_v<C, double>) {
    return lanes * broadcast(scale);
  } else {
    return widen(lanes);
  }
}
