// What one instruction set provides for weights in groups.
#pragma once
#include "grouped.h"

namespace griffin {

// The largest integer that inputs are quantised to: 128 high + low, high and low of 8 bits. With 8 bits alone the KL
// divergence to the exact model is 0.003 to 0.006 (135M, 270M), with these 0.00002.
constexpr float kWide = 127.f * 128.f;

// A row of input in integers, in groups of the weights' size: x = scale * (128 high + low). Padded to whole chunks with
// zeros.
struct GroupedInput {
  const int8_t* q;     // in the order of the steps (grouped.h): chunk, step, high or low, group, 4 values
  const float* scale;  // one a group
  const float* sum;    // scale * sum of the integers, one a group
};

// out[r] = <row, x[r]>, r < n. `next`: a row that will be wanted soon (prefetched only).
using GroupedDotFn = void (*)(const RowPlan&, const uint8_t* row, const GroupedInput* const* x, int n, float* out,
                              const uint8_t* next);
// Neurons of one group, four rows and their z in one int32 a quad: z = factor * its int8 (which alone keeps the KL
// divergence to the exact model at 0.001 and less); total: the int8's sum.
struct GroupOfNeurons {
  const uint8_t* scales;
  int group, quads, total;
  const uint8_t* const* rows;
  const int32_t* z;
  float factor;
  const uint8_t* const* ahead;  // rows that are wanted next: prefetched meanwhile, evenly and in order
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
