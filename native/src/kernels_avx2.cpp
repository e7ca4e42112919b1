// AVX2 with FMA and F16C.
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "half.h"
#include "kernels.h"

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
  }
  template <int kFormat> static F load_tail(const uint8_t* row, int i, int count) {
    if (count >= 8) return load_row<kFormat>(row, i);
    constexpr int kBytes = kFormat == 0 ? 4 : 2;
    uint8_t copy[32] = {};
    memcpy(copy, row + (size_t)i * kBytes, (size_t)count * kBytes);
    return load_row<kFormat>(copy, 0);
  }
};

#include "kernels_generic.inl"

}  // namespace

const Kernels kAvx2 = {"avx2",        {dot_rows<FloatDot<V, 0>>, dot_rows<FloatDot<V, 1>>, dot_rows<FloatDot<V, 2>>},
                       nullptr,       {axpy_rows<V, 0>, axpy_rows<V, 1>, axpy_rows<V, 2>},
                       reduce_parts,  widen_bf16,
                       sum_floats<V>, activate_all,
                       &kGroupedAvx2};

}  // namespace griffin
