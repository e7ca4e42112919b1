// Weights in groups: a code of 2 to 8 bits a weight, and for every group of 16 or 32 weights a scale s and an offset m:
// weight = s * code - m. Where the codes, scales and offsets of a row lie. C headers only, as the kernels include it.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "griffin_native.h"

namespace griffin {
namespace {

constexpr int kChunkGroups = 16;  // groups of a chunk: one for each int32 lane of a 64-byte vector
constexpr int kSuper = 256;       // weights that share a super-scale
constexpr int kMaxSupers = 512;   // of a row
constexpr int kFieldBlock = 16;   // bytes of a neuron-major field that are unpacked together

inline int64_t up_to(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

inline bool has_supers(const griffin_grouped& f) {
  return f.scale == GRIFFIN_SCALE_SUB_UNSIGNED || f.scale == GRIFFIN_SCALE_SUB_SIGNED;
}
inline int bits_of_planes(int bits, int planes) { return 2 * planes < bits ? 2 * planes : bits; }
inline int plane_count(int bits) { return (bits + 1) / 2; }  // of 2 bits, the highest first; an odd bit is the last

inline bool valid_grouped(const griffin_grouped& f) {
  const bool bits = f.bits == 2 || f.bits == 3 || f.bits == 4 || f.bits == 5 || f.bits == 6 || f.bits == 8;
  if (!bits || (f.group != 16 && f.group != 32) || f.scale > GRIFFIN_SCALE_F32 || f.offset > GRIFFIN_OFFSET_CODE)
    return false;
  if ((f.offset == GRIFFIN_OFFSET_SUB) > has_supers(f)) return false;
  if (f.span < f.group || f.span > kSuper || (f.span & (f.span - 1))) return false;
  return !has_supers(f) || f.offset == GRIFFIN_OFFSET_NONE || f.offset == GRIFFIN_OFFSET_SUB;
}

}  // namespace

// Offsets in bytes from the start of a row of `d` weights (padded to whole groups): scales and offsets, then planes.
//
// Chunks of 16 groups; a chunk's step t has the codes 4 t .. 4 t + 3 of every group, group after group. A byte of a
// plane of 2 bits has a step's codes in each of its four fields: vector v (of T / 4, T = group / 4 steps) has the steps
// v, v + T/4, v + 2 T/4, v + 3 T/4. A plane of 1 bit has a bit for every code of a step, in order, padded to bytes.
// The last chunk has as many groups as there are.
struct RowPlan {
  griffin_grouped format;
  int left;  // lowest bits of a code that are not read, and stand at their mean
  int d, groups, supers, spans;
  int64_t offset, sub, sub_offset, plane[4], bytes;
};

// Neuron-major: a row has one code for each of the D outputs, padded to 64. Chunks of 256 outputs (the last one may
// have 64, 128 or 192), n of them; a byte of a plane of 2 bits has four codes: byte 16 k + 4 i + e of the chunk's n/4
// bytes has in its field f the code of output f n/4 + i n/16 + 4 k + e, which is where the bytes of four rows are when
// they are interleaved. A plane of 1 bit has field f's bits one after the other, in the order of the bytes.
// Scales and offsets of a group of neurons are vectors of D, super-scales of a super-group first.
struct NeuronPlan {
  griffin_grouped format;
  int d, d_ff, groups, supers, spans;
  int64_t plane[4], bytes;                       // of a neuron's row
  int64_t offset, sub, sub_offset, scale_bytes;  // within the scales
  int64_t super_stride, sub_stride;              // from one super-group's (or span's) vector, or group's, to the next
};

RowPlan row_plan(const griffin_grouped& format, int64_t d_in);
// The first `planes` planes of such rows: format.bits and bytes are of what is read.
RowPlan first_planes(const RowPlan& plan, int planes);
NeuronPlan neuron_plan(const griffin_grouped& format, int64_t d_out, int64_t neurons);

}  // namespace griffin
