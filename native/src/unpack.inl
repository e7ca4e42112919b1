// Plain loops that the compiler vectorises for the flags of the unit that includes this.
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "grouped.h"
#include "half.h"
#include "unpack.h"

namespace griffin {
namespace {

inline void put(float value, float* out) { *out = value; }
inline void put(float value, uint16_t* out) { *out = finite_to_bf16(value); }  // weights are finite

// The planes' bytes (at `plane`, one for each) as the codes of four fields, `n` bytes each.
inline void split_planes(const uint8_t* const* plane, int bits, int n, uint8_t (*field)[64]) {
  for (int f = 0; f < 4; f++) {
    for (int b = 0; b < n; b++) field[f][b] = (uint8_t)(plane[0][b] >> 2 * f & 3);
    for (int p = 1; p < bits / 2; p++)
      for (int b = 0; b < n; b++) field[f][b] = (uint8_t)(field[f][b] << 2 | (plane[p][b] >> 2 * f & 3));
  }
}
inline void add_bits(const uint8_t* bits, int n, uint8_t* codes) {
  for (int b = 0; b < n; b++) codes[b] = (uint8_t)(codes[b] << 1 | (bits[b / 8] >> b % 8 & 1));
}

// The codes of a row's chunk (groups g .. g + lanes), in their order.
inline void chunk_codes(const RowPlan& p, const RowAt& row, int g, int lanes, uint8_t* codes) {
  const int group = p.format.group, bits = p.format.bits, steps = group / 4, vectors = steps / 4;
  for (int v = 0; v < vectors; v++) {
    const uint8_t* plane[4];
    for (int i = 0; i < bits / 2; i++)
      plane[i] = row.part[i] + (i ? 0 : p.codes) + (int64_t)g * group / 4 + v * 4 * lanes;
    uint8_t field[4][64];
    split_planes(plane, bits, 4 * lanes, field);
    for (int f = 0; f < 4; f++) {
      const int t = v + f * vectors;
      if (bits % 2)
        add_bits(row.part[bits / 2] + (int64_t)(g / kChunkGroups) * (kChunkGroups / 2) * steps + t * ((lanes + 1) / 2),
                 4 * lanes, field[f]);
      for (int lane = 0; lane < lanes; lane++) memcpy(codes + lane * group + 4 * t, field[f] + 4 * lane, 4);
    }
  }
}

// The codes of a neuron's chunk of n outputs from `begin` on, in their order.
inline void neuron_codes(const NeuronPlan& p, const RowAt& row, int begin, int n, uint8_t* codes) {
  const int bits = p.format.bits, bytes = n / 4, blocks = bytes / kFieldBlock;
  const uint8_t* plane[4];
  for (int i = 0; i < bits / 2; i++) plane[i] = row.part[i] + begin / 4;
  uint8_t field[4][64];
  split_planes(plane, bits, bytes, field);
  for (int f = 0; f < 4; f++) {
    if (bits % 2) add_bits(row.part[bits / 2] + (begin + f * bytes) / 8, bytes, field[f]);
    for (int k = 0; k < blocks; k++)
      for (int i = 0; i < 4; i++) memcpy(codes + f * bytes + 4 * blocks * i + 4 * k, field[f] + 16 * k + 4 * i, 4);
  }
}

// out[i] = table[codes[i]] for i < n, a multiple of 16.
inline void look_up(const float* table, int bits, const uint8_t* codes, int n, float* out) {
#if defined(__AVX512F__)
  const __m512 all = _mm512_loadu_ps(table);
  for (int i = 0; i < n; i += 16) {
    const __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i)));
    _mm512_storeu_ps(out + i, bits == 4 ? _mm512_permutexvar_ps(at, all) : _mm512_i32gather_ps(at, table, 4));
  }
#elif defined(__AVX2__)
  (void)bits;
  for (int i = 0; i < n; i += 8) {
    const __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(codes + i)));
    _mm256_storeu_ps(out + i, _mm256_i32gather_ps(table, at, 4));
  }
#else
  (void)bits;
  for (int i = 0; i < n; i++) out[i] = table[codes[i]];
#endif
}

inline float half_at(const uint8_t* base, int64_t i) {
  uint16_t bits;
  memcpy(&bits, base + 2 * i, 2);
  return half_to_float(bits);
}
inline float float_at(const uint8_t* base, int64_t i) {
  float value;
  memcpy(&value, base + 4 * i, 4);
  return value;
}

// Scale and offset of a group, weight = s * (code - zero) - m. Where there is a zero, m is 0: so it is exact.
struct Affine {
  float s, m;
  int zero;
};
inline Affine affine_of(const griffin_grouped& f, float scale, float sub, float sub_offset, const uint8_t* offset,
                        int64_t at) {
  if (has_supers(f))
    return {scale * sub, f.offset == GRIFFIN_OFFSET_SUB ? half_at(offset, at) * sub_offset : 0.f, f.zero};
  if (f.offset == GRIFFIN_OFFSET_F16) return {scale, -half_at(offset, at), 0};
  return {scale, 0.f, f.offset == GRIFFIN_OFFSET_CODE ? offset[at] : f.zero};
}
inline float sub_at(const griffin_grouped& f, const uint8_t* sub, int64_t i) {
  return f.scale == GRIFFIN_SCALE_SUB_SIGNED ? (float)(int8_t)sub[i] : (float)sub[i];
}

