// Weights in groups into the layouts of grouped.h: from the blocks of a GGUF file, or from codes and scales. Weights
// are moved, never rounded.
#include <string.h>

#include <algorithm>
#include <memory>
#include <new>

#include "checks.h"
#include "gguf_blocks.h"
#include "griffin_gguf.h"
#include "grouped.h"
#include "parallel.h"

namespace griffin {
namespace {

// -- sources -------------------------------------------------------------------------------------------------------

// Where the weights come from: piece `i` (weights 256 i ..) of row `row`, `n` of them.
struct Source {
  virtual ~Source() = default;
  virtual void read(int64_t row, int64_t i, int n, Piece& to) const = 0;
};

struct GgufSource : Source {
  const uint8_t* base;
  int64_t row_bytes;
  int number;
  const GgufType* type;
  const int64_t* order;  // row r of the matrix is row order[r] of the file's; null: the same

  void read(int64_t row, int64_t i, int n, Piece& to) const override {
    const uint8_t* const from =
        base + (order ? order[row] : row) * row_bytes + i * (kSuper / type->weights) * type->bytes;
    if (type->weights == kSuper) return super_block(number, from, to);
    for (int b = 0; 32 * b < n; b++) small_block(number, from + b * type->bytes, b, to);
  }
};

struct CodeSource : Source {
  const griffin_codes* from;
  const griffin_grouped* format;
  int64_t d_in;  // padded to whole groups

