// Dequantised blocks of int8 and int4 rows, for one instruction set.
#pragma once
#include <stdint.h>

namespace griffin {

struct Unpack {
  int format;  // GRIFFIN_INT8 or GRIFFIN_INT4
  const uint8_t* rows;
  int64_t d, stride;   // length of a row, bytes from one to the next
  const float* scale;  // int8 only
  int64_t scale_stride;
  int64_t begin, end;  // columns; begin is a multiple of 128
  void* out;           // bf16 or float32
  int64_t out_stride;  // values from one row to the next
  bool bf16;
};

using UnpackFn = void (*)(const Unpack& part, int64_t first, int64_t last);  // rows first..last

void unpack_portable(const Unpack& part, int64_t first, int64_t last);
#if defined(GRIFFIN_X86)
void unpack_avx2(const Unpack& part, int64_t first, int64_t last);
void unpack_avx512(const Unpack& part, int64_t first, int64_t last);
#endif

}  // namespace griffin
