// AVX2 with FMA and F16C.
#include <immintrin.h>
#include <string.h>

#include "rows.h"

namespace griffin {
namespace {

struct V {
  using F = __m256;
  static constexpr int kWidth = 8, kMaxN = 4;
  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

  template <int kFormat> static F load_row(const uint8_t* row, int i) {
    if constexpr (kFormat == 0) return _mm256_loadu_ps((const float*)row + i);
    if constexpr (kFormat == 1) {
      const __m128i half = _mm_loadu_si128((const __m128i*)((const uint16_t*)row + i));
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    if constexpr (kFormat == 2) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)((const uint16_t*)row + i)));
    if constexpr (kFormat == 3) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(row + i))));
  }
  template <int kFormat> static F load_tail(const uint8_t* row, int i, int count) {
    if (count >= 8) return load_row<kFormat>(row, i);
    constexpr int kBytes = kFormat == 0 ? 4 : kFormat == 3 ? 1 : 2;
    uint8_t copy[32] = {};
    memcpy(copy, row + (size_t)i * kBytes, (size_t)count * kBytes);
    return load_row<kFormat>(copy, 0);
  }
};

#include "rows_generic.inl"

inline __m256i dot_bytes(__m256i a, __m256i b) {  // unsigned a, signed b; sums of two products must fit int16
  return _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1));
}

struct Int8Dot {
  static constexpr int kMaxN = 4;
  template <int M, int N>
  static void run(const uint8_t* const* w, const Input* const* x, int d, float* out, const uint8_t* const* next) {
    __m256 acc[M][N];
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) acc[m][n] = V::zero();
    for (int i = 0; i < d; i += 32) {
      __m256i wv[M];
      for (int m = 0; m < M; m++) {
        if (i % 64 == 0) V::prefetch(next[m] + i);
        if (d - i >= 32) {
          wv[m] = _mm256_loadu_si256((const __m256i*)(w[m] + i));
        } else {
          uint8_t copy[32] = {};
          memcpy(copy, w[m] + i, (size_t)(d - i));
          wv[m] = _mm256_loadu_si256((const __m256i*)copy);
        }
      }
      for (int n = 0; n < N; n++) {
        const __m256i q = _mm256_loadu_si256((const __m256i*)(x[n]->q + i));
        const __m256 scale = V::load(x[n]->lane_scale + i / 4);
        for (int m = 0; m < M; m++) {
          const __m256i s = dot_bytes(_mm256_abs_epi8(wv[m]), _mm256_sign_epi8(q, wv[m]));
          acc[m][n] = V::fma(_mm256_cvtepi32_ps(s), scale, acc[m][n]);
        }
      }
    }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) out[m * N + n] = V::sum(acc[m][n]);
  }
};

// 32 weights as bytes 0..15 from the 128-block (or last 64-block) that holds weight i, a multiple of 32.
inline __m256i nibbles(const uint8_t* row, int i, int p) {
  const int block = i & ~127, half = p - block >= 128 ? 64 : 32, at = i - block;
  const uint8_t* bytes = row + block / 2 + (at & (half - 1));
  const __m256i raw = _mm256_loadu_si256((const __m256i*)bytes);
  return _mm256_and_si256(at >= half ? _mm256_srli_epi16(raw, 4) : raw, _mm256_set1_epi8(15));
}

inline float half_scale(const uint8_t* row, int i, int p) { return _cvtsh_ss(((const uint16_t*)(row + p / 2))[i / 32]); }

struct Int4Dot {
  static constexpr int kMaxN = 4;
  template <int M, int N>
  static void run(const uint8_t* const* w, const Input* const* x, int d, float* out, const uint8_t* const* next) {
    const int p = (int)round_up(d, 64);
    __m256 acc[M][N];
    float offset[M][N] = {};
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) acc[m][n] = V::zero();
    for (int i = 0; i < p; i += 32) {
      __m256i wv[M];
      float scale[M];
      for (int m = 0; m < M; m++) {
        if (i % 128 == 0) V::prefetch(next[m] + i / 2);
        wv[m] = nibbles(w[m], i, p);
        scale[m] = half_scale(w[m], i, p);
      }
      for (int n = 0; n < N; n++) {
        const __m256i q = _mm256_loadu_si256((const __m256i*)(x[n]->q + i));
        const __m256 lanes = V::load(x[n]->lane_scale + i / 4);
        for (int m = 0; m < M; m++) {
          const __m256 s = _mm256_mul_ps(V::set1(scale[m]), lanes);
          acc[m][n] = V::fma(_mm256_cvtepi32_ps(dot_bytes(wv[m], q)), s, acc[m][n]);
          offset[m][n] += scale[m] * x[n]->group_sum8[i / 32];
        }
      }
    }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) out[m * N + n] = V::sum(acc[m][n]) - offset[m][n];
  }
};

void axpy_int4(float* acc, const uint8_t* const* w, const float* z, int n, int d, int begin, int end,
               const uint8_t* const* ahead, int n_ahead) {
  const int p = (int)round_up(d, 64);
  const int stop = end < p ? (int)round_up(end, 64) : p;
  for (int c = begin; c < stop; c += 32) {
    if (c % 128 == 0)
      for (int i = 0; i < n_ahead; i++) V::prefetch(ahead[i] + c / 2);
    __m256 a[4];
    for (int j = 0; j < 4; j++) a[j] = V::load(acc + c + 8 * j);
    for (int i = 0; i < n; i++) {
      const __m256i u = _mm256_sub_epi8(nibbles(w[i], c, p), _mm256_set1_epi8(8));
      const __m256 s = V::set1(z[i] * half_scale(w[i], c, p));
      const __m128i low = _mm256_castsi256_si128(u), high = _mm256_extracti128_si256(u, 1);
      const __m128i part[4] = {low, _mm_srli_si128(low, 8), high, _mm_srli_si128(high, 8)};
      for (int j = 0; j < 4; j++) a[j] = V::fma(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(part[j])), s, a[j]);
    }
    for (int j = 0; j < 4; j++) V::store(acc + c + 8 * j, a[j]);
  }
}

}  // namespace

const Kernels kAvx2 = {
    "avx2",
    {dot_rows<FloatDot<V, 0>>, dot_rows<FloatDot<V, 1>>, dot_rows<FloatDot<V, 2>>, dot_rows<Int8Dot>, dot_rows<Int4Dot>},
    nullptr,
    {axpy_rows<V, 0>, axpy_rows<V, 1>, axpy_rows<V, 2>, axpy_rows<V, 3>, axpy_int4},
    quantise_row, reduce_parts, widen_bf16, sum_floats<V>};

}  // namespace griffin