template <class T> void unpack_grouped_row(const RowPlan& p, const float* table, const RowAt& at_row, int64_t d,
                                           T* out) {
  const uint8_t* const row = at_row.part[0];
  const griffin_grouped& f = p.format;
  const bool supers = has_supers(f);
  uint8_t codes[kChunkGroups * 32];
  for (int g = 0; g < p.groups; g += kChunkGroups) {
    const int lanes = p.groups - g < kChunkGroups ? p.groups - g : kChunkGroups;
    chunk_codes(p, at_row, g, lanes, codes);
    for (int lane = 0; lane < lanes; lane++) {
      const int64_t at = (int64_t)(g + lane) * f.group / (supers ? kSuper : f.span);
      const float scale = f.scale == GRIFFIN_SCALE_F32 ? float_at(row, at) : half_at(row, at);
      const float sub = supers ? sub_at(f, row + p.sub, g + lane) : 1.f;
      const Affine a = affine_of(f, scale, sub, supers ? (float)row[p.sub_offset + g + lane] : 0.f, row + p.offset, at);
      const uint8_t* const from = codes + lane * f.group;
      T values[32];
      float numbers[32];
      if (table) look_up(table, f.bits, from, f.group, numbers);
      if (table)
        for (int i = 0; i < f.group; i++) put(a.s * numbers[i], values + i);
      else
        for (int i = 0; i < f.group; i++) put(a.s * (float)((int)from[i] - a.zero) - a.m, values + i);
      const int64_t begin = (int64_t)(g + lane) * f.group, n = d - begin < f.group ? d - begin : f.group;
      memcpy(out + begin, values, (size_t)n * sizeof(T));
    }
  }
}

// Scales and offsets of a group of neurons, a chunk of outputs at a time.
template <class T>
void unpack_neuron(const NeuronPlan& p, const float* table, const uint8_t* scales, const void* weight, int64_t neuron,
                   int64_t begin, int64_t end, T* out) {
  const griffin_grouped& f = p.format;
  const bool supers = has_supers(f);
  const int64_t group = neuron / f.group;
  const uint8_t* const base = scales + (supers ? neuron / kSuper : neuron / f.span) * p.super_stride;
  const uint8_t* const sub = scales + p.sub + group * p.sub_stride;
  uint8_t codes[256];
  float s[256], m[256], values[256];
  for (int64_t at = begin; at < end; at += 256) {
    const int n = p.d - at < 256 ? (int)(p.d - at) : 256;
    neuron_codes(p, p.at(weight, neuron), (int)at, n, codes);
    for (int c = 0; c < n; c++) s[c] = f.scale == GRIFFIN_SCALE_F32 ? float_at(base, at + c) : half_at(base, at + c);
    if (f.scale == GRIFFIN_SCALE_SUB_UNSIGNED)
      for (int c = 0; c < n; c++) s[c] *= (float)sub[at + c];
    if (f.scale == GRIFFIN_SCALE_SUB_SIGNED)
      for (int c = 0; c < n; c++) s[c] *= (float)(int8_t)sub[at + c];
    const uint8_t* const offset = base + p.offset;
    if (table) {
      look_up(table, f.bits, codes, n, values);
      for (int c = 0; c < n; c++) values[c] *= s[c];
    } else if (f.offset == GRIFFIN_OFFSET_SUB) {
      for (int c = 0; c < n; c++) m[c] = half_at(offset, at + c) * (float)sub[p.sub_offset + at + c];
      for (int c = 0; c < n; c++) values[c] = s[c] * (float)codes[c] - m[c];
    } else if (f.offset == GRIFFIN_OFFSET_F16) {
      for (int c = 0; c < n; c++) values[c] = s[c] * (float)codes[c] + half_at(offset, at + c);
    } else if (f.offset == GRIFFIN_OFFSET_CODE) {
      for (int c = 0; c < n; c++) values[c] = s[c] * (float)((int)codes[c] - (int)offset[at + c]);
    } else {
      for (int c = 0; c < n; c++) values[c] = s[c] * (float)((int)codes[c] - f.zero);
    }
    const int64_t count = end - at < n ? end - at : n;
    for (int64_t c = 0; c < count; c++) put(values[c], out + (at - begin) + c);
  }
}

template <class T> void unpack_floats(int format, const uint8_t* row, int64_t begin, int64_t end, T* out) {
  for (int64_t c = begin; c < end; c++) {
    if (format == GRIFFIN_F32) {
      put(float_at(row, c), out + c - begin);
    } else {
      uint16_t half;
      memcpy(&half, row + 2 * c, 2);
      put(format == GRIFFIN_BF16 ? bf16_to_float(half) : half_to_float(half), out + c - begin);
    }
  }
}

template <class T> void unpack(const Unpack& u, int64_t from, int64_t to) {
  const griffin_matrix& matrix = *u.matrix;
  const bool grouped = matrix.format == GRIFFIN_GROUPED;
  RowPlan rows = {};
  NeuronPlan neurons = {};
  if (grouped && matrix.neuron_major) neurons = neuron_plan(matrix.grouped, matrix.d_out, matrix.d_in);
  if (grouped && !matrix.neuron_major) rows = row_plan(matrix.grouped, matrix.d_in);
  for (int64_t i = from; i < to; i++) {
    const int64_t which = u.rows ? u.rows[i] : u.first + i;
    T* const out = (T*)u.out + i * u.out_stride;
    if (!grouped)
      unpack_floats(matrix.format, (const uint8_t*)matrix.weight + which * matrix.stride, u.begin, u.end, out);
    else if (matrix.neuron_major)
      unpack_neuron(neurons, matrix.table, (const uint8_t*)matrix.scales, matrix.weight, which, u.begin, u.end, out);
    else
      unpack_grouped_row(rows, matrix.table, rows.at(matrix.weight, which), matrix.d_in, out);
  }
}

}  // namespace

void GRIFFIN_UNPACK(const Unpack& part, int64_t from, int64_t to) {
  if (part.bf16)
    unpack<uint16_t>(part, from, to);
  else
    unpack<float>(part, from, to);
}

}  // namespace griffin
