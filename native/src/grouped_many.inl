// Products with many inputs: weights are unpacked once for all of them, and a tile of sums stays in the registers. Every
// input's sums are those of grouped_dot and grouped_down to the bit: integers are exact, floats are added in their order.

constexpr int kSpanSteps = 48;  // of a row, whose unpacked codes are in the first-level cache for all inputs

// A tile of rows, unpacked: vectors of codes, of scales and of offsets.
template <class B, int kSteps> struct Tile {
  static constexpr int kParts = 64 / B::kBytes, kVectors = kSpanSteps / kSteps * kParts;
  typename B::I code[kVectors][kSteps][B::kTile][B::kOperands];
  typename B::F scale[kVectors][B::kTile], offset[kVectors][B::kTile];
};

// acc[n * kTile + i] += the products of row i with input n, for so many vectors of groups from `first` on. The sums stay
// in registers.
template <class B, int kBits, int kSteps, int kInputs>
inline void add_tile(const Tile<B, kSteps>& tile, int vectors, int first, const GroupedInput* const* x,
                     typename B::F* acc) {
  constexpr int kSums = kInputs * B::kTile, kParts = 64 / B::kBytes;
  typename B::F own[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; i++) own[i] = acc[i];
  for (int v = 0; v < vectors; v++) {
    const int64_t at = int64_t{first} * 8 * kSteps + v / kParts * 128 * kSteps + v % kParts * B::kBytes;
    const int lane = first + v * B::kLanes;
    typename B::I sums[kSums], value[kInputs];
#pragma GCC unroll 16
    for (int i = 0; i < kSums; i++) sums[i] = B::none();
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
#pragma GCC unroll 16
      for (int i = 0; i < kSums && half; i++) sums[i] = B::after_first(sums[i]);
#pragma GCC unroll 1  // else the compiler reorders the additions, and the sums leave the registers
      for (int t = 0; t < kSteps; t++) {
#pragma GCC unroll 2
        for (int n = 0; n < kInputs; n++) value[n] = B::load((const uint8_t*)x[n]->q + at + 128 * t + 64 * half);
#pragma GCC unroll 8
        for (int i = 0; i < B::kTile; i++)
#pragma GCC unroll 2
          for (int n = 0; n < kInputs; n++)
            B::template add_x<kBits>(sums[n * B::kTile + i], tile.code[v][t][i][half * (B::kOperands - 1)], value[n]);
      }
    }
#pragma GCC unroll 2
    for (int n = 0; n < kInputs; n++) {
      const typename B::F x_scale = B::load_floats(x[n]->scale + lane), x_sum = B::load_floats(x[n]->sum + lane);
#pragma GCC unroll 8
      for (int i = 0; i < B::kTile; i++) {
        typename B::F& to = own[n * B::kTile + i];
        to = B::minus_product(to, tile.offset[v][i], x_sum);
        to = B::fma(B::to_float(sums[n * B::kTile + i]), B::mul(tile.scale[v][i], x_scale), to);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSums; i++) acc[i] = own[i];
}

// out[r * stride + i] = <row[i], x[r]>, i < m <= kTile, r < n <= kManyInputs.
template <class B, int kBits, int kGroup>
void grouped_rows(const RowPlan& p, const RowAt* row, int m, const GroupedInput* const* x, int n, float* out,
                  int64_t stride, const RowAt* next, int n_next) {
  constexpr int kSteps = kGroup / 4, kPlanes = (kBits + 1) / 2, kTile = B::kTile;
  const RowAt* own[kTile];
  Tile<B, kSteps> tile;
  typename B::F acc[kManyInputs * kTile];
  for (int i = 0; i < kTile; i++) own[i] = row + (i < m ? i : m - 1);
  for (int i = 0; i < n * kTile; i++) acc[i] = B::zero();
  int64_t pairs = 0, bit = 0;  // of a chunk in a plane of 2 bits, and of 1
  for (int first = 0; first < p.groups;) {
    int vectors = 0, g = first;
    for (; g < p.groups && g < first + kSpanSteps / kSteps * kChunkGroups; g += kChunkGroups) {
      const int lanes = p.groups - g < kChunkGroups ? p.groups - g : kChunkGroups;
      for (int part = 0; part * B::kLanes < lanes; part++, vectors++) {
        const int lane = g + part * B::kLanes;
        for (int i = 0; i < kTile; i++) {
          const uint8_t* at[4];
          typename B::I codes[kSteps];
          for (int k = 0; k < kPlanes; k++)
            at[k] = own[i]->part[k] + (k ? 0 : p.codes) + (kBits % 2 && k == kPlanes - 1 ? bit : pairs);
          unpack_steps<B, kBits, kSteps>(at, 4 * lanes, (lanes + 1) / 2, part, codes);
          for (int t = 0; t < kSteps; t++) {
            if (part == 0 && i < n_next) prefetch_at<B, kPlanes, kGroup>(p, next[i], int64_t{g} * kGroup / 4, t);
            tile.code[vectors][t][i][0] = B::first_operand(codes[t]);
            if (B::kOperands == 2) tile.code[vectors][t][i][B::kOperands - 1] = B::second_operand(codes[t]);
          }
          scales_at<B, kGroup>(p, own[i]->part[0], lane, lanes - part * B::kLanes, &tile.scale[vectors][i],
                               &tile.offset[vectors][i]);
        }
      }
      pairs += lanes * kGroup / 4, bit += (lanes + 1) / 2 * kSteps;
    }
    int r = 0;
    for (; r + 2 <= n; r += 2) add_tile<B, kBits, kSteps, 2>(tile, vectors, first, x + r, acc + r * kTile);
    if (r < n) add_tile<B, kBits, kSteps, 1>(tile, vectors, first, x + r, acc + r * kTile);
    first = g;
  }
  float sums[kManyInputs * kTile];
  B::sum_each(acc, n * kTile, sums);
  for (int r = 0; r < n; r++) memcpy(out + r * stride, sums + r * kTile, sizeof(float) * m);
}

// -- neuron-major ------------------------------------------------------------------------------------------------------

constexpr int kQuadsAhead = 32;  // quads of neurons whose unpacked codes are in the first-level cache for all inputs

// A chunk of 256 outputs of some groups of neurons, unpacked: codes [quad][part][4 f + i], scales and offsets.
template <class B> struct Chunk {
  static constexpr int kParts = 64 / B::kBytes;
  typename B::I code[kQuadsAhead][kParts][16];
  alignas(64) float scale[kQuadsAhead / 4][256], offset[kQuadsAhead / 4][256];
};

// y += what the neurons of the groups write to a chunk, for kRows inputs from `first` on; y and the sums of four vectors
// stay in registers.
template <class B, int kBits, int kRows, bool kOffsets>
inline void add_chunk(const NeuronPlan& p, const Chunk<B>& chunk, int groups, int quads, const ManyZ& z, int first,
                      int begin) {
  using I = typename B::I;
  using F = typename B::F;
  constexpr int kParts = 64 / B::kBytes, kVectors = 4, kSums = kRows * kVectors;  // sum i: of row i % kRows
  for (int part = 0; part < kParts; part++)
    for (int from = 0; from < 16; from += kVectors) {
      const auto place = [&](int i) {
        return z.y + (first + i % kRows) * z.y_stride + begin + 16 * (from + i / kRows) + part * B::kLanes;
      };
      F y[kSums];
#pragma GCC unroll 16
      for (int i = 0; i < kSums; i++) y[i] = B::load_floats(place(i));
      for (int g = 0; g < groups; g++) {
        I sums[kSums], factor[kRows], code[kVectors];
#pragma GCC unroll 16
        for (int i = 0; i < kSums; i++) sums[i] = B::none();
#pragma GCC unroll 1
        for (int q = 0; q < quads; q++) {
#pragma GCC unroll 4
          for (int r = 0; r < kRows; r++) factor[r] = B::set1_int(z.z[(first + r) * z.z_stride + g * kGroupQuads + q]);
#pragma GCC unroll 4
          for (int i = 0; i < kVectors; i++) code[i] = chunk.code[g * quads + q][part][from + i];
#pragma GCC unroll 16
          for (int i = 0; i < kSums; i++) B::template add_dot<kBits>(sums[i], code[i / kRows], factor[i % kRows]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kSums; i++) {
          const int64_t of = (first + i % kRows) * z.stride + g;
          const int c = 16 * (from + i / kRows) + part * B::kLanes;
          const F less = kOffsets ? B::load_floats(chunk.offset[g] + c) : B::zero();
          y[i] = Scaled<B>(p, z.factor[of], z.total[of])
                     .template add<kOffsets>(y[i], B::template whole<kBits>(sums[i]),
                                             B::load_floats(chunk.scale[g] + c), less);
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < kSums; i++) B::store(place(i), y[i]);
    }
}

template <class B, int kBits>
void grouped_down_many(const NeuronPlan& p, const GroupsOfNeurons& of, int begin, int end, const ManyZ& z) {
  using I = typename B::I;
  constexpr int kParts = 64 / B::kBytes, kNext = 6;  // quads from one to that whose rows are prefetched
  const int quads = of.quads, most = kQuadsAhead / quads;
  for (int from = 0; from < of.count; from += most) {
    const int groups = of.count - from < most ? of.count - from : most;
    ManyZ own = z;
    own.z += from * kGroupQuads, own.total += from, own.factor += from;
    const uint8_t* const* const rows = of.rows + 4 * quads * from;
    for (int at = begin; at < end; at += 256) {
      if (end - at < 256) {  // sums of less than a vector: as for one input
        for (int r = 0; r < z.rows; r++)
          for (int g = 0; g < groups; g++) {
            const int64_t i = r * z.stride + g;
            const GroupOfNeurons one{of.scales,
                                     of.group + from + g,
                                     quads,
                                     own.total[i],
                                     0,
                                     rows + 4 * quads * g,
                                     of.stride,
                                     own.z + r * z.z_stride + g * kGroupQuads,
                                     own.factor[i],
                                     {}};
            grouped_down<B, kBits>(p, one, at, end, z.y + r * z.y_stride);
          }
        break;
      }
      Chunk<B> chunk;
      for (int q = 0; q < groups * quads; q++) {
        const bool here = q + kNext < groups * quads;  // else the next chunk's, of these rows
        const uint8_t* const* const next = rows + 4 * (here ? q + kNext : q + kNext - groups * quads);
        for (int j = 0; j < 4 && kNext <= groups * quads; j++)
          for (int w = 0; w < kBits / 2; w++) B::prefetch(next[w * of.stride + j] + (here ? at : at + 256) / 4);
        for (int part = 0; part < kParts; part++) {
          const Quad<B, kBits> quad(rows + 4 * q, of.stride, at, 64, part);
          for (int i = 0; i < 4; i++) {
            I field[4];
            quad.codes(i, field);
            if (part == 0) prefetch_next<B, kBits>(of.next, 4 * q + i, 4 * groups * quads, at);
            for (int f = 0; f < 4; f++) chunk.code[q][part][4 * f + i] = field[f];
          }
        }
      }
      with_kind(p.format, [&](auto kind) {
        using Kind = decltype(kind);
        constexpr bool kOffsets = Kind::kOffset != GRIFFIN_OFFSET_NONE;
        for (int g = 0; g < groups; g++)
          for (int c = 0; c < 256; c += B::kLanes) {
            typename B::F scale, less = B::zero();
            neuron_scales<B, Kind::kScale, Kind::kOffset>(p, of.scales, of.group + from + g, at + c, &scale, &less);
            B::store(chunk.scale[g] + c, scale), B::store(chunk.offset[g] + c, less);
          }
        for (int r = 0; r < z.rows;) {
          const int left = z.rows - r;
          if (left == 3 || left > 4)
            add_chunk<B, kBits, 3, kOffsets>(p, chunk, groups, quads, own, r, at), r += 3;
          else if (left >= 2)
            add_chunk<B, kBits, 2, kOffsets>(p, chunk, groups, quads, own, r, at), r += 2;
          else
            add_chunk<B, kBits, 1, kOffsets>(p, chunk, groups, quads, own, r, at), r += 1;
        }
      });
    }
  }
}
