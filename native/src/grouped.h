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
constexpr int kBlock = 32;        // rows whose parts lie together
constexpr int kMaxPlanes = 4;

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

// A row has a part for each of its planes; scales and offsets are before the first plane, in its part. Rows lie in blocks
// of kBlock, part after part: the first parts of all of them, then all of their second parts, and so on. So reading the
// first planes of one row after the other is reading one run of bytes. (Were a row's parts neighbours, the hardware's
// prefetchers would fetch what is left out.) A matrix has whole blocks.

// Where a row's parts are. Behind those of its planes: the first again.
struct RowAt {
  const uint8_t* part[kMaxPlanes];
};

// Of rows of `whole` bytes, whose part i has the bytes part[i] .. part[i + 1].
inline RowAt row_at(const void* weight, int64_t row, int64_t whole, const int64_t* part, int planes) {
  const int64_t in = (int64_t)((uint64_t)row % kBlock);
  const uint8_t* const block = (const uint8_t*)weight + (row - in) * whole;
  RowAt found = {};
  for (int i = 0; i < kMaxPlanes; i++)
    found.part[i] = i < planes ? block + kBlock * part[i] + in * (part[i + 1] - part[i]) : found.part[0];
  return found;
}

// Rows of a matrix one after the other: those of a block are found from where its first one is.
class RowFinder {
 public:
  RowFinder(const void* weight, int64_t whole, const int64_t* part, int planes)
      : weight_(weight), whole_(whole), part_(part), planes_(planes) {
    for (int i = 0; i < kMaxPlanes; i++) size_[i] = i < planes ? part[i + 1] - part[i] : size_[0];
  }
  RowAt operator()(int64_t row) {
    const int64_t block = row / kBlock, in = row % kBlock;
    if (block != block_) first_ = row_at(weight_, block * kBlock, whole_, part_, planes_), block_ = block;
    RowAt found;
    for (int i = 0; i < kMaxPlanes; i++) found.part[i] = first_.part[i] + in * size_[i];
    return found;
  }

 private:
  const void* const weight_;
  const int64_t whole_;
  const int64_t* const part_;
  const int planes_;
  int64_t block_ = -1, size_[kMaxPlanes] = {};
  RowAt first_ = {};
};

// The parts of rows of `d` weights (padded to whole groups). Scales and offsets: bytes from the start of the first part.
//
// Chunks of 16 groups; a chunk's step t has the codes 4 t .. 4 t + 3 of every group, group after group. A byte of a
// plane of 2 bits has a step's codes in each of its four fields: vector v (of T / 4, T = group / 4 steps) has the steps
// v, v + T/4, v + 2 T/4, v + 3 T/4. A plane of 1 bit has a bit for every code of a step, in order, padded to bytes.
// The last chunk has as many groups as there are.
struct RowPlan {
  griffin_grouped format;
  int left;  // lowest bits of a code that are not read, and stand at their mean
  int d, groups, supers, spans;
  int64_t offset, sub, sub_offset;
  int64_t codes;                 // where the first plane begins in its part
  int64_t part[kMaxPlanes + 1];  // part i has the bytes part[i] .. part[i + 1] of a row's
  int planes;                    // that are read
  int64_t bytes, whole;          // of what is read of a row, of all of it

  RowAt at(const void* weight, int64_t row) const { return row_at(weight, row, whole, part, planes); }
  RowFinder finder(const void* weight) const { return {weight, whole, part, planes}; }
};

// Neuron-major: a row has one code for each of the D outputs, padded to 64. Chunks of 256 outputs (the last one may
// have 64, 128 or 192), n of them; a byte of a plane of 2 bits has four codes: byte 16 k + 4 i + e of the chunk's n/4
// bytes has in its field f the code of output f n/4 + i n/16 + 4 k + e, which is where the bytes of four rows are when
// they are interleaved. A plane of 1 bit has field f's bits one after the other, in the order of the bytes.
// Scales and offsets of a group of neurons are vectors of D, super-scales of a super-group first.
struct NeuronPlan {
  griffin_grouped format;
  int d, d_ff, groups, supers, spans;
  int planes;
  int64_t part[kMaxPlanes + 1], bytes;           // of a neuron's row, as a row's (RowPlan)
  int64_t offset, sub, sub_offset, scale_bytes;  // within the scales
  int64_t super_stride, sub_stride;              // from one super-group's (or span's) vector, or group's, to the next

  RowAt at(const void* weight, int64_t neuron) const { return row_at(weight, neuron, bytes, part, planes); }
  RowFinder finder(const void* weight) const { return {weight, bytes, part, planes}; }
};

RowPlan row_plan(const griffin_grouped& format, int64_t d_in);
// The first planes of such rows: format.bits and bytes are of what is read.
RowPlan first_planes(const RowPlan& plan, int planes);
NeuronPlan neuron_plan(const griffin_grouped& format, int64_t d_out, int64_t neurons);

}  // namespace griffin
