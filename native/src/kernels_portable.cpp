// Any machine: eight floats in an array, which compilers turn into whatever vectors the target has (NEON, SSE2).
#include <string.h>

#include "half.h"
#include "kernels.h"

namespace griffin {
namespace {

struct V {
  struct F {
    float v[8];
  };
  static constexpr int kWidth = 8, kMaxN = 4;
  static F set1(float value) {
    F r;
    for (int i = 0; i < 8; i++) r.v[i] = value;
    return r;
  }
  static F zero() { return set1(0); }
  static F load(const float* p) {
    F r;
    memcpy(&r, p, sizeof r);
    return r;
  }
  static void store(float* p, F a) { memcpy(p, &a, sizeof a); }
  static F fma(F a, F b, F c) {
    for (int i = 0; i < 8; i++) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static F add(F a, F b) {
    for (int i = 0; i < 8; i++) a.v[i] += b.v[i];
    return a;
  }
  static float sum(F a) { return ((a.v[0] + a.v[1]) + (a.v[2] + a.v[3])) + ((a.v[4] + a.v[5]) + (a.v[6] + a.v[7])); }
  static void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

  template <int kFormat> static F load_tail(const uint8_t* row, int i, int count) {
    F r = zero();
    if (count > 8) count = 8;
    if constexpr (kFormat == 0) {
      memcpy(&r, row + (size_t)i * 4, (size_t)count * 4);
    } else if constexpr (kFormat == 3) {
      for (int j = 0; j < count; j++) r.v[j] = (float)(int8_t)row[i + j];
    } else {
      uint16_t raw[8] = {};
      memcpy(raw, row + (size_t)i * 2, (size_t)count * 2);
      for (int j = 0; j < 8; j++) r.v[j] = kFormat == 1 ? bf16_to_float(raw[j]) : half_to_float(raw[j]);
    }
    return r;
  }
  template <int kFormat> static F load_row(const uint8_t* row, int i) { return load_tail<kFormat>(row, i, 8); }
};

#include "kernels_generic.inl"

inline float half_scale(const uint8_t* row, int i, int p) {
  uint16_t half;
  memcpy(&half, row + p / 2 + i / 32 * 2, 2);
  return half_to_float(half);
}

// 32 weights, -8..7, from the 128-block (or last 64-block) that holds weight i, a multiple of 32.
inline void nibbles(const uint8_t* row, int i, int p, int8_t* out) {
  const int block = i & ~127, half = p - block >= 128 ? 64 : 32, at = i - block, shift = at >= half ? 4 : 0;
  const uint8_t* bytes = row + block / 2 + (at & (half - 1));
  for (int j = 0; j < 32; j++) out[j] = (int8_t)(((bytes[j] >> shift) & 15) - 8);
}

inline int32_t dot_group(const int8_t* a, const int8_t* b) {
  int32_t s = 0;
  for (int j = 0; j < kGroup; j++) s += (int16_t)a[j] * (int16_t)b[j];
  return s;
}

template <bool kInt4> struct IntDot {
  static constexpr int kMaxN = 4;
  template <int M, int N>
  static void run(const uint8_t* const* w, const Input* const* x, int d, float* out, const uint8_t* const*) {
    const int p = (int)round_up(d, 64);
    for (int m = 0; m < M; m++) {
      float acc[N] = {};
      for (int i = 0; i < d; i += kGroup) {
        int8_t wv[kGroup] = {};
        float scale = 1;
        if constexpr (kInt4) {
          nibbles(w[m], i, p, wv);
          scale = half_scale(w[m], i, p);
        } else {
          memcpy(wv, w[m] + i, (size_t)(d - i < kGroup ? d - i : kGroup));
        }
        for (int n = 0; n < N; n++) acc[n] += scale * x[n]->lane_scale[i / 4] * (float)dot_group(wv, x[n]->q + i);
      }
      for (int n = 0; n < N; n++) out[m * N + n] = acc[n];
    }
  }
};

void axpy_int4(float* acc, const uint8_t* const* w, const float* z, int n, int d, int begin, int end,
               const uint8_t* const*, int) {
  const int p = (int)round_up(d, 64);
  for (int c = begin; c < end; c += kGroup)
    for (int i = 0; i < n; i++) {
      int8_t wv[kGroup];
      nibbles(w[i], c, p, wv);
      const float s = z[i] * half_scale(w[i], c, p);
      for (int j = 0; j < kGroup; j++) acc[c + j] += s * (float)wv[j];
    }
}

}  // namespace

const Kernels kPortable = {"portable",
                           {dot_rows<FloatDot<V, 0>>, dot_rows<FloatDot<V, 1>>, dot_rows<FloatDot<V, 2>>,
                            dot_rows<IntDot<false>>, dot_rows<IntDot<true>>},
                           nullptr,
                           {axpy_rows<V, 0>, axpy_rows<V, 1>, axpy_rows<V, 2>, axpy_rows<V, 3>, axpy_int4},
                           quantise_row,
                           reduce_parts,
                           widen_bf16,
                           sum_floats<V>};

}  // namespace griffin
