// Plain loops that the compiler vectorises for the flags of the unit that includes this.
#include <string.h>

#include "griffin_native.h"
#include "half.h"
#include "unpack.h"

namespace griffin {
namespace {

inline void put(float value, float* out) { *out = value; }
inline void put(float value, uint16_t* out) { *out = finite_to_bf16(value); }  // weights are finite

template <class T>
void unpack_int8(const int8_t* row, float scale, int64_t count, T* out) {
  for (int64_t i = 0; i < count; i++) put(scale * static_cast<float>(row[i]), out + i);
}

// 32 weights of one scale, in the low or the high nibbles of 32 bytes.
template <int kShift, class T>
void unpack_group(const uint8_t* bytes, float scale, T* out) {
  for (int i = 0; i < 32; i++)
    put(scale * static_cast<float>(static_cast<int>((bytes[i] >> kShift) & 15) - 8), out + i);
}

template <class T>
void unpack_int4(const uint8_t* row, int64_t d, int64_t begin, int64_t end, T* out) {
  const int64_t p = (d + 63) / 64 * 64;
  const uint8_t* const scales = row + p / 2;
  for (int64_t c = begin; c < end; c += 32) {
    const int64_t block = c & ~int64_t{127}, half = p - block >= 128 ? 64 : 32, at = c - block;
    const uint8_t* const bytes = row + block / 2 + at % half;
    uint16_t bits;
    memcpy(&bits, scales + c / 32 * 2, 2);
    const float scale = half_to_float(bits);
    T group[32];
    T* const to = c + 32 <= end ? out + (c - begin) : group;
    if (at < half)
      unpack_group<0>(bytes, scale, to);
    else
      unpack_group<4>(bytes, scale, to);
    if (to == group) memcpy(out + (c - begin), group, static_cast<size_t>(end - c) * sizeof(T));
  }
}

template <class T>
void unpack(const Unpack& u, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const uint8_t* const row = u.rows + i * u.stride;
    T* const out = static_cast<T*>(u.out) + i * u.out_stride;
    if (u.format == GRIFFIN_INT4) {
      unpack_int4(row, u.d, u.begin, u.end, out);
    } else {
      float scale;
      memcpy(&scale, reinterpret_cast<const char*>(u.scale) + i * u.scale_stride, 4);
      unpack_int8(reinterpret_cast<const int8_t*>(row) + u.begin, scale, u.end - u.begin, out);
    }
  }
}

}  // namespace

void GRIFFIN_UNPACK(const Unpack& part, int64_t first, int64_t last) {
  if (part.bf16)
    unpack<uint16_t>(part, first, last);
  else
    unpack<float>(part, first, last);
}

}  // namespace griffin
