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

// The codes of four of a chunk's T = group / 4 steps (v, v + T/4, ...), from the planes at `at` (kBits): vectors of one
// part of the lanes. stride: bytes of a vector of this chunk, 4 for each of its groups. bits: bytes of a step of the plane
// of 1 bit.
template <class B, int kBits, int kSteps>
GRIFFIN_INLINE void unpack_vector(const uint8_t* const* at, int stride, int bits, int part, int v,
                                  typename B::I* code) {
  constexpr int kPairs = kBits / 2;
  typename B::I plane[4];
#pragma GCC unroll 4
  for (int p = 0; p < kPairs; p++) plane[p] = B::once(B::load(at[p] + v * stride + part * B::kBytes));
  fields_of<B, kPairs>(plane, code);
  if constexpr (kBits % 2)
#pragma GCC unroll 4
    for (int f = 0; f < 4; f++)
      code[f] = B::twice_and_bit(code[f], at[kPairs] + (v + f * (kSteps / 4)) * bits + part * (B::kBytes / 8));
}

// All steps of a chunk.
template <class B, int kBits, int kSteps>
GRIFFIN_INLINE void unpack_steps(const uint8_t* const* at, int stride, int bits, int part, typename B::I* code) {
  constexpr int kVectors = kSteps / 4;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; v++) {
    typename B::I own[4];
    unpack_vector<B, kBits, kSteps>(at, stride, bits, part, v, own);
#pragma GCC unroll 4
    for (int f = 0; f < 4; f++) code[v + f * kVectors] = own[f];
  }
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
GRIFFIN_INLINE void scales_at(const RowPlan& p, const uint8_t* row, int g, int lanes, typename B::F* s,
                              typename B::F* m) {
  const griffin_grouped& f = p.format;
  if (has_supers(f)) {
    constexpr int kEach = kSuper / kGroup;  // 8 or 16 groups
    const typename B::F super = B::template supers<kEach>(row, g, lanes);
    *s = B::mul(super, f.scale == GRIFFIN_SCALE_SUB_UNSIGNED ? B::unsigned_bytes(row + p.sub + g)
                                                             : B::signed_bytes((const int8_t*)row + p.sub + g));
    *m = f.offset == GRIFFIN_OFFSET_SUB
             ? B::mul(B::template supers<kEach>(row + p.offset, g, lanes), B::unsigned_bytes(row + p.sub_offset + g))
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

// What is fetched meanwhile of a row that is wanted soon, for the chunk at `at` of its planes: into the second-level cache,
// a line or two at each of a chunk's steps. Evenly spread lines come faster than a chunk's together, and either comes
// faster than into the first level.
template <class B, int kPlanes, int kGroup>
GRIFFIN_INLINE void prefetch_at(const RowPlan& p, const RowAt& next, int64_t at, int step) {
  constexpr int kEach = kGroup / 16, kLines = kPlanes * kEach + 1, kSteps = kGroup / 4;
#pragma GCC unroll 10
  for (int line = 0; line < kLines; line++) {
    if (line * kSteps / kLines != step) continue;
    if (line == kLines - 1)
      B::prefetch_far(next.part[0] + at / kEach);  // scales: a line a chunk is enough of most formats
    else
      B::prefetch_far(next.part[line / kEach] + (line < kEach ? p.codes : 0) + at + 64 * (line % kEach));
  }
}

// The sums of a row with N inputs, before the lanes are added. kHigh: of the row's first planes, with the inputs' high
// bytes only. `next`: a row that is prefetched.
template <class B, int kBits, int kGroup, int N, bool kHigh>
void grouped_dot_of(const RowPlan& p, const RowAt& row, const GroupedInput* const* x, typename B::F* out,
                    const RowAt& next) {
  using I = typename B::I;
  using F = typename B::F;
  constexpr int kSteps = kGroup / 4, kVectors = kSteps / 4, kParts = 64 / B::kBytes, kPlanes = (kBits + 1) / 2;
  constexpr int kOf = kHigh && !B::kByteInputs ? 1 : 2;  // bytes of a value from one step to the next
  constexpr int kAhead = kHigh ? kMaxPlanes : kPlanes;   // planes of the row that comes next, which may have more
  const uint8_t* at[4];
  F acc[N];
  for (int i = 0; i < kPlanes; i++) at[i] = row.part[i] + (i ? 0 : p.codes);
#pragma GCC unroll 4
  for (int n = 0; n < N; n++) acc[n] = B::zero();
  for (int g = 0; g < p.groups; g += kChunkGroups) {
    const int lanes = p.groups - g < kChunkGroups ? p.groups - g : kChunkGroups;
    for (int part = 0; part < kParts; part++) {
      const int lane = g + part * B::kLanes;
      if (part * B::kLanes >= lanes) break;
      // The products with x's high bytes and with its low ones, or with its even values and its odd ones; two sums each,
      // as a long chain fills the scheduler with what waits for it.
      I first[N][2], second[N][2];
#pragma GCC unroll 4
      for (int n = 0; n < N; n++)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) first[n][c] = B::none(), second[n][c] = B::none();
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) {
        I code[4];
        unpack_vector<B, kBits, kSteps>(at, 4 * lanes, (lanes + 1) / 2, part, v, code);
#pragma GCC unroll 4
        for (int f = 0; f < 4; f++) {
          const int64_t from = kOf * (int64_t{g} * kGroup + 64 * (v + f * kVectors)) + part * B::kBytes;
          if (part == 0) prefetch_at<B, kAhead, kGroup>(p, next, int64_t{g} * kGroup / 4, 4 * v + f);
#pragma GCC unroll 4
          for (int n = 0; n < N; n++) {
            const uint8_t* const q = (const uint8_t*)(kHigh ? x[n]->high : x[n]->q) + from;
            if constexpr (kHigh) {
              B::template add_dot<kBits>(first[n][f % 2], code[f], B::load(q));
            } else {
              B::template add_x<kBits>(first[n][f % 2], B::first_operand(code[f]), B::load(q));
              B::template add_x<kBits>(second[n][f % 2], B::second_operand(code[f]), B::load(q + 64));
            }
          }
        }
      }
      F scale, offset;
      scales_at<B, kGroup>(p, row.part[0], lane, lanes - part * B::kLanes, &scale, &offset);
      if constexpr (kHigh) at_their_mean<B>(p.left, &scale, &offset);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        F x_scale = B::load_floats(x[n]->scale + lane);
        I sum;
        if constexpr (kHigh) {
          sum = B::add(B::template whole<kBits>(first[n][0]), B::template whole<kBits>(first[n][1]));
          x_scale = B::mul(x_scale, B::set1_float(128.f));
        } else {
          sum = B::add(B::after_first(B::add(first[n][0], first[n][1])), B::add(second[n][0], second[n][1]));
        }
        acc[n] = B::minus_product(acc[n], offset, B::load_floats((kHigh ? x[n]->high_sum : x[n]->sum) + lane));
        acc[n] = B::fma(B::to_float(sum), B::mul(scale, x_scale), acc[n]);
      }
    }
    for (int i = 0; i < kBits / 2; i++) at[i] += lanes * kGroup / 4;
    if (kBits % 2) at[kPlanes - 1] += (lanes + 1) / 2 * kSteps;
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; n++) out[n] = acc[n];
}

