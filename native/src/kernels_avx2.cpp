// AVX2 with FMA and F16C.
#include <immintrin.h>
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
    if constexpr (kFormat == 3)
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(row + i))));
  }
  template <int kFormat> static F load_tail(const uint8_t* row, int i, int count) {
    if (count >= 8) return load_row<kFormat>(row, i);
    constexpr int kBytes = kFormat == 0 ? 4 : kFormat == 3 ? 1 : 2;
    uint8_t copy[32] = {};
    memcpy(copy, row + (size_t)i * kBytes, (size_t)count * kBytes);
    return load_row<kFormat>(copy, 0);
  }
};

#include "kernels_generic.inl"

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

// The groups of 32 weights that two halves of a block's bytes hold: of 128 weights, bytes 0..31 hold groups 0 and 2,
// bytes 32..63 groups 1 and 3; of the 64 weights of a last odd block, bytes 0..31 hold groups 0 and 1.
inline __m256i low_nibbles(__m256i raw) { return _mm256_and_si256(raw, _mm256_set1_epi8(15)); }
inline __m256i high_nibbles(__m256i raw) { return low_nibbles(_mm256_srli_epi16(raw, 4)); }

inline __m256i load_bytes(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }

// Four (or two, the others zero) float16 scales from group g on.
inline __m128 load_scales(const uint8_t* row, int p, int g, int count) {
  const uint8_t* const at = row + p / 2 + 2 * g;
  if (count == 4) return _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)at));
  int32_t pair;
  memcpy(&pair, at, 4);
  return _mm_cvtph_ps(_mm_cvtsi32_si128(pair));
}

struct Int4Dot {
  static constexpr int kMaxN = 4;
  template <int M, int N>
  static void run(const uint8_t* const* w, const Input* const* x, int d, float* out, const uint8_t* const* next) {
    const int p = (int)round_up(d, 64);
    __m256 acc[M][N];
    __m128 offset[M][N];  // what the nibbles' offset of 8 has added, by group
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) acc[m][n] = V::zero(), offset[m][n] = _mm_setzero_ps();
    int i = 0;
    for (; i + 128 <= p; i += 128) {
#pragma GCC unroll 2
      for (int m = 0; m < M; m++) {
        V::prefetch(next[m] + i / 2);
        const __m256i first = load_bytes(w[m] + i / 2), second = load_bytes(w[m] + i / 2 + 32);
        const __m256i group[4] = {low_nibbles(first), low_nibbles(second), high_nibbles(first), high_nibbles(second)};
        const __m128 scales = load_scales(w[m], p, i / 32, 4);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) add_groups<4>(group, scales, *x[n], i, acc[m][n], offset[m][n]);
      }
    }
    if (i < p) {
      for (int m = 0; m < M; m++) {
        const __m256i raw = load_bytes(w[m] + i / 2);
        const __m256i group[2] = {low_nibbles(raw), high_nibbles(raw)};
        const __m128 scales = load_scales(w[m], p, i / 32, 2);
        for (int n = 0; n < N; n++) add_groups<2>(group, scales, *x[n], i, acc[m][n], offset[m][n]);
      }
    }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) out[m * N + n] = V::sum(acc[m][n]) - V::sum(_mm256_zextps128_ps256(offset[m][n]));
  }

 private:
  template <int kGroups>
  static void add_groups(const __m256i* group, __m128 scales, const Input& x, int i, __m256& acc, __m128& offset) {
    const int g = i / 32;  // inputs are padded, so four may be read
    offset = _mm_fmadd_ps(scales, _mm_loadu_ps(x.group_sum8 + g), offset);
    const __m128 products = _mm_mul_ps(scales, _mm_loadu_ps(x.group_scale + g));
    const __m256 both = _mm256_set_m128(products, products);
    const auto dot = [&](int k) { return _mm256_cvtepi32_ps(dot_bytes(group[k], load_bytes(x.q + i + 32 * k))); };
    acc = V::fma(dot(0), _mm256_permute_ps(both, 0x00), acc);
    acc = V::fma(dot(1), _mm256_permute_ps(both, 0x55), acc);
    if constexpr (kGroups == 4) {
      acc = V::fma(dot(2), _mm256_permute_ps(both, 0xaa), acc);
      acc = V::fma(dot(3), _mm256_permute_ps(both, 0xff), acc);
    }
  }
};

// Down rows of int4 in integers: the coefficients z[i] * scale of a block's groups, for up to kMaxTerms rows, are
// rounded to 15 bits of their largest, so that a pair of rows takes one multiply-add of 16-bit integers a column pair.
// The rounding, 2^-16 of the largest coefficient, is far below that of the 4-bit weights.
constexpr int kMaxTerms = 16;

struct Coefficients {
  alignas(16) int32_t pair[kMaxTerms / 2][4];  // rows 2i and 2i + 1 in the halves of 32 bits, for four groups
  __m128i sum;                                 // over the rows, by group
  float scale;
};

inline void make_coefficients(const uint8_t* const* w, const float* z, int n, int p, int g, int groups, float poison,
                              Coefficients& out) {
  __m128 a[kMaxTerms], top = _mm_setzero_ps();
  const __m128 no_sign = _mm_castsi128_ps(_mm_set1_epi32(0x7fffffff));
  for (int i = 0; i < n; i++) {
    a[i] = _mm_mul_ps(load_scales(w[i], p, g, groups), _mm_set1_ps(z[i]));
    top = _mm_max_ps(top, _mm_and_ps(a[i], no_sign));
  }
  if (n & 1) a[n] = _mm_setzero_ps();
  top = _mm_max_ps(top, _mm_movehl_ps(top, top));
  top = _mm_max_ss(top, _mm_shuffle_ps(top, top, 1));
  const float largest = _mm_cvtss_f32(top);
  const __m128 inverse = _mm_set1_ps(largest > 1e-30f ? 32767.f / largest : 0.f);
  out.scale = largest / 32767.f + poison;
  out.sum = _mm_setzero_si128();
  for (int i = 0; i < n; i += 2) {
    const __m128i even = _mm_cvtps_epi32(_mm_mul_ps(a[i], inverse)),
                  odd = _mm_cvtps_epi32(_mm_mul_ps(a[i + 1], inverse));
    out.sum = _mm_add_epi32(out.sum, _mm_add_epi32(even, odd));
    _mm_store_si128((__m128i*)out.pair[i / 2], _mm_blend_epi16(even, _mm_slli_epi32(odd, 16), 0xaa));
  }
}

