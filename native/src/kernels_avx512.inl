// AVX-512 F/BW/DQ/VL, with or without VNNI (GRIFFIN_VNNI): included by one unit for each.
#include <immintrin.h>
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
    if constexpr (kFormat == 3)
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(row + i))));
  }
  template <int kFormat> static F load_tail(const uint8_t* row, int i, int count) {
    const __mmask16 mask = count >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << count) - 1);
    if constexpr (kFormat == 0) return _mm512_maskz_loadu_ps(mask, (const float*)row + i);
    if constexpr (kFormat == 1) return widen(_mm256_maskz_loadu_epi16(mask, (const uint16_t*)row + i));
    if constexpr (kFormat == 2) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t*)row + i));
    if constexpr (kFormat == 3) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, row + i)));
  }
};

#include "kernels_generic.inl"

// Sums of four products of bytes in each int32 lane: unsigned a, signed b.
inline __m512i dot_bytes(__m512i a, __m512i b) {
#if defined(GRIFFIN_VNNI)
  return _mm512_dpbusd_epi32(_mm512_setzero_si512(), a, b);
#else
  return _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1));
#endif
}

struct Int8Dot {
  static constexpr int kMaxN = 8;
  template <int M, int N>
  static void run(const uint8_t* const* w, const Input* const* x, int d, float* out, const uint8_t* const* next) {
    __m512 acc[M][N];
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) acc[m][n] = _mm512_setzero_ps();
    for (int i = 0; i < d; i += 64) {
      const __mmask64 mask = d - i >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (d - i)) - 1;
      __m512i wv[M];
#pragma GCC unroll 2
      for (int m = 0; m < M; m++) {
        V::prefetch(next[m] + i);
        wv[m] = d - i >= 64 ? _mm512_loadu_si512(w[m] + i) : _mm512_maskz_loadu_epi8(mask, w[m] + i);
      }
#if defined(GRIFFIN_VNNI)
      // dpbusd wants one unsigned operand: w + 128. What the offset adds depends on x alone: Input::sum128.
      for (int m = 0; m < M; m++) wv[m] = _mm512_xor_si512(wv[m], _mm512_set1_epi8((char)0x80));
#else
      // |w| and x with the sign of w: an offset would overflow the int16 sums of maddubs.
      __mmask64 negative[M];
      for (int m = 0; m < M; m++) {
        negative[m] = _mm512_movepi8_mask(wv[m]);
        wv[m] = _mm512_abs_epi8(wv[m]);
      }
#endif
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
        const __m512i q = _mm512_loadu_si512(x[n]->q + i);
        const __m512 scale = _mm512_loadu_ps(x[n]->lane_scale + i / 4);
#pragma GCC unroll 2
        for (int m = 0; m < M; m++) {
#if defined(GRIFFIN_VNNI)
          const __m512i s = dot_bytes(wv[m], q);
#else
          const __m512i s = dot_bytes(wv[m], _mm512_mask_sub_epi8(q, negative[m], _mm512_setzero_si512(), q));
#endif
          acc[m][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s), scale, acc[m][n]);
        }
      }
    }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) {
        out[m * N + n] = V::sum(acc[m][n]);
#if defined(GRIFFIN_VNNI)
        out[m * N + n] -= x[n]->sum128;
#endif
      }
  }
};

// Integer dot products of 64 int4 weights (bytes 0..15) with x at column i, into acc; s: their scales, a lane each.
template <int M, int N>
inline void int4_step(const __m512i (&wv)[M], const __m512 (&s)[M], const Input* const* x, int i, __m512 (&acc)[M][N]) {
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) {
    const __m512i q = _mm512_loadu_si512(x[n]->q + i);
    const __m512 lanes = _mm512_loadu_ps(x[n]->lane_scale + i / 4);
#pragma GCC unroll 2
    for (int m = 0; m < M; m++)
      acc[m][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot_bytes(wv[m], q)), _mm512_mul_ps(s[m], lanes), acc[m][n]);
  }
}

struct Int4Dot {
  static constexpr int kMaxN = 8;
  template <int M, int N>
  static void run(const uint8_t* const* w, const Input* const* x, int d, float* out, const uint8_t* const* next) {
    const int p = (int)round_up(d, 64);
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i first = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    __m512 acc[M][N];
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) acc[m][n] = _mm512_setzero_ps();
    for (int i = 0; i < p; i += 512) {  // 512 weights have 16 scales
      const int count = p - i < 512 ? p - i : 512;
      __m512 scale[M];
#pragma GCC unroll 2
      for (int m = 0; m < M; m++) {
        const uint16_t* scales = (const uint16_t*)(w[m] + p / 2) + i / 32;
        scale[m] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << (count / 32)) - 1), scales));
        for (int n = 0; n < N; n++)  // the nibbles are 8 too large
          acc[m][n] = _mm512_fnmadd_ps(scale[m], _mm512_loadu_ps(x[n]->group_sum8 + i / 32), acc[m][n]);
        V::prefetch(next[m] + p / 2 + i / 16);
      }
      int j = 0;
