// Plain loops that the compiler vectorises for the flags of the unit that includes this (-fopenmp-simd for the sums).
#include <math.h>
#include <string.h>

#include <type_traits>

#include "attend.h"
#include "half.h"

namespace griffin {
namespace {

constexpr int kMaxSize = 512, kTokens = 4;

// exp(x) for x <= 0 to 2 units in the last place: 2^n times a polynomial on |f| <= ln 2 / 2, in steps that vectorise.
inline float exponential(float x) {
  x = x < -87.f ? -87.f : x;
  const float n = floorf(x * 1.44269504f + 0.5f);
  const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.f;
  return p * float_of(static_cast<uint32_t>((static_cast<int32_t>(n) + 127) << 23));
}

// Tokens t .. t + kTokens of k or v as float32, where they are or, of another type, in `room`; beyond the last one the
// first again. Returns how many there are.
template <class T>
int widen_rows(const T* data, int t, int count, int size, float (*room)[kMaxSize], const float** rows) {
  const int n = count - t < kTokens ? count - t : kTokens;
  for (int j = 0; j < kTokens; j++) {
    const T* const from = data + static_cast<int64_t>(t + (j < n ? j : 0)) * size;
    if constexpr (std::is_same_v<T, float>) {
      rows[j] = from;
    } else {
      for (int i = 0; i < size; i++) room[j][i] = bf16_to_float(from[i]);
      rows[j] = room[j];
    }
  }
  return n;
}

template <class T>
void attend(const Attend& a) {
  const T* const k = static_cast<const T*>(a.k);
  const T* const v = static_cast<const T*>(a.v);
  const int size = a.size, count = a.count;
  float room[kTokens][kMaxSize];  // several tokens at a time: their sums do not wait for each other
  const float* rows[kTokens];
  for (int t = 0; t < count; t += kTokens) {
    const int n = widen_rows(k, t, count, size, room, rows);
    for (int h = 0; h < a.heads; h++) {
      const float *const q = a.q + h * size, *const r0 = rows[0], *const r1 = rows[1], *const r2 = rows[2],
                         *const r3 = rows[3];
      float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int i = 0; i < size; i++) {
        s0 += q[i] * r0[i];
        s1 += q[i] * r1[i];
        s2 += q[i] * r2[i];
        s3 += q[i] * r3[i];
      }
      const float sums[kTokens] = {s0, s1, s2, s3};
      memcpy(a.scores + static_cast<int64_t>(h) * count + t, sums, sizeof(float) * n);
    }
  }
  for (int h = 0; h < a.heads; h++) {
    float* const s = a.scores + static_cast<int64_t>(h) * count;
    if (a.softcap > 0)
      for (int t = 0; t < count; t++) s[t] = a.softcap * tanhf(s[t] / a.softcap);
    float max = -INFINITY, sum = 0;
#pragma omp simd reduction(max : max)
    for (int t = 0; t < count; t++) max = s[t] > max ? s[t] : max;
#pragma omp simd reduction(+ : sum)
    for (int t = 0; t < count; t++) {
      s[t] = exponential(s[t] - max);
      sum += s[t];
    }
    a.max[h] = max;
    a.sum[h] = sum;
  }
  memset(a.out, 0, sizeof(float) * a.heads * size);
  for (int t = 0; t < count; t += kTokens) {  // and a visit of `out` serves them all
    const int n = widen_rows(v, t, count, size, room, rows);
    for (int h = 0; h < a.heads; h++) {
      const float* const s = a.scores + static_cast<int64_t>(h) * count + t;
      const float p0 = s[0], p1 = n > 1 ? s[1] : 0.f, p2 = n > 2 ? s[2] : 0.f, p3 = n > 3 ? s[3] : 0.f;
      const float *const r0 = rows[0], *const r1 = rows[1], *const r2 = rows[2], *const r3 = rows[3];
      float* const out = a.out + h * size;
#pragma omp simd
      for (int i = 0; i < size; i++) out[i] += (p0 * r0[i] + p1 * r1[i]) + (p2 * r2[i] + p3 * r3[i]);
    }
  }
}

}  // namespace

void GRIFFIN_ATTEND(const Attend& part, bool bf16) {
  if (bf16)
    attend<uint16_t>(part);
  else
    attend<float>(part);
}

}  // namespace griffin
