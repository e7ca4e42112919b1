// Products with neuron-major weights in groups: of one input, groups of neurons one after the other.

// Four rows' vectors, byte by byte: out[i] has in its 16-byte block k the bytes 16 k + 4 i .. 16 k + 4 i + 3 of each.
template <class B> GRIFFIN_INLINE void interleave(const typename B::I* row, typename B::I* out) {
  const typename B::I low01 = B::low8(row[0], row[1]), high01 = B::high8(row[0], row[1]);
  const typename B::I low23 = B::low8(row[2], row[3]), high23 = B::high8(row[2], row[3]);
  out[0] = B::low16(low01, low23), out[1] = B::high16(low01, low23);
  out[2] = B::low16(high01, high23), out[3] = B::high16(high01, high23);
}

// A quad's share of the neurons that come next, four steps a quad: for the outputs from `at` on, into the second-level
// cache (see prefetch_at).
template <class B, int kBits>
GRIFFIN_INLINE void prefetch_next(const Upcoming& next, int step, int steps, int at) {
  for (int j = step; j < next.count; j += steps)
#pragma GCC unroll 4
    for (int w = 0; w < (kBits + 1) / 2; w++)
      B::prefetch_far(next.rows[w * next.stride + j] + at / (w < kBits / 2 ? 4 : 8));
}

// Four neurons (a quad; plane w of neuron j at row[w * stride + j]), byte by byte, for part `part` of a chunk's fields.
template <class B, int kBits> struct Quad {
  typename B::I plane[kBits / 2][4], bit[kBits % 2 ? 4 : 1][4];  // [plane or field][i]

  GRIFFIN_INLINE Quad(const uint8_t* const* row, int stride, int begin, int bytes, int part) {
    using I = typename B::I;
    const int64_t at = begin / 4 + part * B::kBytes;
#pragma GCC unroll 4
    for (int w = 0; w < kBits / 2; w++) {
      const uint8_t* const* of = row + w * stride;
      const I own[4] = {B::load(of[0] + at), B::load(of[1] + at), B::load(of[2] + at), B::load(of[3] + at)};
      interleave<B>(own, plane[w]);
    }
    if constexpr (kBits % 2) {
      for (int f = 0; f < 4; f++) {
        I own[4];
        for (int j = 0; j < 4; j++)
          own[j] =
              B::twice_and_bit(B::none(), row[kBits / 2 * stride + j] + (begin + f * bytes + part * B::kBytes) / 8);
        interleave<B>(own, bit[f]);
      }
    }
  }

  // The codes of vector i of every field.
  GRIFFIN_INLINE void codes(int i, typename B::I* field) const {
    typename B::I own[kBits / 2];
#pragma GCC unroll 4
    for (int w = 0; w < kBits / 2; w++) own[w] = plane[w][i];
    fields_of<B, kBits / 2>(own, field);
    if constexpr (kBits % 2)
#pragma GCC unroll 4
      for (int f = 0; f < 4; f++) field[f] = B::add8(B::add8(field[f], field[f]), bit[f][i]);
  }
};

// Sums in the order of the outputs: acc[f][i] of part `part` of a chunk.
template <class B, int kBits>
GRIFFIN_INLINE void store_sums(const typename B::I (*acc)[4], int bytes, int part, int32_t* sums) {
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
inline void chunk_sums(const GroupOfNeurons& of, int begin, int n, int32_t* sums) {
  using I = typename B::I;
  const int bytes = n / 4;
  for (int part = 0; part * B::kBytes < bytes; part++) {
    I acc[4][4];
#pragma GCC unroll 4
    for (int f = 0; f < 4; f++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) acc[f][i] = B::none();
    for (int q = 0; q < of.quads; q++) {
      const Quad<B, kBits> quad(of.rows + 4 * q, of.stride, begin, bytes, part);
      const I factor = B::set1_int(of.z[q]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        I field[4];
        quad.codes(i, field);
        if (part == 0) prefetch_next<B, kBits>(of.next, 4 * q + i, 4 * of.quads, begin);
#pragma GCC unroll 4
        for (int f = 0; f < 4; f++) B::template add_dot<kBits>(acc[f][i], field[f], factor);
      }
    }
    store_sums<B, kBits>(acc, bytes, part, sums);
  }
}

// Scales and offsets of a group of neurons for the outputs c .. c + kLanes. Without offsets of its own a format has a code
// that means 0, and m is not set.
template <class B, int kScale, int kOffset>
GRIFFIN_INLINE void neuron_scales(const NeuronPlan& p, const uint8_t* scales, int group, int c, typename B::F* s,
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

// A line of what neuron_scales reads of a group that comes next, of each of its vectors.
template <class B, int kScale, int kOffset>
GRIFFIN_INLINE void prefetch_scales(const NeuronPlan& p, const uint8_t* scales, int group, int c) {
  constexpr bool kSupers = kScale <= GRIFFIN_SCALE_SUB_SIGNED;
  const int step = c % 64 / B::kLanes;  // of the outputs whose bytes are a line
  if (kSupers && step == 0) {
    const uint8_t* const sub = scales + p.sub + group * p.sub_stride + c;
    B::prefetch_far(sub);
    if (kOffset == GRIFFIN_OFFSET_SUB) B::prefetch_far(sub + p.sub_offset);
  }
  const int span = kSupers ? kSuper : p.format.span;
  if (c % 32 || group * p.format.group % span) return;
  const uint8_t* const base = scales + int64_t{group} * p.format.group / span * p.super_stride;
  B::prefetch_far(base + (kScale == GRIFFIN_SCALE_F32 ? 4 : 2) * c);
  if (kOffset == GRIFFIN_OFFSET_SUB || kOffset == GRIFFIN_OFFSET_F16) B::prefetch_far(base + p.offset + 2 * c);
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

// y[c] += factor * (s[c] * (sums[c] + rest) - total * m[c]) for the outputs begin .. begin + n of a group of neurons.
template <class B>
inline void add_scaled(const NeuronPlan& p, const GroupOfNeurons& of, int begin, int n, const int32_t* sums, float* y) {
  const Scaled<B> z(p, of.factor, of.total);
  const typename B::F rest = B::set1_float(of.factor * of.rest);
  with_kind(p.format, [&](auto kind) {
    using Kind = decltype(kind);
    for (int c = begin; c < begin + n; c += B::kLanes) {
      typename B::F s, m = B::zero();
      neuron_scales<B, Kind::kScale, Kind::kOffset>(p, of.scales, of.group, c, &s, &m);
      if (of.next.count) prefetch_scales<B, Kind::kScale, Kind::kOffset>(p, of.scales, of.next.group, c);
      const typename B::I sum = B::load((const uint8_t*)(sums + (c - begin)));
      typename B::F to = B::load_floats(y + c);
      if (of.rest != 0.f) to = B::fma(s, rest, to);
      B::store(y + c, z.template add<Kind::kOffset != GRIFFIN_OFFSET_NONE>(to, sum, s, m));
    }
  });
}

template <class B, int kBits>
void grouped_down(const NeuronPlan& p, const GroupOfNeurons& of, int begin, int end, float* y) {
  alignas(64) int32_t sums[256];
  for (int at = begin; at < end; at += 256) {
    const int n = end - at < 256 ? end - at : 256;
    chunk_sums<B, kBits>(of, at, n, sums);
    add_scaled<B>(p, of, at, n, sums, y);
  }
}
