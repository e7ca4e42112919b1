#include "grouped.h"

namespace griffin {

RowPlan row_plan(const griffin_grouped& f, int64_t d_in) {
  RowPlan p = {};
  p.format = f;
  p.d = static_cast<int>(up_to(d_in, f.group)), p.groups = p.d / f.group;
  p.supers = (p.d + kSuper - 1) / kSuper, p.spans = (p.d + f.span - 1) / f.span;
  int64_t at = 0;
  if (has_supers(f)) {
    at += 2 * p.supers, p.offset = at;
    if (f.offset == GRIFFIN_OFFSET_SUB) at += 2 * p.supers;
    p.sub = at, at += p.groups, p.sub_offset = at;
    if (f.offset == GRIFFIN_OFFSET_SUB) at += p.groups;
  } else {
    at += (f.scale == GRIFFIN_SCALE_F32 ? 4 : 2) * p.spans, p.offset = at;
    if (f.offset == GRIFFIN_OFFSET_F16) at += 2 * p.spans;
    if (f.offset == GRIFFIN_OFFSET_CODE) at += p.spans;
  }
  at = p.codes = up_to(at, 64);
  p.planes = plane_count(f.bits);
  for (int i = 0; i < p.planes; i++) {
    if (2 * i + 1 < f.bits) {
      at += p.d / 4;
    } else {
      const int last = p.groups % kChunkGroups;
      at += (p.groups / kChunkGroups * (kChunkGroups / 2) + (last + 1) / 2) * (f.group / 4);
    }
    p.part[i + 1] = at = up_to(at, 16);
  }
  p.bytes = p.whole = at;
  return p;
}

RowPlan first_planes(const RowPlan& plan, int planes) {
  RowPlan p = plan;
  const int bits = bits_of_planes(plan.format.bits, planes);
  if (bits == plan.format.bits) return p;
  p.left = plan.format.bits - bits, p.format.bits = static_cast<uint8_t>(bits);
  p.planes = planes, p.bytes = plan.part[planes];
  return p;
}

NeuronPlan neuron_plan(const griffin_grouped& f, int64_t d_out, int64_t neurons) {
  NeuronPlan p = {};
  p.format = f;
  p.d = static_cast<int>(up_to(d_out, 64)), p.d_ff = static_cast<int>(neurons);
  p.groups = static_cast<int>((neurons + f.group - 1) / f.group);
  p.supers = static_cast<int>((neurons + kSuper - 1) / kSuper);
  p.spans = static_cast<int>((neurons + f.span - 1) / f.span);
  p.planes = plane_count(f.bits);
  for (int i = 0; i < p.planes; i++)
    p.part[i + 1] = p.part[i] + (2 * i + 1 < f.bits ? p.d / 4 : p.d / 8), p.bytes = p.part[i + 1];
  if (has_supers(f)) {
    const int vectors = f.offset == GRIFFIN_OFFSET_SUB ? 2 : 1;
    p.super_stride = 2 * p.d * vectors, p.offset = 2 * p.d;
    p.sub = p.super_stride * p.supers, p.sub_stride = p.d * vectors, p.sub_offset = p.d;
    p.scale_bytes = p.sub + p.sub_stride * p.groups;
  } else {
    const int scale = f.scale == GRIFFIN_SCALE_F32 ? 4 : 2;
    p.offset = scale * p.d, p.sub_stride = p.d;
    p.super_stride = p.d * (scale + (f.offset == GRIFFIN_OFFSET_F16 ? 2 : f.offset == GRIFFIN_OFFSET_CODE ? 1 : 0));
    p.scale_bytes = p.super_stride * p.spans;
  }
  return p;
}

}  // namespace griffin