template <class B, int kBits, int kGroup, bool kHigh = false>
void grouped_dot(const RowPlan& p, const RowAt* row, int m, int next, const GroupedInput* const* x, int n, float* out,
                 int64_t stride) {
  constexpr int kMost = 48;
  typename B::F sums[kMost];
  const auto ahead = [&](int i) -> const RowAt& { return row[i + kRowsAhead < m + next ? i + kRowsAhead : i]; };
  for (int first = 0; first < m && n == 1; first += kMost) {
    const int count = m - first < kMost ? m - first : kMost;
    for (int i = first; i < first + count; i++)
      grouped_dot_of<B, kBits, kGroup, 1, kHigh>(p, row[i], x, sums + (i - first), ahead(i));
    B::sum_each(sums, count, out + first);
  }
  for (int i = 0; i < m && n > 1; i++)
    for (int r = 0; r < n;) {
      const RowAt& wanted = r ? row[i] : ahead(i);
      const int each = n - r >= 4 ? 4 : n - r >= 2 ? 2 : 1;
      if (each == 4)
        grouped_dot_of<B, kBits, kGroup, 4, kHigh>(p, row[i], x + r, sums, wanted);
      else if (each == 2)
        grouped_dot_of<B, kBits, kGroup, 2, kHigh>(p, row[i], x + r, sums, wanted);
      else
        grouped_dot_of<B, kBits, kGroup, 1, kHigh>(p, row[i], x + r, sums, wanted);
      for (int k = 0; k < each; k++) out[(r + k) * stride + i] = B::sum(sums[k]);
      r += each;
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
