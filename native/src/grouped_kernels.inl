// Products with weights in groups (grouped.h), written once over a vector type B; every instruction set's unit includes
// this inside its anonymous namespace. B provides integer vectors I of kBytes bytes and float vectors F of kBytes / 4.

// The four fields of the planes of 2 bits, put together.
template <class B, int kPairs> GRIFFIN_INLINE void fields_of(const typename B::I* plane, typename B::I* field) {
  using I = typename B::I;
  if constexpr (kPairs == 1) {
    const I low = B::set1(3);
    field[0] = B::both(plane[0], low), field[1] = B::both(B::template right<2>(plane[0]), low);
    field[2] = B::both(B::template right<4>(plane[0]), low), field[3] = B::both(B::template right<6>(plane[0]), low);
  } else {
    // nibbles of the two highest planes: fields 0 and 2 in `even`, 1 and 3 in `odd`
    const I even = B::template select<0xCC>(B::template left<2>(plane[0]), plane[1]);
    const I odd = B::template select<0xCC>(plane[0], B::template right<2>(plane[1]));
    if constexpr (kPairs == 2) {
      const I low = B::set1(15);
      field[0] = B::both(even, low), field[1] = B::both(odd, low);
      field[2] = B::both(B::template right<4>(even), low), field[3] = B::both(B::template right<4>(odd), low);
    } else if constexpr (kPairs == 3) {
      const I low = B::set1(63), z = plane[2];
      field[0] = B::both(B::template select<0xFC>(B::template left<2>(even), z), low);
      field[1] = B::both(B::template select<0xFC>(B::template left<2>(odd), B::template right<2>(z)), low);
      field[2] = B::both(B::template select<0xFC>(B::template right<2>(even), B::template right<4>(z)), low);
      field[3] = B::both(B::template select<0xFC>(B::template right<2>(odd), B::template right<6>(z)), low);
    } else {
      const I even2 = B::template select<0xCC>(B::template left<2>(plane[2]), plane[3]);
      const I odd2 = B::template select<0xCC>(plane[2], B::template right<2>(plane[3]));
      field[0] = B::template select<0xF0>(B::template left<4>(even), even2);
      field[1] = B::template select<0xF0>(B::template left<4>(odd), odd2);
      field[2] = B::template select<0xF0>(even, B::template right<4>(even2));
      field[3] = B::template select<0xF0>(odd, B::template right<4>(odd2));
    }
  }
}

// The codes of a chunk's T = group / 4 steps, from the planes at `at` (kBits): vectors of one part of the lanes.
// stride: bytes of a vector of this chunk, 4 for each of its groups. bits: bytes of a step of the plane of 1 bit.
template <class B, int kBits, int kSteps>
GRIFFIN_INLINE void unpack_steps(const uint8_t* const* at, int stride, int bits, int part, typename B::I* code) {
  constexpr int kVectors = kSteps / 4, kPairs = kBits / 2;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; v++) {
    typename B::I plane[4], field[4];
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; p++) plane[p] = B::load(at[p] + v * stride + part * B::kBytes);
    fields_of<B, kPairs>(plane, field);
#pragma GCC unroll 4
    for (int f = 0; f < 4; f++) {
      const int step = v + f * kVectors;
      if constexpr (kBits % 2)
        code[step] = B::twice_and_bit(field[f], at[kPairs] + step * bits + part * (B::kBytes / 8));
      else
        code[step] = field[f];
    }
  }
}

// Super-scales and super-offsets of a row as floats, and where they come from.
struct RowScales {
  float supers[kMaxSupers + 16], super_offsets[kMaxSupers + 16];  // not initialised: 4 kB a row would show
};

template <class B> inline void open_scales(const RowPlan& p, const uint8_t* row, RowScales& of) {
  if (!has_supers(p.format)) return;
  for (int i = 0; i < p.supers; i += B::kLanes) B::store(of.supers + i, B::halves((const uint16_t*)row + i));
  of.supers[p.supers] = 0;
  if (p.format.offset != GRIFFIN_OFFSET_SUB) return;
  for (int i = 0; i < p.supers; i += B::kLanes)
    B::store(of.super_offsets + i, B::halves((const uint16_t*)(row + p.offset) + i));
  of.super_offsets[p.supers] = 0;
}

// A value of each span for each of the groups from g on.
template <class B> GRIFFIN_APART typename B::F spread(typename B::F values, int each, int g) {
  float from[B::kLanes], to[B::kLanes];
  B::store(from, values);
  for (int i = 0; i < B::kLanes; i++) to[i] = from[(g % each + i) / each];
  return B::load_floats(to);
}