#pragma GCC unroll 4
      for (; j + 128 <= count; j += 128) {
        __m512i bytes[M], wv[M];
        __m512 s[M];
        const __m512i pick = _mm512_add_epi32(first, _mm512_set1_epi32(j / 32));
#pragma GCC unroll 2
        for (int m = 0; m < M; m++) {
          V::prefetch(next[m] + (i + j) / 2);
          bytes[m] = _mm512_loadu_si512(w[m] + (i + j) / 2);
          wv[m] = _mm512_and_si512(bytes[m], low);
          s[m] = _mm512_permutexvar_ps(pick, scale[m]);
        }
        int4_step<M, N>(wv, s, x, i + j, acc);
#pragma GCC unroll 2
        for (int m = 0; m < M; m++) {
          wv[m] = _mm512_and_si512(_mm512_srli_epi16(bytes[m], 4), low);
          s[m] = _mm512_permutexvar_ps(_mm512_add_epi32(pick, _mm512_set1_epi32(2)), scale[m]);
        }
        int4_step<M, N>(wv, s, x, i + j + 64, acc);
      }
      if (j < count) {  // the last block of an odd multiple of 64
        __m512i wv[M];
        __m512 s[M];
        for (int m = 0; m < M; m++) {
          const __m256i bytes = _mm256_loadu_si256((const __m256i*)(w[m] + (i + j) / 2));
          const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
          wv[m] = _mm512_and_si512(both, low);
          s[m] = _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(j / 32)), scale[m]);
        }
        int4_step<M, N>(wv, s, x, i + j, acc);
      }
    }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) out[m * N + n] = V::sum(acc[m][n]);
  }
};

// One block of 32 * G columns, G = 4 or 2 groups, half of them in low nibbles. A permutation looks at an index's low
// four bits only, so a table of -8..7 turns a byte's low nibble into a float, whatever its high nibble is.
template <int G> inline void axpy_int4_block(float* a, const uint8_t* const* w, const float* z, int n, int c, int p) {
  const __m512 table = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
  __m512 v[2 * G];
#pragma GCC unroll 8
  for (int j = 0; j < 2 * G; j++) v[j] = V::load(a + 16 * j);
  for (int i = 0; i < n; i++) {
    const __m128i raw = _mm_maskz_loadu_epi16((__mmask8)((1 << G) - 1), w[i] + p / 2 + c / 16);
    const __m512 scales = _mm512_castps128_ps512(_mm_mul_ps(_mm_cvtph_ps(raw), _mm_set1_ps(z[i])));
    __m512 s[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) s[g] = _mm512_permutexvar_ps(_mm512_set1_epi32(g), scales);
#pragma GCC unroll 4
    for (int j = 0; j < G; j++) {
      const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(w[i] + c / 2 + 16 * j)));
      v[j] = V::fma(_mm512_permutexvar_ps(bytes, table), s[j / 2], v[j]);
      v[j + G] = V::fma(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table), s[(j + G) / 2], v[j + G]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < 2 * G; j++) V::store(a + 16 * j, v[j]);
}

void axpy_int4(float* acc, const uint8_t* const* w, const float* z, int n, int d, int begin, int end,
               const uint8_t* const* ahead, int n_ahead) {
  const int p = (int)round_up(d, 64);
  for (int c = begin; c < end; c += 128) {
    for (int i = 0; i < n_ahead; i++) V::prefetch(ahead[i] + c / 2);
    if (c % 1024 == 0)
      for (int i = 0; i < n_ahead; i++) V::prefetch(ahead[i] + p / 2 + c / 16);
    if (p - c >= 128)
      axpy_int4_block<4>(acc + c, w, z, n, c, p);
    else
      axpy_int4_block<2>(acc + c, w, z, n, c, p);
  }
}

#define GRIFFIN_AVX512_KERNELS(NAME)                                                                 \
  {NAME,                                                                                             \
   {dot_rows<FloatDot<V, 0>>, dot_rows<FloatDot<V, 1>>, dot_rows<FloatDot<V, 2>>, dot_rows<Int8Dot>, \
    dot_rows<Int4Dot>},                                                                              \
   nullptr,                                                                                          \
   {axpy_rows<V, 0>, axpy_rows<V, 1>, axpy_rows<V, 2>, axpy_rows<V, 3>, axpy_int4},                  \
   quantise_row,                                                                                     \
   reduce_parts,                                                                                     \
   widen_bf16,                                                                                       \
   sum_floats<V>}

}  // namespace
