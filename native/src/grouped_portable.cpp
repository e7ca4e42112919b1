// Vectors of 16 bytes in plain C++, which the compiler turns into what the machine has.
#include <string.h>

#include "grouped_kernels.h"
#include "half.h"

namespace griffin {
namespace {

struct Portable {
  struct I {
    uint8_t at[16];
    int32_t word(int i) const {
      int32_t w;
      memcpy(&w, at + 4 * i, 4);
      return w;
    }
    void set(int i, int32_t w) { memcpy(at + 4 * i, &w, 4); }
  };
  struct F {
    float at[4];
  };
  static constexpr int kBytes = 16, kLanes = 4, kTile = 2;
  template <class Fn> static I each(Fn f) {
    I out;
    for (int i = 0; i < 16; i++) out.at[i] = (uint8_t)f(i);
    return out;
  }
  template <class Fn> static F floats(Fn f) {
    F out;
    for (int i = 0; i < 4; i++) out.at[i] = f(i);
    return out;
  }
  static I load(const uint8_t* p) {
    I out;
    memcpy(out.at, p, 16);
    return out;
  }
  static I once(const I& v) { return v; }
  static I none() { return I{}; }
  static I set1(uint8_t v) {
    return each([=](int) { return v; });
  }
  static I set1_int(int32_t v) {
    I out;
    for (int i = 0; i < 4; i++) out.set(i, v);
    return out;
  }
  static I both(I a, I b) {
    return each([&](int i) { return a.at[i] & b.at[i]; });
  }
  template <int n> static I left(I v) {
    return each([&](int i) { return v.at[i] << n; });
  }
  template <int n> static I right(I v) {
    return each([&](int i) { return v.at[i] >> n; });
  }
  template <int mask> static I select(I a, I b) {
    return each([&](int i) { return (a.at[i] & mask) | (b.at[i] & ~mask); });
  }
  static I twice_and_bit(I code, const uint8_t* bits) {
    return each([&](int i) { return 2 * code.at[i] + (bits[i / 8] >> i % 8 & 1); });
  }
  template <int bits> static I dot(I acc, I codes, I q) {
    I out;
    for (int i = 0; i < 4; i++) {
      int32_t sum = acc.word(i);
      for (int j = 0; j < 4; j++) sum += codes.at[4 * i + j] * (int8_t)q.at[4 * i + j];
      out.set(i, sum);
    }
    return out;
  }
  template <int bits> static I whole(I acc) { return acc; }  // sums of up to 8 `dot`
  template <int n> static I left32(I v) {
    I out;
    for (int i = 0; i < 4; i++) out.set(i, (int32_t)((uint32_t)v.word(i) << n));
    return out;
  }
  static I add8(I a, I b) {
    return each([&](int i) { return a.at[i] + b.at[i]; });
  }
  static I subtract(I a, I b) {
    I out;
    for (int i = 0; i < 4; i++) out.set(i, a.word(i) - b.word(i));
    return out;
  }
  static I add(I a, I b) {
    I out;
    for (int i = 0; i < 4; i++) out.set(i, a.word(i) + b.word(i));
    return out;
  }
  // Inputs of two bytes, 128 high + low: the products of the high ones first, then shifted.
  static constexpr bool kByteInputs = true;
  static constexpr int kOperands = 1;
  static I first_operand(I codes) { return codes; }
  static I second_operand(I codes) { return codes; }
  template <int bits> static I dot_x(I acc, I operand, I x) { return dot<bits>(acc, operand, x); }
  template <int bits> static void add_dot(I& acc, I codes, I q) { acc = dot<bits>(acc, codes, q); }
  template <int bits> static void add_x(I& acc, I operand, I x) { acc = dot_x<bits>(acc, operand, x); }
  static I after_first(I high) { return left32<7>(high); }
  static I low8(I a, I b) {
    return each([&](int i) { return (i % 2 ? b : a).at[i / 2]; });
  }
  static I high8(I a, I b) {
    return each([&](int i) { return (i % 2 ? b : a).at[8 + i / 2]; });
  }
  static I low16(I a, I b) {
    return each([&](int i) { return (i / 2 % 2 ? b : a).at[i / 4 * 2 + i % 2]; });
  }
  static I high16(I a, I b) {
    return each([&](int i) { return (i / 2 % 2 ? b : a).at[8 + i / 4 * 2 + i % 2]; });
  }
  static void store_int(int32_t* p, I v) { memcpy(p, v.at, 16); }
  static F zero() { return F{}; }
  static F set1_float(float v) {
    return floats([=](int) { return v; });
  }
  static F load_floats(const float* p) {
    return floats([=](int i) { return p[i]; });
  }
  static void store(float* p, F v) { memcpy(p, v.at, 16); }
  static F to_float(I v) {
    return floats([&](int i) { return (float)v.word(i); });
  }
  static F mul(F a, F b) {
    return floats([&](int i) { return a.at[i] * b.at[i]; });
  }
  static F fma(F a, F b, F c) {
    return floats([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
  }
  static F minus_product(F c, F a, F b) {
    return floats([&](int i) { return c.at[i] - a.at[i] * b.at[i]; });
  }
  static float sum(F v) { return (v.at[0] + v.at[2]) + (v.at[1] + v.at[3]); }
  static void sum_each(const F* v, int n, float* out) {
    for (int i = 0; i < n; i++) out[i] = sum(v[i]);
  }
  static F halves(const uint16_t* p) {
    return floats([=](int i) { return half_to_float(p[i]); });
  }
  static F unsigned_bytes(const uint8_t* p) {
    return floats([=](int i) { return (float)p[i]; });
  }
  static F signed_bytes(const int8_t* p) {
    return floats([=](int i) { return (float)p[i]; });
  }
  template <int kEach> static F supers(const uint8_t* halves, int g, int) {
    uint16_t own;
    memcpy(&own, halves + 2 * (g / kEach), 2);
    return set1_float(half_to_float(own));
  }
  static F first(F v, int n) {
    return floats([&](int i) { return i < n ? v.at[i] : 0.f; });
  }
  static void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
  static void prefetch_far(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }
};

#include "grouped_kernels.inl"

}  // namespace

const GroupedKernels kGroupedPortable = grouped_kernels<Portable>();

}  // namespace griffin
