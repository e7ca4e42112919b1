// float16 and bfloat16 to float32 and back, in plain C.
#pragma once
#include <stdint.h>
#include <string.h>

namespace griffin {
namespace {

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float bf16_to_float(uint16_t value) { return float_of((uint32_t)value << 16); }

// To nearest, ties to even. `finite_to_bf16` may make an infinity of a NaN.
inline uint16_t finite_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  return (bits & 0x7fffffffu) > 0x7f800000u ? (uint16_t)(bits >> 16 | 0x40u) : finite_to_bf16(value);
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    bits = sign | 0x7f800000u | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x400u) {
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {  // subnormal: magnitude * 2^-24, exact in float32
    bits = sign | bits_of((float)magnitude * 5.9604644775390625e-8f);
  }
  return float_of(bits);
}

inline uint16_t float_to_half(float value) {  // to nearest, ties to even
  uint32_t bits = bits_of(value);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // rounds to 65536 or more
  if (bits < 0x38800000u) {  // below 2^-14: a multiple of 2^-24. Adding 0.5 makes the float unit round there.
    return (uint16_t)(sign | (bits_of(float_of(bits) + 0.5f) - 0x3f000000u));
  }
  return (uint16_t)(sign | ((bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13));
}

}  // namespace
}  // namespace griffin
