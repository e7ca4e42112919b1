// AVX-512 F/BW/DQ/VL.
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "half.h"
#include "kernels.h"

namespace griffin {
namespace {

struct V {
  using F = __m512;
  static constexpr int kWidth = 16, kMaxN = 8;
  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static float sum(F v) { return _mm512_reduce_add_ps(v); }
  static void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

  static F widen(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }
  template <int kFormat> static F load_row(const uint8_t* row, int i) {
    if constexpr (kFormat == 0) return _mm512_loadu_ps((const float*)row + i);
    if constexpr (kFormat == 1) return widen(_mm256_loadu_si256((const __m256i*)((const uint16_t*)row + i)));
    if constexpr (kFormat == 2) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)((const uint16_t*)row + i)));
  }
  template <int kFormat> static F load_tail(const uint8_t* row, int i, int count) {
    const __mmask16 mask = count >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << count) - 1);
    if constexpr (kFormat == 0) return _mm512_maskz_loadu_ps(mask, (const float*)row + i);
    if constexpr (kFormat == 1) return widen(_mm256_maskz_loadu_epi16(mask, (const uint16_t*)row + i));
    if constexpr (kFormat == 2) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t*)row + i));
  }
};

#include "kernels_generic.inl"

}  // namespace

const Kernels kAvx512 = {"avx512",       {dot_rows<FloatDot<V, 0>>, dot_rows<FloatDot<V, 1>>, dot_rows<FloatDot<V, 2>>},
                         nullptr,        {axpy_rows<V, 0>, axpy_rows<V, 1>, axpy_rows<V, 2>},
                         reduce_parts,   widen_bf16,
                         sum_floats<V>,  activate_all,
                         &kGroupedAvx512};

}  // namespace griffin
