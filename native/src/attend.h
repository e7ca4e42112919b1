// Attention of one token over a part of the cache, for one instruction set.
#pragma once
#include <stdint.h>

namespace griffin {

// The query heads that share one key/value head, over `count` cached tokens.
struct Attend {
  const float* q;     // (heads, size), scaled
  const void *k, *v;  // (count, size), contiguous
  int heads, size, count;
  float softcap;  // 0: none
  float* scores;  // (heads, count), room to work in
  float* out;     // (heads, size): sum over tokens of exp(score - max) * v
  float* max;     // (heads,): the largest score
  float* sum;     // (heads,): sum of exp(score - max)
};

using AttendFn = void (*)(const Attend& part, bool bf16);

void attend_portable(const Attend& part, bool bf16);
#if defined(GRIFFIN_X86)
void attend_avx2(const Attend& part, bool bf16);
void attend_avx512(const Attend& part, bool bf16);
#endif

}  // namespace griffin