// s and m of codes whose lowest `left` bits are not read.
template <class B> GRIFFIN_INLINE void at_their_mean(int left, typename B::F* s, typename B::F* m) {
  const float step = (float)(1 << left);
  *m = B::minus_product(*m, *s, B::set1_float((step - 1) / 2)), *s = B::mul(*s, B::set1_float(step));
}

// s and m of the groups g .. g + kLanes, zero from `lanes` on.
template <class B, int kGroup>
GRIFFIN_INLINE void whole_scales_at(const RowPlan& p, const uint8_t* row, const RowScales& of, int g, int lanes,
                                    typename B::F* s, typename B::F* m) {
  const griffin_grouped& f = p.format;
  if (has_supers(f)) {
    constexpr int kEach = kSuper / kGroup;  // 8 or 16 groups
    const typename B::F super = B::template spread_supers<kEach>(of.supers, g);
    *s = B::mul(super, f.scale == GRIFFIN_SCALE_SUB_UNSIGNED ? B::unsigned_bytes(row + p.sub + g)
                                                             : B::signed_bytes((const int8_t*)row + p.sub + g));
    *m = f.offset == GRIFFIN_OFFSET_SUB
             ? B::mul(B::template spread_supers<kEach>(of.super_offsets, g), B::unsigned_bytes(row + p.sub_offset + g))
             : B::mul(*s, B::set1_float(f.zero));
    return;
  }
  const int each = f.span / kGroup, at = each == 1 ? g : g / each;
  *s = f.scale == GRIFFIN_SCALE_F32 ? B::load_floats((const float*)row + at) : B::halves((const uint16_t*)row + at);
  if (f.offset == GRIFFIN_OFFSET_F16)
    *m = B::minus_product(B::zero(), B::set1_float(1.f), B::halves((const uint16_t*)(row + p.offset) + at));
  else if (f.offset == GRIFFIN_OFFSET_CODE)
    *m = B::mul(*s, B::unsigned_bytes(row + p.offset + at));
  else
    *m = B::mul(*s, B::set1_float(f.zero));
  if (each > 1) *s = spread<B>(*s, each, g), *m = spread<B>(*m, each, g);
  if (lanes < B::kLanes) *s = B::first(*s, lanes), *m = B::first(*m, lanes);  // what lies behind may be no number
}

template <class B, int kGroup>
GRIFFIN_INLINE void scales_at(const RowPlan& p, const uint8_t* row, const RowScales& of, int g, int lanes,
                              typename B::F* s, typename B::F* m) {
  whole_scales_at<B, kGroup>(p, row, of, g, lanes, s, m);
  if (p.left) at_their_mean<B>(p.left, s, m);
}

// What a row that is wanted soon has for one chunk, and a line more of its first part, which has the scales. (A call: where
// it is inlined, the products take 1.3 times as long, measured with GCC 12.)
template <class B, int kGroup> GRIFFIN_APART void prefetch_step(RowAt& next) {
  for (int i = 0; i < kMaxPlanes && next.part[i]; i++)
    for (int line = 0; line < kGroup / 16 + (i == 0); line++, next.part[i] += 64) B::prefetch_far(next.part[i]);
}

