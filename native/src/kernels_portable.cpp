// Any machine: eight floats in an array, which compilers turn into whatever vectors the target has (NEON, SSE2).
#include <math.h>
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

}  // namespace

const Kernels kPortable = {
    "portable",       {dot_rows<FloatDot<V, 0>>, dot_rows<FloatDot<V, 1>>, dot_rows<FloatDot<V, 2>>},
    nullptr,          {axpy_rows<V, 0>, axpy_rows<V, 1>, axpy_rows<V, 2>},
    reduce_parts,     widen_bf16,
    sum_floats<V>,    activate_all,
    &kGroupedPortable};

}  // namespace griffin
