// Products with weight rows, written once over a vector type V; every instruction set's unit includes this inside its
// anonymous namespace, after half.h. V provides: F (float vector), kWidth, kMaxN (rows that fit in registers), zero,
// set1, load, store, fma, add, sum, prefetch, and load<format>(row, i) / load_tail<format>(row, i, count) giving kWidth
// floats from a row. Nothing else is assumed.

template <int kFormat> constexpr int element_bytes() { return kFormat == 0 ? 4 : 2; }

// Sums that a product is kept in, whatever M and N are: so that its bits do not depend on them.
constexpr int kChains = 2;

template <class V, int kFormat> struct FloatDot {
  static constexpr int kMaxN = V::kMaxN;
  template <int M, int N>
  static void run(const uint8_t* const* w, const Input* const* x, int d, float* out, const uint8_t* const* next) {
    constexpr int W = V::kWidth, U = kChains, kBytes = element_bytes<kFormat>();
    typename V::F acc[U][M][N];
    for (int u = 0; u < U; u++)
      for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) acc[u][m][n] = V::zero();
    int i = 0;
    for (; i + U * W <= d; i += U * W) {
      for (int m = 0; m < M; m++)
        for (int b = 0; b < U * W * kBytes; b += 64) V::prefetch(next[m] + i * kBytes + b);
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) {
        typename V::F wv[M];
#pragma GCC unroll 2
        for (int m = 0; m < M; m++) wv[m] = V::template load_row<kFormat>(w[m], i + u * W);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
          const typename V::F xv = V::load(x[n]->f32 + i + u * W);
#pragma GCC unroll 2
          for (int m = 0; m < M; m++) acc[u][m][n] = V::fma(wv[m], xv, acc[u][m][n]);
        }
      }
    }
    for (; i < d; i += W) {
      for (int m = 0; m < M; m++) {
        const typename V::F wv = V::template load_tail<kFormat>(w[m], i, d - i);
        for (int n = 0; n < N; n++) acc[0][m][n] = V::fma(wv, V::load(x[n]->f32 + i), acc[0][m][n]);
      }
    }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) {
        typename V::F total = acc[0][m][n];
        for (int u = 1; u < U; u++) total = V::add(total, acc[u][m][n]);
        out[m * N + n] = V::sum(total);
      }
  }
};

// From a kernel K of fixed M and N to the run-time ones. K::kMaxN products fill the registers; rows beyond them take
// another pass, over weights that are in the first-level cache by then.
template <class K, int M>
void dot_rows_m(const uint8_t* const* w, const Input* const* x, int n, int d, float* out, const uint8_t* const* next) {
  if (M == 2 && n > K::kMaxN / 2) {
    for (int m = 0; m < 2; m++) dot_rows_m<K, 1>(w + m, x, n, d, out + m * n, next + m);
    return;
  }
  switch (n) {
    case 1: return K::template run<M, 1>(w, x, d, out, next);
    case 2: return K::template run<M, 2>(w, x, d, out, next);
    default: break;
  }
  if constexpr (M * 4 <= K::kMaxN) {
    if (n == 3) return K::template run<M, 3>(w, x, d, out, next);
    if (n == 4) return K::template run<M, 4>(w, x, d, out, next);
  }
  if constexpr (M * 8 <= K::kMaxN) {
    switch (n) {
      case 5: return K::template run<M, 5>(w, x, d, out, next);
      case 6: return K::template run<M, 6>(w, x, d, out, next);
      case 7: return K::template run<M, 7>(w, x, d, out, next);
      default: return K::template run<M, 8>(w, x, d, out, next);
    }
  }
  for (int r = 0; r < n && M == 1; r += K::kMaxN)
    dot_rows_m<K, M>(w, x + r, n - r < K::kMaxN ? n - r : K::kMaxN, d, out + r, next);
}

template <class K>
void dot_rows(const uint8_t* const* w, int m, const Input* const* x, int n, int d, float* out,
              const uint8_t* const* next) {
  if (m == 2)
    dot_rows_m<K, 2>(w, x, n, d, out, next);
  else
    dot_rows_m<K, 1>(w, x, n, d, out, next);
}