// 64 columns: those whose nibbles are the low ones of 32 bytes at `at` (group `low`), and the high ones (group `high`).
template <int kLow, int kHigh>
inline void add_columns(const uint8_t* const* w, int n, int64_t at, const Coefficients& c, float* low, float* high) {
  const __m256i low_mask = _mm256_set1_epi16(0x000f), high_mask = _mm256_set1_epi16(0x00f0);
  // An accumulator for each of: low or high nibble, even or odd byte, first or second half of the unpacked pairs. High
  // nibbles stay in place and count 16 times. They start at minus the offset of 8 of every nibble.
  const __m256i start_low = _mm256_broadcastd_epi32(_mm_shuffle_epi32(_mm_slli_epi32(c.sum, 3), kLow * 0x55));
  const __m256i start_high = _mm256_broadcastd_epi32(_mm_shuffle_epi32(_mm_slli_epi32(c.sum, 7), kHigh * 0x55));
  const __m256i none = _mm256_setzero_si256();
  __m256i acc[2][4];
  for (int half = 0; half < 2; half++) {
    acc[half][0] = acc[half][1] = _mm256_sub_epi32(none, start_low);
    acc[half][2] = acc[half][3] = _mm256_sub_epi32(none, start_high);
  }
  for (int i = 0; i < n; i += 2) {
    const __m256i even = load_bytes(w[i] + at), odd = load_bytes(w[i + 1 < n ? i + 1 : i] + at);  // coefficient 0
    const __m256i a = _mm256_set1_epi32(c.pair[i / 2][kLow]), b = _mm256_set1_epi32(c.pair[i / 2][kHigh]);
    const __m256i both[2] = {_mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd)};
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const __m256i u = both[half], v = _mm256_srli_epi16(u, 8);
      acc[half][0] = _mm256_add_epi32(acc[half][0], _mm256_madd_epi16(_mm256_and_si256(u, low_mask), a));
      acc[half][1] = _mm256_add_epi32(acc[half][1], _mm256_madd_epi16(_mm256_and_si256(v, low_mask), a));
      acc[half][2] = _mm256_add_epi32(acc[half][2], _mm256_madd_epi16(_mm256_and_si256(u, high_mask), b));
      acc[half][3] = _mm256_add_epi32(acc[half][3], _mm256_madd_epi16(_mm256_and_si256(v, high_mask), b));
    }
  }
  const auto flush = [](const __m256i& even, const __m256i& odd, float* to, __m256 scale) {  // bytes 0..7 and 16..23
    const __m256i first = _mm256_unpacklo_epi32(even, odd), second = _mm256_unpackhi_epi32(even, odd);
    const __m256 left = _mm256_cvtepi32_ps(_mm256_permute2x128_si256(first, second, 0x20));
    const __m256 right = _mm256_cvtepi32_ps(_mm256_permute2x128_si256(first, second, 0x31));
    V::store(to, V::fma(left, scale, V::load(to)));
    V::store(to + 16, V::fma(right, scale, V::load(to + 16)));
  };
  const __m256 scale = V::set1(c.scale), sixteenth = V::set1(c.scale / 16.f);
  for (int half = 0; half < 2; half++) {
    flush(acc[half][0], acc[half][1], low + 8 * half, scale);
    flush(acc[half][2], acc[half][3], high + 8 * half, sixteenth);
  }
}

void axpy_int4(float* acc, const uint8_t* const* w, const float* z, int n, int d, int begin, int end,
               const uint8_t* const* ahead, int n_ahead) {
  const int p = (int)round_up(d, 64);
  const int stop = end < p ? (int)round_up(end, 64) : p;
  float poison = 0;  // NaN where a z is not finite, which integers cannot say
  for (int i = 0; i < n; i++) poison += z[i] * 0.f;
  Coefficients c;
  int at = begin;
  for (; at + 128 <= stop; at += 128) {
    for (int i = 0; i < n_ahead; i++) V::prefetch(ahead[i] + at / 2);
    make_coefficients(w, z, n, p, at / 32, 4, poison, c);
    add_columns<0, 2>(w, n, at / 2, c, acc + at, acc + at + 64);
    add_columns<1, 3>(w, n, at / 2 + 32, c, acc + at + 32, acc + at + 96);
  }
  if (at < stop) {
    make_coefficients(w, z, n, p, at / 32, 2, poison, c);
    add_columns<0, 1>(w, n, at / 2, c, acc + at, acc + at + 32);
  }
}

}  // namespace

const Kernels kAvx2 = {"avx2",
                       {dot_rows<FloatDot<V, 0>>, dot_rows<FloatDot<V, 1>>, dot_rows<FloatDot<V, 2>>, dot_rows<Int8Dot>,
                        dot_rows<Int4Dot>},
                       nullptr,
                       {axpy_rows<V, 0>, axpy_rows<V, 1>, axpy_rows<V, 2>, axpy_rows<V, 3>, axpy_int4},
                       quantise_row,
                       reduce_parts,
                       widen_bf16,
                       sum_floats<V>};

}  // namespace griffin