  void read(int64_t row, int64_t i, int n, Piece& to) const override {
    const griffin_grouped& f = *format;
    const int64_t supers = (d_in + kSuper - 1) / kSuper, spans = (d_in + f.span - 1) / f.span, groups = d_in / f.group;
    const auto copy = [](uint8_t* target, const void* base, int64_t element, int64_t at, int64_t count) {
      if (base) memcpy(target, static_cast<const uint8_t*>(base) + at * element, static_cast<size_t>(count * element));
    };
    copy(to.codes, from->codes, 1, row * d_in + i * kSuper, n);
    if (has_supers(f)) {
      copy(to.scale, from->scale, 2, row * supers + i, 1), copy(to.offset, from->offset, 2, row * supers + i, 1);
      const int64_t at = row * groups + i * kSuper / f.group;
      copy(to.sub, from->sub, 1, at, n / f.group), copy(to.sub_offset, from->sub_offset, 1, at, n / f.group);
    } else {
      const int64_t at = row * spans + i * kSuper / f.span, count = (n + f.span - 1) / f.span;
      copy(to.scale, from->scale, f.scale == GRIFFIN_SCALE_F32 ? 4 : 2, at, count);
      copy(to.offset, from->offset, f.offset == GRIFFIN_OFFSET_F16 ? 2 : 1, at, count);
    }
  }
};

// -- into the layouts ------------------------------------------------------------------------------------------------

// Two bits (`shift` up) of four fields' codes into bytes.
void combine(const uint8_t* const* field, int n, int shift, uint8_t* out) {
  for (int b = 0; b < n; b++)
    out[b] = static_cast<uint8_t>((field[0][b] >> shift & 3) | (field[1][b] >> shift & 3) << 2 |
                                  (field[2][b] >> shift & 3) << 4 | (field[3][b] >> shift & 3) << 6);
}

void pack_bits(const uint8_t* codes, int n, uint8_t* out) {
  memset(out, 0, static_cast<size_t>((n + 7) / 8));
  for (int b = 0; b < n; b++) out[b / 8] = static_cast<uint8_t>(out[b / 8] | (codes[b] & 1) << b % 8);
}

// Where a row's parts are to be written.
struct Parts {
  uint8_t* part[kMaxPlanes];
  explicit Parts(const RowAt& at) {
    for (int i = 0; i < kMaxPlanes; i++) part[i] = const_cast<uint8_t*>(at.part[i]);
  }
};

// A row's planes (the first is at `plane[0]`) from its codes, which lie in order.
void pack_planes(const RowPlan& p, const uint8_t* codes, uint8_t* const* plane) {
  const int group = p.format.group, bits = p.format.bits, steps = group / 4, vectors = steps / 4, pairs = bits / 2;
  uint8_t ordered[8][64];
  for (int g = 0; g < p.groups; g += kChunkGroups) {
    const int lanes = std::min(kChunkGroups, p.groups - g);
    for (int t = 0; t < steps; t++)
      for (int lane = 0; lane < lanes; lane++)
        memcpy(ordered[t] + 4 * lane, codes + static_cast<int64_t>(g + lane) * group + 4 * t, 4);
    const int64_t at = static_cast<int64_t>(g) * group / 4;
    for (int i = 0; i < pairs; i++)
      for (int v = 0; v < vectors; v++) {
        const uint8_t* const field[4] = {ordered[v], ordered[v + vectors], ordered[v + 2 * vectors],
                                         ordered[v + 3 * vectors]};
        combine(field, 4 * lanes, bits - 2 * (i + 1), plane[i] + at + v * 4 * lanes);
      }
    if (bits % 2)
      for (int t = 0; t < steps; t++)
        pack_bits(
            ordered[t], 4 * lanes,
            plane[pairs] + static_cast<int64_t>(g) / kChunkGroups * (kChunkGroups / 2) * steps + t * ((lanes + 1) / 2));
  }
}

// A neuron's planes from its codes, one for each (padded) output.
void pack_neuron(const NeuronPlan& p, const uint8_t* codes, const Parts& row) {
  const int bits = p.format.bits, pairs = bits / 2;
  uint8_t ordered[4][64];
  for (int begin = 0; begin < p.d; begin += 256) {
    const int n = std::min(256, p.d - begin), bytes = n / 4, blocks = bytes / 16;
    for (int f = 0; f < 4; f++)
      for (int k = 0; k < blocks; k++)
        for (int i = 0; i < 4; i++)
          memcpy(ordered[f] + 16 * k + 4 * i, codes + begin + f * bytes + 4 * blocks * i + 4 * k, 4);
    const uint8_t* const field[4] = {ordered[0], ordered[1], ordered[2], ordered[3]};
    for (int plane = 0; plane < pairs; plane++)
      combine(field, bytes, bits - 2 * (plane + 1), row.part[plane] + begin / 4);
    for (int f = 0; f < 4 && bits % 2; f++) pack_bits(ordered[f], bytes, row.part[pairs] + (begin + f * bytes) / 8);
  }
}

void pack_rows(const griffin_matrix& matrix, const Source& source, int64_t first, int64_t last, uint8_t* codes) {
  const griffin_grouped& f = matrix.grouped;
  const RowPlan p = row_plan(f, matrix.d_in);
  Piece piece;
  for (int64_t o = first; o < last; o++) {
    Parts parts(p.at(matrix.weight, o));
    uint8_t* const row = parts.part[0];
    memset(row, 0, static_cast<size_t>(p.codes));
    for (int i = 0; i < p.supers; i++) {
      const int n = std::min(kSuper, p.d - kSuper * i);
      source.read(o, i, n, piece);
      memcpy(codes + static_cast<int64_t>(i) * kSuper, piece.codes, static_cast<size_t>(n));
      if (has_supers(f)) {
        const int groups = n / f.group, at = i * kSuper / f.group;
        memcpy(row + 2 * i, piece.scale, 2), memcpy(row + p.sub + at, piece.sub, static_cast<size_t>(groups));
        if (f.offset != GRIFFIN_OFFSET_SUB) continue;
        memcpy(row + p.offset + 2 * i, piece.offset, 2);
        memcpy(row + p.sub_offset + at, piece.sub_offset, static_cast<size_t>(groups));
      } else {
        const int scale = f.scale == GRIFFIN_SCALE_F32 ? 4 : 2, at = i * kSuper / f.span,
                  count = (n + f.span - 1) / f.span;
        const int offset = f.offset == GRIFFIN_OFFSET_F16 ? 2 : f.offset == GRIFFIN_OFFSET_CODE ? 1 : 0;
        memcpy(row + scale * at, piece.scale, static_cast<size_t>(scale * count));
        memcpy(row + p.offset + offset * at, piece.offset, static_cast<size_t>(offset * count));
      }
    }
    parts.part[0] += p.codes;
    pack_planes(p, codes, parts.part);
  }
}

// 256 neurons at a time.
void pack_neurons(const griffin_matrix& matrix, const Source& source, int64_t super, uint8_t* codes) {
  const griffin_grouped& f = matrix.grouped;
  const NeuronPlan p = neuron_plan(f, matrix.d_out, matrix.d_in);
  uint8_t* const scales = static_cast<uint8_t*>(const_cast<void*>(matrix.scales));
  const int n = std::min<int>(kSuper, p.d_ff - static_cast<int>(super) * kSuper);
  const int whole = static_cast<int>(up_to(n, f.group));  // the last group may have fewer neurons
  memset(codes, 0, static_cast<size_t>(kSuper) * p.d);
  Piece piece;
  for (int64_t o = 0; o < matrix.d_out; o++) {
    source.read(o, super, whole, piece);
    for (int j = 0; j < n; j++) codes[static_cast<int64_t>(j) * p.d + o] = piece.codes[j];
    if (has_supers(f)) {
      uint8_t* const at = scales + super * p.super_stride;
      memcpy(at + 2 * o, piece.scale, 2);
      if (f.offset == GRIFFIN_OFFSET_SUB) memcpy(at + p.offset + 2 * o, piece.offset, 2);
      for (int g = 0; g < whole / f.group; g++) {
        uint8_t* const sub = scales + p.sub + (super * kSuper / f.group + g) * p.sub_stride;
        sub[o] = piece.sub[g];
        if (f.offset == GRIFFIN_OFFSET_SUB) sub[p.sub_offset + o] = piece.sub_offset[g];
      }
    } else {
      const int scale = f.scale == GRIFFIN_SCALE_F32 ? 4 : 2;
      const int offset = f.offset == GRIFFIN_OFFSET_F16 ? 2 : f.offset == GRIFFIN_OFFSET_CODE ? 1 : 0;
      for (int s = 0; s < (n + f.span - 1) / f.span; s++) {
        uint8_t* const at = scales + (super * kSuper / f.span + s) * p.super_stride;
        memcpy(at + scale * o, piece.scale + scale * s, static_cast<size_t>(scale));
        memcpy(at + p.offset + offset * o, piece.offset + offset * s, static_cast<size_t>(offset));
      }
    }
  }
  for (int j = 0; j < n; j++)
    pack_neuron(p, codes + static_cast<int64_t>(j) * p.d, Parts(p.at(matrix.weight, super * kSuper + j)));
}

int pack(const griffin_matrix& matrix, const Source& source, int threads) {
  struct Call {
    const griffin_matrix& matrix;
    const Source& source;
    int64_t room;  // bytes of a thread's codes
    uint8_t* codes;
  };
  const bool neurons = matrix.neuron_major;
  const int64_t room = neurons ? kSuper * up_to(matrix.d_out, 64) : up_to(matrix.d_in, kSuper);
  const std::unique_ptr<uint8_t[]> codes(new (std::nothrow) uint8_t[static_cast<size_t>(room * threads)]);
  if (!codes) return GRIFFIN_NO_MEMORY;
  if (neurons) {
    const NeuronPlan p = neuron_plan(matrix.grouped, matrix.d_out, matrix.d_in);
    memset(const_cast<void*>(matrix.scales), 0, static_cast<size_t>(p.scale_bytes));
  }
  Call call{matrix, source, room, codes.get()};
  parallel(
      threads,
      [](void* data, int thread, int team) {
        const Call& c = *static_cast<Call*>(data);
        const griffin_matrix& m = c.matrix;
        uint8_t* const own = c.codes + thread * c.room;
        if (!m.neuron_major)
          return pack_rows(m, c.source, int64_t{m.d_out} * thread / team, int64_t{m.d_out} * (thread + 1) / team, own);
        const int64_t supers = (m.d_in + kSuper - 1) / kSuper;
        for (int64_t s = supers * thread / team; s < supers * (thread + 1) / team; s++)
          pack_neurons(m, c.source, s, own);
      },
      &call);
  return GRIFFIN_OK;
}

bool writable(const griffin_matrix* matrix, int threads) {
  return matrix && threads >= 1 && matrix->format == GRIFFIN_GROUPED && valid_matrix(*matrix);
}

}  // namespace
}  // namespace griffin