template <class V, int kFormat>
void axpy_rows(float* acc, const uint8_t* const* w, const float* z, int n, int, int begin, int end,
               const uint8_t* const* ahead, int n_ahead) {
  constexpr int W = V::kWidth, U = 4, kBytes = element_bytes<kFormat>();
  int c = begin;
  for (; c + U * W <= end; c += U * W) {
    typename V::F a[U];
    for (int u = 0; u < U; u++) a[u] = V::load(acc + c + u * W);
    if (c * kBytes % 64 == 0)
      for (int i = 0; i < n_ahead; i++)
        for (int b = 0; b < U * W * kBytes; b += 64) V::prefetch(ahead[i] + c * kBytes + b);
    for (int i = 0; i < n; i++) {
      const typename V::F zv = V::set1(z[i]);
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) a[u] = V::fma(V::template load_row<kFormat>(w[i], c + u * W), zv, a[u]);
    }
    for (int u = 0; u < U; u++) V::store(acc + c + u * W, a[u]);
  }
  for (; c < end; c += W) {  // acc is padded, the row is not
    typename V::F a = V::load(acc + c);
    for (int i = 0; i < n; i++) a = V::fma(V::template load_tail<kFormat>(w[i], c, end - c), V::set1(z[i]), a);
    V::store(acc + c, a);
  }
}

// The ones below are plain loops: the unit's compiler flags make vectors of them.

// e^x to a few units in the last place; a NaN stays one.
inline float exponential(float x) {
  x = x > 88.f ? 88.f : x;
  x = x < -87.f ? -87.f : x;
  const float n = __builtin_rintf(x * 1.44269504f);
  const float f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  const float p = ((((1.9875691500e-4f * f + 1.3981999507e-3f) * f + 8.3334519073e-3f) * f + 4.1665795894e-2f) * f +
                   1.6666665459e-1f) *
                      f +
                  5.0000001201e-1f;
  return (p * f * f + f + 1.f) * float_of((uint32_t)((int32_t)n + 127) << 23);
}

template <class Fn> inline void each_activation(const float* v, const float* by, float* out, int n, Fn f) {
  if (by) {
    for (int i = 0; i < n; i++) out[i] = f(v[i]) * by[i];
  } else {
    for (int i = 0; i < n; i++) out[i] = f(v[i]);
  }
}

void activate_all(int activation, const float* v, const float* by, float* out, int n) {
  switch (activation) {
    case 0: return each_activation(v, by, out, n, [](float x) { return x / (1.f + exponential(-x)); });
    case 1:
      return each_activation(v, by, out, n, [](float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); });
    case 2:  // (1 + tanh y) / 2 = 1 / (1 + exp(-2 y))
      return each_activation(v, by, out, n, [](float x) {
        return x / (1.f + exponential(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
      });
    case 3: return each_activation(v, by, out, n, [](float x) { return x < 0.f ? 0.f : x; });  // a NaN stays one
    default: return each_activation(v, by, out, n, [](float x) { return x < 0.f ? 0.f : x * x; });
  }
}

void reduce_parts(const float* part, int64_t stride, int parts, const float* bias, void* out, bool bf16, int count) {
  float block[64];
  for (int c = 0; c < count; c += 64) {
    const int n = count - c < 64 ? count - c : 64;
    for (int i = 0; i < n; i++) block[i] = part[c + i];
    for (int t = 1; t < parts; t++)
      for (int i = 0; i < n; i++) block[i] += part[t * stride + c + i];
    if (bias)
      for (int i = 0; i < n; i++) block[i] += bias[c + i];
    if (bf16) {
      uint16_t* y = (uint16_t*)out + c;
      for (int i = 0; i < n; i++) y[i] = float_to_bf16(block[i]);
    } else {
      memcpy((float*)out + c, block, sizeof(float) * (size_t)n);
    }
  }
}

void widen_bf16(const uint16_t* bf16, float* out, int count) {
  for (int i = 0; i < count; i++) out[i] = bf16_to_float(bf16[i]);
}

template <class V> float sum_floats(const float* data, int64_t count) {
  constexpr int W = V::kWidth, U = 8;
  typename V::F acc[U];
  for (int u = 0; u < U; u++) acc[u] = V::zero();
  int64_t i = 0;
  for (; i + U * W <= count; i += U * W)
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) acc[u] = V::add(acc[u], V::load(data + i + u * W));
  for (int u = 1; u < U; u++) acc[0] = V::add(acc[0], acc[u]);
  float total = V::sum(acc[0]);
  for (; i < count; i++) total += data[i];
  return total;
}
