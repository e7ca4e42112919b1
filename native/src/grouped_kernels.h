// What one instruction set provides for weights in groups.
#pragma once
#include "grouped.h"

namespace griffin {

// A row of input as int8 in groups of the weights' size: x = scale * q. Padded to whole chunks with zeros.
struct GroupedInput {
  const int8_t* q;     // in the order of the steps (grouped.h): chunk, step, group, 4 values
  const float* scale;  // one a group
  const float* sum;    // scale * sum of q, one a group
};

// out[r] = <row, x[r]>, r < n. `next`: a row that will be wanted soon (prefetched only).
using GroupedDotFn = void (*)(const RowPlan&, const uint8_t* row, const GroupedInput* const* x, int n, float* out,
                              const uint8_t* next);
// y += sum over the neurons of a group of z * their rows, with z = factor * its int8: four rows and their int8 z in one
// int32 a quad, z_sum = factor * their sum. Meanwhile the rows of `ahead` are prefetched.
using GroupedDownFn = void (*)(const NeuronPlan&, const uint8_t* scales, int group, const uint8_t* const* rows,
                               const int32_t* z, int quads, float factor, float z_sum, float* y,
                               const uint8_t* const* ahead, int n_ahead);

struct GroupedKernels {
  GroupedDotFn dot[2][7];  // [group == 32][bits - 2]
  GroupedDownFn down[7];   // [bits - 2]
  void (*quantise)(const float* x, int d, int group, int8_t* q, float* scale, float* sum);
};

extern const GroupedKernels kGroupedPortable;
#if defined(GRIFFIN_X86)
extern const GroupedKernels kGroupedAvx2, kGroupedAvx512, kGroupedAvx512Vnni;
#endif

}  // namespace griffin
