// Products with many inputs: weights are unpacked once for all of them, and a tile of sums stays in the registers. Every
// input's sums are those of grouped_dot and grouped_down to the bit: integers are exact, floats are added in their order.

// The products of a tile of rows with one input, for the groups of one vector: acc[i] of row i.
template <class B, int kBits, int kSteps>
inline void add_tile(const typename B::I (*code)[B::kTile][B::kOperands], const typename B::F* scale,
                     const typename B::F* offset, const uint8_t* q, typename B::F x_scale, typename B::F x_sum,
                     typename B::F* acc) {
  using I = typename B::I;
  I first[B::kTile], second[B::kTile];
#pragma GCC unroll 8
  for (int i = 0; i < B::kTile; i++) first[i] = second[i] = B::none();
#pragma GCC unroll 1  // else the compiler reorders the additions, and the sums leave the registers
  for (int t = 0; t < kSteps; t++) {
    const I x = B::load(q + 128 * t), y = B::load(q + 128 * t + 64);
#pragma GCC unroll 8
    for (int i = 0; i < B::kTile; i++) {
      first[i] = B::template dot_x<kBits>(first[i], code[t][i][0], x);
      second[i] = B::template dot_x<kBits>(second[i], code[t][i][B::kOperands - 1], y);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < B::kTile; i++) {
    const typename B::F less = B::minus_product(acc[i], offset[i], x_sum);
    acc[i] = B::fma(B::to_float(B::join(first[i], second[i])), B::mul(scale[i], x_scale), less);
  }
}

// out[i * stride + r] = <row[i], x[r]>, i < m <= kTile, r < n <= kManyInputs.
template <class B, int kBits, int kGroup>
void grouped_rows(const RowPlan& p, const uint8_t* const* row, int m, const GroupedInput* const* x, int n, float* out,
                  int64_t stride) {
  using I = typename B::I;
  using F = typename B::F;
  constexpr int kSteps = kGroup / 4, kParts = 64 / B::kBytes, kPlanes = (kBits + 1) / 2, kTile = B::kTile;
  const uint8_t* own[kTile];
  RowScales scales[kTile];
  F acc[kManyInputs][kTile];
  for (int i = 0; i < kTile; i++) own[i] = row[i < m ? i : m - 1], open_scales<B>(p, own[i], scales[i]);
  for (int r = 0; r < n; r++)
    for (int i = 0; i < kTile; i++) acc[r][i] = B::zero();
  int64_t pairs = 0, bit = 0;  // of this chunk in a plane of 2 bits, and of 1
  for (int g = 0; g < p.groups; g += kChunkGroups) {
    const int lanes = p.groups - g < kChunkGroups ? p.groups - g : kChunkGroups;
    for (int part = 0; part < kParts && part * B::kLanes < lanes; part++) {
      const int lane = g + part * B::kLanes;
      I code[kSteps][kTile][B::kOperands];
      F scale[kTile], offset[kTile];
      for (int i = 0; i < kTile; i++) {
        const uint8_t* at[4];
        I codes[kSteps];
        for (int k = 0; k < kPlanes; k++) at[k] = own[i] + p.plane[k] + (kBits % 2 && k == kPlanes - 1 ? bit : pairs);
        unpack_steps<B, kBits, kSteps>(at, 4 * lanes, (lanes + 1) / 2, part, codes);
        for (int t = 0; t < kSteps; t++) {
          code[t][i][0] = B::first_operand(codes[t]);
          if (B::kOperands == 2) code[t][i][B::kOperands - 1] = B::second_operand(codes[t]);
        }
        scales_at<B, kGroup>(p, own[i], scales[i], lane, lanes - part * B::kLanes, &scale[i], &offset[i]);
      }
      for (int r = 0; r < n; r++)
        add_tile<B, kBits, kSteps>(code, scale, offset,
                                   (const uint8_t*)x[r]->q + 2 * (int64_t)g * kGroup + part * B::kBytes,
                                   B::load_floats(x[r]->scale + lane), B::load_floats(x[r]->sum + lane), acc[r]);
    }
    pairs += lanes * kGroup / 4, bit += (lanes + 1) / 2 * kSteps;
  }
  for (int i = 0; i < m; i++)
    for (int r = 0; r < n; r++) out[i * stride + r] = B::sum(acc[r][i]);
}

// -- neuron-major ------------------------------------------------------------------------------------------------------

// y += what the group's neurons write to a whole chunk of 256 outputs, for kRows inputs from `first` on.
template <class B, int kBits, int kRows, bool kOffsets>
inline void add_chunk(const NeuronPlan& p, const uint8_t (*codes)[64 / B::kBytes][16][B::kBytes], int quads,
                      const float* s, const float* m, const ManyZ& z, int first, int begin) {
  using I = typename B::I;
  using F = typename B::F;
  constexpr int kParts = 64 / B::kBytes, kSums = B::kTile * 2 / kRows;  // of a row at a time: kSums divides 16
  for (int part = 0; part < kParts; part++)
    for (int from = 0; from < 16; from += kSums) {
      I acc[kRows][kSums];
#pragma GCC unroll 16
      for (int i = 0; i < kRows * kSums; i++) acc[i / kSums][i % kSums] = B::none();
#pragma GCC unroll 1
      for (int q = 0; q < quads; q++) {
        I factor[kRows];
        for (int r = 0; r < kRows; r++) factor[r] = B::set1_int(z.z[(first + r) * z.z_stride + q]);
#pragma GCC unroll 16
        for (int i = 0; i < kSums; i++) {
          const I code = B::load(codes[q][part][from + i]);
          for (int r = 0; r < kRows; r++) acc[r][i] = B::template dot<kBits>(acc[r][i], code, factor[r]);
        }
      }
#pragma GCC unroll 2
      for (int r = 0; r < kRows; r++) {
        const int64_t of = (first + r) * z.stride;
        const Scaled<B> scaled(p, z.factor[of], z.total[of]);
        float* const y = z.y + (first + r) * z.y_stride + begin;
#pragma GCC unroll 16
        for (int i = 0; i < kSums; i++) {
          const int c = 16 * (from + i) + part * B::kLanes;
          const F less = kOffsets ? B::load_floats(m + c) : B::zero();
          B::store(y + c, scaled.template add<kOffsets>(B::load_floats(y + c), B::template whole<kBits>(acc[r][i]),
                                                        B::load_floats(s + c), less));
        }
      }
    }
}

template <class B, int kBits>
void grouped_down_many(const NeuronPlan& p, const GroupOfNeurons& of, int begin, int end, const ManyZ& z) {
  using I = typename B::I;
  constexpr int kParts = 64 / B::kBytes;
  alignas(64) uint8_t codes[8][kParts][16][B::kBytes];  // [quad][part][4 f + i]
  alignas(64) float s[256], m[256];
  for (int at = begin; at < end; at += 256) {
    if (end - at < 256) {  // sums of less than a vector: as for one input
      for (int r = 0; r < z.rows; r++) {
        GroupOfNeurons row = of;
        row.z = z.z + r * z.z_stride, row.total = z.total[r * z.stride], row.factor = z.factor[r * z.stride];
        grouped_down<B, kBits>(p, row, at, end, z.y + r * z.y_stride);
      }
      return;
    }
    for (int q = 0; q < of.quads; q++)
      for (int part = 0; part < kParts; part++) {
        I field[4][4];
        quad_fields<B, kBits>(p, of.rows + 4 * q, at, 64, part, field);
        for (int i = 0; i < 16; i++) B::store_int((int32_t*)codes[q][part][i], field[i / 4][i % 4]);
      }
    with_kind(p.format, [&](auto kind) {
      using Kind = decltype(kind);
      constexpr bool kOffsets = Kind::kOffset != GRIFFIN_OFFSET_NONE;
      for (int c = 0; c < 256; c += B::kLanes) {
        typename B::F own, less = B::zero();
        neuron_scales<B, Kind::kScale, Kind::kOffset>(p, of.scales, of.group, at + c, &own, &less);
        B::store(s + c, own), B::store(m + c, less);
      }
      int r = 0;
      for (; r + 2 <= z.rows; r += 2) add_chunk<B, kBits, 2, kOffsets>(p, codes, of.quads, s, m, z, r, at);
      if (r < z.rows) add_chunk<B, kBits, 1, kOffsets>(p, codes, of.quads, s, m, z, r, at);
    });
  }
}
