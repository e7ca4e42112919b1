// Weights of any format as numbers, for one instruction set.
#pragma once
#include <stdint.h>

#include "griffin_native.h"

namespace griffin {

struct Unpack {
  const griffin_matrix* matrix;
  const int64_t* rows;  // which, or null: all from `first` on
  int64_t first;
  int64_t begin, end;  // columns; begin is a multiple of 256 in a neuron-major matrix, else 0
  void* out;           // bf16 or float32
  int64_t out_stride;  // values from one row to the next
  bool bf16;
};

using UnpackFn = void (*)(const Unpack& part, int64_t from, int64_t to);  // of the wanted rows

void unpack_portable(const Unpack& part, int64_t from, int64_t to);
#if defined(GRIFFIN_X86)
void unpack_avx2(const Unpack& part, int64_t from, int64_t to);
void unpack_avx512(const Unpack& part, int64_t from, int64_t to);
#endif

// A row as float32, whole or of a neuron-major matrix the columns begin..end (begin a multiple of 256).
void unpack_row(const griffin_matrix& matrix, int64_t row, float* out);
void unpack_row(const griffin_matrix& matrix, int64_t row, int64_t begin, int64_t end, float* out);

}  // namespace griffin