// A row with N inputs. kHigh: with their high bytes only.
template <class B, int kBits, int kGroup, int N, bool kHigh>
void grouped_dot_of(const RowPlan& p, const RowAt& at_row, const GroupedInput* const* x, float* out,
                    const RowAt& next) {
  using I = typename B::I;
  using F = typename B::F;
  constexpr int kSteps = kGroup / 4, kParts = 64 / B::kBytes, kPlanes = (kBits + 1) / 2;
  const uint8_t *at[4], *const row = at_row.part[0];
  F acc[N];
  for (int i = 0; i < kPlanes; i++) at[i] = at_row.part[i] + (i ? 0 : p.codes);
  for (int n = 0; n < N; n++) acc[n] = B::zero();
  RowScales scales;
  open_scales<B>(p, row, scales);
  RowAt ahead = next;
  for (int g = 0; g < p.groups; g += kChunkGroups) {
    const int lanes = p.groups - g < kChunkGroups ? p.groups - g : kChunkGroups;
    prefetch_step<B, kGroup>(ahead);
    for (int part = 0; part < kParts; part++) {
      const int lane = g + part * B::kLanes;
      if (part * B::kLanes >= lanes) break;
      I code[kSteps];
      F scale, offset;
      unpack_steps<B, kBits, kSteps>(at, 4 * lanes, (lanes + 1) / 2, part, code);
      scales_at<B, kGroup>(p, row, scales, lane, lanes - part * B::kLanes, &scale, &offset);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        constexpr int kOf = kHigh && !B::kByteInputs ? 1 : 2;  // bytes of a value from one step to the next
        const uint8_t* const q =
            (const uint8_t*)(kHigh ? x[n]->high : x[n]->q) + kOf * (int64_t)g * kGroup + part * B::kBytes;
        if constexpr (kHigh) {
          I sum[2] = {B::none(), B::none()};
#pragma GCC unroll 8
          for (int t = 0; t < kSteps; t++) B::template add_dot<kBits>(sum[t % 2], code[t], B::load(q + kOf * 64 * t));
          const I total = B::add(B::template whole<kBits>(sum[0]), B::template whole<kBits>(sum[1]));
          const F x_scale = B::mul(B::load_floats(x[n]->scale + lane), B::set1_float(128.f));
          acc[n] = B::minus_product(acc[n], offset, B::load_floats(x[n]->high_sum + lane));
          acc[n] = B::fma(B::to_float(total), B::mul(scale, x_scale), acc[n]);
          continue;
        }
        // Two chains each, as a long one fills the scheduler with what waits for it.
        I first[2] = {B::none(), B::none()}, second[2] = {B::none(), B::none()};
#pragma GCC unroll 8
        for (int t = 0; t < kSteps; t++) {
          B::template add_x<kBits>(first[t % 2], B::first_operand(code[t]), B::load(q + 128 * t));
          B::template add_x<kBits>(second[t % 2], B::second_operand(code[t]), B::load(q + 128 * t + 64));
        }
        const I sum = B::add(B::after_first(B::add(first[0], first[1])), B::add(second[0], second[1]));
        acc[n] = B::minus_product(acc[n], offset, B::load_floats(x[n]->sum + lane));
        acc[n] = B::fma(B::to_float(sum), B::mul(scale, B::load_floats(x[n]->scale + lane)), acc[n]);
      }
    }
    for (int i = 0; i < kBits / 2; i++) at[i] += lanes * kGroup / 4;
    if (kBits % 2) at[kPlanes - 1] += (lanes + 1) / 2 * kSteps;
  }
  for (int n = 0; n < N; n++) out[n] = B::sum(acc[n]);
}

template <class B, int kBits, int kGroup, bool kHigh = false>
void grouped_dot(const RowPlan& p, const RowAt& row, const GroupedInput* const* x, int n, float* out,
                 const RowAt& next) {
  const RowAt none = {};
  for (int r = 0; r < n;) {
    const RowAt& ahead = r ? none : next;
    if (n - r >= 4)
      grouped_dot_of<B, kBits, kGroup, 4, kHigh>(p, row, x + r, out + r, ahead), r += 4;
    else if (n - r >= 2)
      grouped_dot_of<B, kBits, kGroup, 2, kHigh>(p, row, x + r, out + r, ahead), r += 2;
    else
      grouped_dot_of<B, kBits, kGroup, 1, kHigh>(p, row, x + r, out + r, ahead), r += 1;
  }
}

#include "grouped_down.inl"
#include "grouped_inputs.inl"
#include "grouped_many.inl"

template <class B> constexpr GroupedKernels grouped_kernels() {
  return {{{grouped_dot<B, 2, 16>, grouped_dot<B, 3, 16>, grouped_dot<B, 4, 16>, grouped_dot<B, 5, 16>,
            grouped_dot<B, 6, 16>, nullptr, grouped_dot<B, 8, 16>},
           {grouped_dot<B, 2, 32>, grouped_dot<B, 3, 32>, grouped_dot<B, 4, 32>, grouped_dot<B, 5, 32>,
            grouped_dot<B, 6, 32>, nullptr, grouped_dot<B, 8, 32>}},
          {{grouped_dot<B, 2, 16, true>, nullptr, grouped_dot<B, 4, 16, true>, nullptr, grouped_dot<B, 6, 16, true>},
           {grouped_dot<B, 2, 32, true>, nullptr, grouped_dot<B, 4, 32, true>, nullptr, grouped_dot<B, 6, 32, true>}},
          {grouped_down<B, 2>, grouped_down<B, 3>, grouped_down<B, 4>, grouped_down<B, 5>, grouped_down<B, 6>, nullptr,
           grouped_down<B, 8>},
          {grouped_down_many<B, 2>, grouped_down_many<B, 3>, grouped_down_many<B, 4>, grouped_down_many<B, 5>,
           grouped_down_many<B, 6>, nullptr, grouped_down_many<B, 8>},
          {{grouped_rows<B, 2, 16>, grouped_rows<B, 3, 16>, grouped_rows<B, 4, 16>, grouped_rows<B, 5, 16>,
            grouped_rows<B, 6, 16>, nullptr, grouped_rows<B, 8, 16>},
           {grouped_rows<B, 2, 32>, grouped_rows<B, 3, 32>, grouped_rows<B, 4, 32>, grouped_rows<B, 5, 32>,
            grouped_rows<B, 6, 32>, nullptr, grouped_rows<B, 8, 32>}},
          B::kTile,
          !B::kByteInputs,
          grouped_quantise<B>};
}
