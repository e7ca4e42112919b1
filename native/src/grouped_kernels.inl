// Products with weights in groups (grouped.h), written once over a vector type B; every instruction set's unit includes
// this inside its anonymous namespace. B provides integer vectors I of kBytes bytes and float vectors F of kBytes / 4.

// The four fields of the planes of 2 bits, put together.
template <class B, int kPairs> inline void fields_of(const typename B::I* plane, typename B::I* field) {
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
inline void unpack_steps(const uint8_t* const* at, int stride, int bits, int part, typename B::I* code) {
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
template <class B> inline typename B::F spread(typename B::F values, int each, int g) {
  float from[B::kLanes], to[B::kLanes];
  B::store(from, values);
  for (int i = 0; i < B::kLanes; i++) to[i] = from[(g % each + i) / each];
  return B::load_floats(to);
}

// s and m of codes whose lowest `left` bits are not read.
template <class B> inline void at_their_mean(int left, typename B::F* s, typename B::F* m) {
  const float step = (float)(1 << left);
  *m = B::minus_product(*m, *s, B::set1_float((step - 1) / 2)), *s = B::mul(*s, B::set1_float(step));
}

// s and m of the groups g .. g + kLanes, zero from `lanes` on.
template <class B, int kGroup>
inline void whole_scales_at(const RowPlan& p, const uint8_t* row, const RowScales& of, int g, int lanes,
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
inline void scales_at(const RowPlan& p, const uint8_t* row, const RowScales& of, int g, int lanes, typename B::F* s,
                      typename B::F* m) {
  whole_scales_at<B, kGroup>(p, row, of, g, lanes, s, m);
  if (p.left) at_their_mean<B>(p.left, s, m);
}

// A row with N inputs. kHigh: with their high bytes only.
template <class B, int kBits, int kGroup, int N, bool kHigh>
void grouped_dot_of(const RowPlan& p, const uint8_t* row, const GroupedInput* const* x, float* out,
                    const uint8_t* next) {
  using I = typename B::I;
  using F = typename B::F;
  constexpr int kSteps = kGroup / 4, kParts = 64 / B::kBytes, kPlanes = (kBits + 1) / 2;
  const uint8_t* at[4];
  F acc[N];
  for (int i = 0; i < kPlanes; i++) at[i] = row + p.plane[i];
  for (int n = 0; n < N; n++) acc[n] = B::zero();
  RowScales scales;
  open_scales<B>(p, row, scales);
  int64_t ahead = 0;
  for (int g = 0; g < p.groups; g += kChunkGroups) {
    const int lanes = p.groups - g < kChunkGroups ? p.groups - g : kChunkGroups;
    for (int i = 0; i < kBits * kGroup / 32 + 1; i++, ahead += 64) B::prefetch_far(next + ahead);
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
          for (int t = 0; t < kSteps; t++)
            sum[t % 2] = B::template dot<kBits>(sum[t % 2], code[t], B::load(q + kOf * 64 * t));
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
          first[t % 2] = B::template dot_x<kBits>(first[t % 2], B::first_operand(code[t]), B::load(q + 128 * t));
          second[t % 2] =
              B::template dot_x<kBits>(second[t % 2], B::second_operand(code[t]), B::load(q + 128 * t + 64));
        }
        const I sum = B::join(B::add(first[0], first[1]), B::add(second[0], second[1]));
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
void grouped_dot(const RowPlan& p, const uint8_t* row, const GroupedInput* const* x, int n, float* out,
                 const uint8_t* next) {
  for (int r = 0; r < n; next = row) {
    if (n - r >= 4)
      grouped_dot_of<B, kBits, kGroup, 4, kHigh>(p, row, x + r, out + r, next), r += 4;
    else if (n - r >= 2)
      grouped_dot_of<B, kBits, kGroup, 2, kHigh>(p, row, x + r, out + r, next), r += 2;
    else
      grouped_dot_of<B, kBits, kGroup, 1, kHigh>(p, row, x + r, out + r, next), r += 1;
  }
}

// -- neuron-major ------------------------------------------------------------------------------------------------------

// Four rows' vectors, byte by byte: out[i] has in its 16-byte block k the bytes 16 k + 4 i .. 16 k + 4 i + 3 of each.
template <class B> inline void interleave(const typename B::I* row, typename B::I* out) {
  const typename B::I low01 = B::low8(row[0], row[1]), high01 = B::high8(row[0], row[1]);
  const typename B::I low23 = B::low8(row[2], row[3]), high23 = B::high8(row[2], row[3]);
  out[0] = B::low16(low01, low23), out[1] = B::high16(low01, low23);
  out[2] = B::low16(high01, high23), out[3] = B::high16(high01, high23);
}

// Rows that will be wanted, a few lines at a time (a burst would wait for the memory), into the second-level cache.
// Measured, half of the rows: 2.0x as fast as into the first level, whose misses are few at a time, and which makes the
// hardware fetch what follows.
struct Ahead {
  const uint8_t* const* row;
  const int* own;             // bytes of each row, or null: all of them have `lines`
  int rows, lines, at, each;  // lines of a row, the next one, lines a step
  Ahead(const uint8_t* const* of, int n, int64_t bytes, int steps)
      : row(of), own(nullptr), rows(n), lines((int)(bytes / 64)), at(0),
        each((n * lines + steps - 1) / (steps ? steps : 1)) {}
  Ahead(const uint8_t* const* of, int n, const int* bytes, int steps)
      : row(of), own(bytes), rows(n), lines(n ? (bytes[0] + 63) / 64 : 0), at(0), each(0) {
    for (int i = 0; i < n; i++) each += (bytes[i] + 63) / 64;
    each = (each + steps - 1) / (steps ? steps : 1);
  }
  template <class B> void step() {
    for (int i = 0; i < each && rows; i++) {
      B::prefetch_far(*row + 64 * at);
      if (++at < lines) continue;
      at = 0, row++, rows--;
      if (own && rows) lines = (*++own + 63) / 64;
    }
  }
};

// The codes of four neurons (a quad), byte by byte, for part `part` of a chunk's fields: field[f][i].
template <class B, int kBits>
inline void quad_fields(const NeuronPlan& p, const uint8_t* const* row, int begin, int bytes, int part,
                        typename B::I (*field)[4]) {
  using I = typename B::I;
  constexpr int kPairs = kBits / 2;
  const int64_t at = begin / 4 + part * B::kBytes;
  I plane[4][4], bit[4][4];  // [plane or field][i]
  for (int w = 0; w < kPairs; w++) {
    const I own[4] = {B::load(row[0] + p.plane[w] + at), B::load(row[1] + p.plane[w] + at),
                      B::load(row[2] + p.plane[w] + at), B::load(row[3] + p.plane[w] + at)};
    interleave<B>(own, plane[w]);
  }
  if constexpr (kBits % 2) {
    for (int f = 0; f < 4; f++) {
      I own[4];
      for (int j = 0; j < 4; j++)
        own[j] = B::twice_and_bit(B::none(), row[j] + p.plane[kPairs] + (begin + f * bytes + part * B::kBytes) / 8);
      interleave<B>(own, bit[f]);
    }
  }
  for (int i = 0; i < 4; i++) {
    I own[4], code[4];
    for (int w = 0; w < kPairs; w++) own[w] = plane[w][i];
    fields_of<B, kPairs>(own, code);
    for (int f = 0; f < 4; f++) field[f][i] = kBits % 2 ? B::add8(B::add8(code[f], code[f]), bit[f][i]) : code[f];
  }
}

// Sums in the order of the outputs: acc[f][i] of part `part` of a chunk.
template <class B, int kBits>
inline void store_sums(const typename B::I (*acc)[4], int bytes, int part, int32_t* sums) {
  const int blocks = bytes / kFieldBlock;
  const int valid = 4 * blocks - part * B::kLanes < B::kLanes ? 4 * blocks - part * B::kLanes : B::kLanes;
  for (int f = 0; f < 4; f++)
    for (int i = 0; i < 4; i++) {
      int32_t* const to = sums + f * bytes + 4 * blocks * i + part * B::kLanes;
      const typename B::I own = B::template whole<kBits>(acc[f][i]);
      if (valid == B::kLanes) {
        B::store_int(to, own);
      } else {
        int32_t room[B::kLanes];
        B::store_int(room, own);
        memcpy(to, room, sizeof(int32_t) * valid);
      }
    }
}

// sums[c] = sum over the quads' neurons of code * z, for a chunk of n outputs.
template <class B, int kBits>
inline void chunk_sums(const NeuronPlan& p, const uint8_t* const* rows, const int32_t* z, int quads, int begin, int n,
                       int32_t* sums, Ahead& ahead) {
  using I = typename B::I;
  const int bytes = n / 4;
  for (int part = 0; part * B::kBytes < bytes; part++) {
    I acc[4][4];
    for (int f = 0; f < 4; f++)
      for (int i = 0; i < 4; i++) acc[f][i] = B::none();
    for (int q = 0; q < quads; q++) {
      ahead.step<B>();
      I field[4][4];
      quad_fields<B, kBits>(p, rows + 4 * q, begin, bytes, part, field);
      const I factor = B::set1_int(z[q]);
      for (int f = 0; f < 4; f++)
        for (int i = 0; i < 4; i++) acc[f][i] = B::template dot<kBits>(acc[f][i], field[f][i], factor);
    }
    store_sums<B, kBits>(acc, bytes, part, sums);
  }
}

// Scales and offsets of a group of neurons for the outputs c .. c + kLanes. Without offsets of its own a format has a code
// that means 0, and m is not set.
template <class B, int kScale, int kOffset>
inline void neuron_scales(const NeuronPlan& p, const uint8_t* scales, int group, int c, typename B::F* s,
                          typename B::F* m) {
  const griffin_grouped& f = p.format;
  const int64_t span = group * f.group / (kScale <= GRIFFIN_SCALE_SUB_SIGNED ? kSuper : f.span);
  const uint8_t* const base = scales + span * p.super_stride;
  const uint8_t* const sub = scales + p.sub + group * p.sub_stride + c;
  *s = kScale == GRIFFIN_SCALE_F32 ? B::load_floats((const float*)base + c) : B::halves((const uint16_t*)base + c);
  if (kScale == GRIFFIN_SCALE_SUB_UNSIGNED) *s = B::mul(*s, B::unsigned_bytes(sub));
  if (kScale == GRIFFIN_SCALE_SUB_SIGNED) *s = B::mul(*s, B::signed_bytes((const int8_t*)sub));
  if (kOffset == GRIFFIN_OFFSET_SUB)
    *m = B::mul(B::halves((const uint16_t*)(base + p.offset) + c), B::unsigned_bytes(sub + p.sub_offset));
  else if (kOffset == GRIFFIN_OFFSET_F16)
    *m = B::minus_product(B::zero(), B::set1_float(1.f), B::halves((const uint16_t*)(base + p.offset) + c));
  else if (kOffset == GRIFFIN_OFFSET_CODE)
    *m = B::mul(*s, B::unsigned_bytes(base + p.offset + c));
}

// What the sums of one input over a group of neurons are scaled with: z = factor * its int8, total: the int8's sum.
template <class B> struct Scaled {
  typename B::F factor, z_sum;
  typename B::I zero;
  Scaled(const NeuronPlan& p, float z_factor, int total)
      : factor(B::set1_float(z_factor)), z_sum(B::set1_float(z_factor * (float)total)),
        zero(B::set1_int(total * p.format.zero)) {}
  // acc + factor * (s * sum - total * m)
  template <bool kOffsets>
  typename B::F add(typename B::F acc, typename B::I sum, typename B::F s, typename B::F m) const {
    if (kOffsets)
      acc = B::minus_product(acc, m, z_sum);
    else
      sum = B::subtract(sum, zero);
    return B::fma(B::to_float(sum), B::mul(s, factor), acc);
  }
};

template <int kOfScale, int kOfOffset> struct ScaleKind {
  static constexpr int kScale = kOfScale, kOffset = kOfOffset;
};

// use(ScaleKind) for the format's kind of scales and offsets.
template <class Use> inline void with_kind(const griffin_grouped& f, const Use& use) {
  if (f.scale == GRIFFIN_SCALE_SUB_UNSIGNED) {
    if (f.offset == GRIFFIN_OFFSET_SUB) return use(ScaleKind<GRIFFIN_SCALE_SUB_UNSIGNED, GRIFFIN_OFFSET_SUB>());
    return use(ScaleKind<GRIFFIN_SCALE_SUB_UNSIGNED, GRIFFIN_OFFSET_NONE>());
  }
  if (f.scale == GRIFFIN_SCALE_SUB_SIGNED) {
    if (f.offset == GRIFFIN_OFFSET_SUB) return use(ScaleKind<GRIFFIN_SCALE_SUB_SIGNED, GRIFFIN_OFFSET_SUB>());
    return use(ScaleKind<GRIFFIN_SCALE_SUB_SIGNED, GRIFFIN_OFFSET_NONE>());
  }
  if (f.scale == GRIFFIN_SCALE_F16) {
    if (f.offset == GRIFFIN_OFFSET_NONE) return use(ScaleKind<GRIFFIN_SCALE_F16, GRIFFIN_OFFSET_NONE>());
    if (f.offset == GRIFFIN_OFFSET_F16) return use(ScaleKind<GRIFFIN_SCALE_F16, GRIFFIN_OFFSET_F16>());
    return use(ScaleKind<GRIFFIN_SCALE_F16, GRIFFIN_OFFSET_CODE>());
  }
  if (f.offset == GRIFFIN_OFFSET_NONE) return use(ScaleKind<GRIFFIN_SCALE_F32, GRIFFIN_OFFSET_NONE>());
  if (f.offset == GRIFFIN_OFFSET_F16) return use(ScaleKind<GRIFFIN_SCALE_F32, GRIFFIN_OFFSET_F16>());
  return use(ScaleKind<GRIFFIN_SCALE_F32, GRIFFIN_OFFSET_CODE>());
}

// y[c] += factor * (s[c] * sums[c] - total * m[c]) for the outputs begin .. begin + n of a group of neurons.
template <class B>
inline void add_scaled(const NeuronPlan& p, const GroupOfNeurons& of, int begin, int n, const int32_t* sums, float* y) {
  const Scaled<B> z(p, of.factor, of.total);
  with_kind(p.format, [&](auto kind) {
    using Kind = decltype(kind);
    for (int c = begin; c < begin + n; c += B::kLanes) {
      typename B::F s, m = B::zero();
      neuron_scales<B, Kind::kScale, Kind::kOffset>(p, of.scales, of.group, c, &s, &m);
      const typename B::I sum = B::load((const uint8_t*)(sums + (c - begin)));
      B::store(y + c, z.template add<Kind::kOffset != GRIFFIN_OFFSET_NONE>(B::load_floats(y + c), sum, s, m));
    }
  });
}

template <class B, int kBits>
void grouped_down(const NeuronPlan& p, const GroupOfNeurons& of, int begin, int end, float* y) {
  alignas(64) int32_t sums[256];
  Ahead ahead(of.ahead, of.n_ahead, p.bytes, of.quads * ((end - begin + 255) / 256));
  for (int at = begin; at < end; at += 256) {
    const int n = end - at < 256 ? end - at : 256;
    chunk_sums<B, kBits>(p, of.rows, of.z, of.quads, at, n, sums, ahead);
    add_scaled<B>(p, of, at, n, sums, y);
  }
}

#include "grouped_inputs.inl"
#include "grouped_many.inl"

#include "grouped_levels.inl"

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
          grouped_down_levels<B>,
          {{grouped_rows<B, 2, 16>, grouped_rows<B, 3, 16>, grouped_rows<B, 4, 16>, grouped_rows<B, 5, 16>,
            grouped_rows<B, 6, 16>, nullptr, grouped_rows<B, 8, 16>},
           {grouped_rows<B, 2, 32>, grouped_rows<B, 3, 32>, grouped_rows<B, 4, 32>, grouped_rows<B, 5, 32>,
            grouped_rows<B, 6, 32>, nullptr, grouped_rows<B, 8, 32>}},
          B::kTile,
          !B::kByteInputs,
          grouped_quantise<B>};
}
