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
// Neurons of one group, four rows and their int8 z in one int32 a quad: z = factor * its int8, z_sum = factor * their sum.
struct GroupOfNeurons {
  const uint8_t* scales;
  int group, quads;
  const uint8_t* const* rows;
  const int32_t* z;
  float factor, z_sum;
  const uint8_t* const* ahead;  // rows that are wanted next: prefetched
  int n_ahead;
};

// y += sum over the neurons of z * their rows, for outputs begin .. end (multiples of 256, or the padded D).
using GroupedDownFn = void (*)(const NeuronPlan&, const GroupOfNeurons&, int begin, int end, float* y);

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
