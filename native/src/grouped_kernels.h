// What one instruction set provides for weights in groups.
#pragma once
#include "grouped.h"

// Parts of a kernel, which compilers stop inlining where a unit has many of them.
#if defined(__GNUC__)
#define GRIFFIN_INLINE inline __attribute__((always_inline))
#define GRIFFIN_APART __attribute__((noinline))
#else
#define GRIFFIN_INLINE inline
#define GRIFFIN_APART
#endif

// A prefetch that is kept: GCC takes a function that does nothing else for one without effects, and drops its calls.
#if defined(__GNUC__)
#define GRIFFIN_PREFETCH(instruction, p, hint) __asm__ volatile(instruction " %0" : : "m"(*(const char*)(p)))
#else
#define GRIFFIN_PREFETCH(instruction, p, hint) _mm_prefetch((const char*)(p), hint)
#endif

namespace griffin {

// The largest integer that inputs are quantised to: 128 high + low, high and low of 8 bits. With 8 bits alone the KL
// divergence to the exact model is 0.003 to 0.006 (135M, 270M), with these 0.00002.
constexpr float kWide = 127.f * 128.f;

// A row of input in integers, in groups of the weights' size: x = scale * (128 high + low). Padded to whole chunks with
// zeros.
struct GroupedInput {
  const int8_t* q;     // in the order of the steps (grouped.h): chunk, step, half (quantise_groups), group, 4 bytes
  const float* scale;  // one a group
  const float* sum;    // scale * sum of the integers, one a group
  // Only the high bytes, which are enough where a weight's lowest bits are not read either: apart where q has pairs of
  // 16 bits (a step is 64 bytes), in q where that has bytes (a step is 128). And 128 scale * their sum.
  const int8_t* high;
  const float* high_sum;
};

// out[r * stride + i] = <row[i], x[r]>, i < m, r < n. Behind the m rows are so many that will be wanted `next` (prefetched
// only).
using GroupedDotFn = void (*)(const RowPlan&, const RowAt* row, int m, int next, const GroupedInput* const* x, int n,
                              float* out, int64_t stride);

// Neurons that will be wanted next, of one group: plane i of row j at rows[i * stride + j].
struct Upcoming {
  const uint8_t* const* rows;
  int stride, count, group;
};

// Neurons of one group, four rows and their z in one int32 a quad: z = factor * its int8 (which alone keeps the KL
// divergence to the exact model at 0.001 and less); total: the int8's sum. Planes of a row that are not read are zeros
// somewhere else, and rest has what they add at their mean, to the sum of the int8 times the codes.
struct GroupOfNeurons {
  const uint8_t* scales;
  int group, quads, total;
  float rest;
  const uint8_t* const* rows;  // plane i of row j at rows[i * stride + j]
  int stride;
  const int32_t* z;
  float factor;
  Upcoming next;  // prefetched meanwhile, evenly
};

// y += sum over the neurons of z * their rows, for outputs begin .. end (multiples of 256, or the padded D).
using GroupedDownFn = void (*)(const NeuronPlan&, const GroupOfNeurons&, int begin, int end, float* y);

// Groups of neurons one after the other, so many quads of each: group g's rows from 4 * quads * g on.
struct GroupsOfNeurons {
  const uint8_t* scales;
  int group, count, quads;  // the first, and how many
  const uint8_t* const* rows;
  int stride;
  Upcoming next;  // as a group's
};

constexpr int kGroupQuads = 8;  // int32 of a group's z

// z of many rows of input for these groups: row r's quads for group g at z + r * z_stride + g * kGroupQuads (zero where a
// neuron is not), its total and factor at r * stride + g, its y at y + r * y_stride.
struct ManyZ {
  int rows;
  const int32_t* z;
  int64_t z_stride;
  const int32_t* total;
  const float* factor;
  int64_t stride;
  float* y;
  int64_t y_stride;
};

// As GroupedDownFn, group after group, for many rows: the codes are unpacked once.
using GroupedDownManyFn = void (*)(const NeuronPlan&, const GroupsOfNeurons&, int begin, int end, const ManyZ&);

constexpr int kRowsAhead = 8;  // from a row to the one that is prefetched meanwhile

constexpr int kManyInputs = 32;  // that a block of weight rows meets at most

// out[r * stride + i] = <row[i], x[r]> for i < m <= tile, r < n <= kManyInputs: to the bit what GroupedDotFn gives.
// `next`: so many rows, at most a tile, that will be wanted soon.
using GroupedRowsFn = void (*)(const RowPlan&, const RowAt* row, int m, const GroupedInput* const* x, int n, float* out,
                               int64_t stride, const RowAt* next, int n_next);

struct GroupedKernels {
  GroupedDotFn dot[2][7];        // [group == 32][bits - 2]
  GroupedDotFn dot_first[2][5];  // of rows read to their first planes
  GroupedDownFn down[7];         // [bits - 2]
  GroupedDownManyFn down_many[7];
  GroupedRowsFn rows[2][7];  // [group == 32][bits - 2]
  int tile;                  // weight rows that `rows` takes at once
  bool high_apart;           // GroupedInput::high is not in q
  void (*quantise)(const float* x, int d, int group, const GroupedInput& to);
};

extern const GroupedKernels kGroupedPortable;
#if defined(GRIFFIN_X86)
extern const GroupedKernels kGroupedAvx2, kGroupedAvx512, kGroupedAvx512Vnni;
#endif

}  // namespace griffin