using namespace griffin;

extern "C" {

int griffin_gguf_format(int type, griffin_grouped* format, int32_t* block_weights, int32_t* block_bytes) {
  const GgufType* const found = gguf_type(type);
  if (!found || !format || !block_weights || !block_bytes) return GRIFFIN_BAD_ARGUMENT;
  *format = found->format, *block_weights = found->weights, *block_bytes = found->bytes;
  return GRIFFIN_OK;
}

int64_t griffin_grouped_bytes(const griffin_matrix* matrix, griffin_parts* parts) {
  if (!matrix || !parts || !valid_grouped(matrix->grouped) || matrix->d_in < 1 || matrix->d_out < 1 ||
      matrix->d_in > kMaxSupers * kSuper)
    return -1;
  const auto tell = [&](int64_t codes, const int64_t* part, int64_t bytes) {
    *parts = {kBlock, plane_count(matrix->grouped.bits), codes, {}, bytes};
    memcpy(parts->begin, part, sizeof parts->begin);
  };
  if (!matrix->neuron_major) {
    const RowPlan p = row_plan(matrix->grouped, matrix->d_in);
    tell(p.codes, p.part, p.bytes);
    return 0;
  }
  const NeuronPlan p = neuron_plan(matrix->grouped, matrix->d_out, matrix->d_in);
  tell(0, p.part, p.bytes);
  return p.scale_bytes;
}

int griffin_pack_gguf(const griffin_matrix* matrix, int type, const void* blocks, const int64_t* row_order,
                      int threads) {
  const GgufType* const found = gguf_type(type);
  if (!writable(matrix, threads) || !found || !blocks ||
      memcmp(&matrix->grouped, &found->format, sizeof found->format) || matrix->d_in % found->weights)
    return GRIFFIN_BAD_ARGUMENT;
  GgufSource source;
  source.base = static_cast<const uint8_t*>(blocks);
  source.row_bytes = int64_t{matrix->d_in} / found->weights * found->bytes;
  source.number = type, source.type = found, source.order = row_order;
  return pack(*matrix, source, threads);
}

int griffin_pack_codes(const griffin_matrix* matrix, const griffin_codes* from, int threads) {
  if (!writable(matrix, threads) || !from || !from->codes || !from->scale) return GRIFFIN_BAD_ARGUMENT;
  const griffin_grouped& f = matrix->grouped;
  if ((has_supers(f) && !from->sub) || (f.offset != GRIFFIN_OFFSET_NONE && !from->offset) ||
      (f.offset == GRIFFIN_OFFSET_SUB && !from->sub_offset))
    return GRIFFIN_BAD_ARGUMENT;
  CodeSource source;
  source.from = from, source.format = &f, source.d_in = up_to(matrix->d_in, f.group);
  return pack(*matrix, source, threads);
}

}  // extern "C"
