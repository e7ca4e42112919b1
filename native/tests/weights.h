// Random weights in every format, and what they mean.
#pragma once
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "griffin_decode.h"
#include "griffin_gguf.h"

namespace {

std::mt19937 rng(1);
int failures = 0;

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }
float normal() { return std::normal_distribution<float>()(rng); }

uint16_t to_bf16(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return static_cast<uint16_t>(bits >> 16);
}
float from_bf16(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
float from_half(uint16_t v) {
  const float magnitude = v >> 10 & 31 ? ldexpf(static_cast<float>(1024 + (v & 1023)), (v >> 10 & 31) - 25)
                                       : ldexpf(static_cast<float>(v & 1023), -24);
  return v & 0x8000 ? -magnitude : magnitude;
}
uint16_t random_half(int low = 0x2000, int high = 0x2fff) { return static_cast<uint16_t>(between(low, high)); }

void expect(bool right, const char* what) {
  if (!right) failures++, printf("%s\n", what);
}

// How weights are stored: floats, the blocks of a GGUF type, or codes in any other format of groups.
struct Kind {
  int format = GRIFFIN_F32;
  int gguf = -1;
  griffin_grouped grouped{};
  int block = 1;  // d_in is a multiple of it

  std::string name() const {
    char text[80];
    snprintf(text, sizeof text, "format %d gguf %d (%d bits, %d, scale %d, offset %d, span %d)", format, gguf,
             grouped.bits, grouped.group, grouped.scale, grouped.offset, grouped.span);
    return text;
  }
};

std::vector<Kind> all_kinds() {
  std::vector<Kind> kinds(3);
  kinds[1].format = GRIFFIN_BF16, kinds[2].format = GRIFFIN_F16;
  for (int type = 0; type < 32; type++) {
    Kind kind;
    kind.format = GRIFFIN_GROUPED, kind.gguf = type;
    int32_t bytes;
    if (griffin_gguf_format(type, &kind.grouped, &kind.block, &bytes) == GRIFFIN_OK) kinds.push_back(kind);
  }
  expect(kinds.size() == 13, "there are ten types of GGUF blocks");
  for (const int bits : {2, 3, 4, 5, 6, 8})
    for (const int group : {16, 32})
      for (int scale = GRIFFIN_SCALE_SUB_UNSIGNED; scale <= GRIFFIN_SCALE_F32; scale++)
        for (int offset = GRIFFIN_OFFSET_NONE; offset <= GRIFFIN_OFFSET_CODE; offset++) {
          const bool sub = scale <= GRIFFIN_SCALE_SUB_SIGNED;
          if (sub ? offset > GRIFFIN_OFFSET_SUB : offset == GRIFFIN_OFFSET_SUB) continue;
          Kind kind;
          kind.format = GRIFFIN_GROUPED;
          const int zero = offset == GRIFFIN_OFFSET_NONE ? 1 << (bits - 1) : 0;
          const int span = sub ? 256 : group << between(0, group == 16 ? 4 : 3);
          kind.grouped = {static_cast<uint8_t>(bits),   static_cast<uint8_t>(group), static_cast<uint8_t>(scale),
                          static_cast<uint8_t>(offset), static_cast<uint16_t>(zero), static_cast<uint16_t>(span)};
          kinds.push_back(kind);
        }
  return kinds;
}

int size_of_kind(const Kind& kind, int wanted) { return (wanted + kind.block - 1) / kind.block * kind.block; }

// Random blocks of a GGUF type, with scales that are numbers of a common size.
std::vector<uint8_t> random_blocks(int type, int64_t count, int block_bytes) {
  std::vector<uint8_t> blocks(static_cast<size_t>(count * block_bytes));
  for (uint8_t& byte : blocks) byte = static_cast<uint8_t>(rng());
  const bool two = type == GRIFFIN_GGUF_Q4_1 || type == GRIFFIN_GGUF_Q5_1 || type == GRIFFIN_GGUF_Q4_K ||
                   type == GRIFFIN_GGUF_Q5_K || type == GRIFFIN_GGUF_Q2_K;
  const int at = type == GRIFFIN_GGUF_Q2_K ? 80 : type == GRIFFIN_GGUF_Q3_K ? 108 : type == GRIFFIN_GGUF_Q6_K ? 208 : 0;
  for (int64_t b = 0; b < count; b++)
    for (int i = 0; i <= two; i++) {
      const uint16_t half = random_half() | static_cast<uint16_t>(between(0, 1) << 15);
      memcpy(blocks.data() + b * block_bytes + at + 2 * i, &half, 2);
    }
  return blocks;
}

// A matrix from random values; `values` is what they mean, rows of W or, neuron-major, of neurons.
struct Weights {
  std::vector<uint8_t> rows, scales;
  std::vector<float> values;
  griffin_matrix matrix{};
  double terms = 0;  // the largest |s * code| + |m| that a weight, which may be 0, is the difference of

  Weights(const Kind& kind, int d_out, int d_in, bool neuron_major = false) {
    matrix.d_in = d_in, matrix.d_out = d_out, matrix.format = kind.format, matrix.neuron_major = neuron_major;
    matrix.grouped = kind.grouped;
    const int n = neuron_major ? d_in : d_out, d = neuron_major ? d_out : d_in;
    values.resize(static_cast<size_t>(n) * d);
    if (kind.format == GRIFFIN_GROUPED) {
      griffin_parts parts;
      const int64_t scale_bytes = griffin_grouped_bytes(&matrix, &parts);
      const int64_t whole = (n + parts.block - 1) / parts.block * parts.block;
      rows.assign(static_cast<size_t>(parts.bytes * whole + GRIFFIN_SLACK), 0xff);
      scales.assign(static_cast<size_t>(scale_bytes), 0xff);
      matrix.weight = rows.data(), matrix.scales = neuron_major ? scales.data() : nullptr;
      kind.gguf >= 0 ? from_gguf(kind) : from_codes(kind);
    } else {
      matrix.stride = d * (kind.format == GRIFFIN_F32 ? 4 : 2);
      if (kind.format == GRIFFIN_F32) matrix.stride += 4 * between(0, 3);
      rows.resize(static_cast<size_t>(matrix.stride * n), 0xff);
      matrix.weight = rows.data();
      for (int i = 0; i < n; i++)
        for (int c = 0; c < d; c++) {
          const float v = normal();
          uint8_t* at = rows.data() + i * matrix.stride;
          const uint16_t half = kind.format == GRIFFIN_BF16 ? to_bf16(v) : random_half(0, 0x3fff);
          if (kind.format == GRIFFIN_F32)
            memcpy(at + 4 * c, &v, 4);
          else
            memcpy(at + 2 * c, &half, 2);
        }
    }
    expect(griffin_unpack(&matrix, nullptr, 0, n, 0, d, values.data(), GRIFFIN_F32, d, between(1, 3)) == GRIFFIN_OK,
           "unpack");
  }
  float at(int64_t o, int64_t i) const {  // of W
    return matrix.neuron_major ? values[static_cast<size_t>(i * matrix.d_out + o)]
                               : values[static_cast<size_t>(o * matrix.d_in + i)];
  }

 private:
  void from_gguf(const Kind& kind) {
    griffin_grouped format;
    int32_t weights, bytes;
    griffin_gguf_format(kind.gguf, &format, &weights, &bytes);
    const int64_t blocks = int64_t{matrix.d_out} * matrix.d_in / weights;
    const std::vector<uint8_t> file = random_blocks(kind.gguf, blocks, bytes);
    expect(griffin_pack_gguf(&matrix, kind.gguf, file.data(), nullptr, between(1, 3)) == GRIFFIN_OK, "pack_gguf");
  }

  void from_codes(const Kind& kind) {
    const griffin_grouped& f = kind.grouped;
    const bool sub = f.scale <= GRIFFIN_SCALE_SUB_SIGNED;
    const int padded = (matrix.d_in + f.group - 1) / f.group * f.group, groups = padded / f.group;
    const int spans = sub ? (padded + 255) / 256 : (padded + f.span - 1) / f.span, all = matrix.d_out * spans;
    std::vector<uint8_t> codes(static_cast<size_t>(matrix.d_out) * padded);
    for (uint8_t& code : codes) code = static_cast<uint8_t>(between(0, (1 << f.bits) - 1));
    std::vector<uint16_t> scale16(f.scale == GRIFFIN_SCALE_F32 ? 0 : all);
    std::vector<float> scale32(f.scale == GRIFFIN_SCALE_F32 ? all : 0);
    for (uint16_t& s : scale16) s = random_half();
    for (float& s : scale32) s = 0.01f * normal();
    std::vector<uint16_t> offset16(f.offset == GRIFFIN_OFFSET_SUB || f.offset == GRIFFIN_OFFSET_F16 ? all : 0);
    std::vector<uint8_t> offset8(f.offset == GRIFFIN_OFFSET_CODE ? all : 0);
    for (uint16_t& m : offset16) m = random_half() | static_cast<uint16_t>(between(0, 1) << 15);
    for (uint8_t& m : offset8) m = static_cast<uint8_t>(between(0, (1 << f.bits) - 1));
    std::vector<uint8_t> subs(sub ? matrix.d_out * groups : 0);
    std::vector<uint8_t> sub_offsets(f.offset == GRIFFIN_OFFSET_SUB ? matrix.d_out * groups : 0);
    for (uint8_t& s : subs) s = static_cast<uint8_t>(rng());
    for (uint8_t& s : sub_offsets) s = static_cast<uint8_t>(rng());
    const griffin_codes from{codes.data(), scale16.empty() ? static_cast<void*>(scale32.data()) : scale16.data(),
                             offset8.empty() ? static_cast<void*>(offset16.data()) : offset8.data(), subs.data(),
                             sub_offsets.data()};
    expect(griffin_pack_codes(&matrix, &from, between(1, 3)) == GRIFFIN_OK, "pack_codes");

    const int n = matrix.neuron_major ? matrix.d_in : matrix.d_out,
              d = matrix.neuron_major ? matrix.d_out : matrix.d_in;
    std::vector<float> found(values.size());
    griffin_unpack(&matrix, nullptr, 0, n, 0, d, found.data(), GRIFFIN_F32, d, 1);
    for (int64_t o = 0; o < matrix.d_out; o++)
      for (int64_t i = 0; i < matrix.d_in; i++) {
        const int64_t at = o * spans + i / (sub ? 256 : f.span), group = o * groups + i / f.group;
        double s = scale16.empty() ? scale32[at] : from_half(scale16[at]);
        if (sub) s *= f.scale == GRIFFIN_SCALE_SUB_SIGNED ? static_cast<int8_t>(subs[group]) : subs[group];
        double m = s * f.zero;
        if (f.offset == GRIFFIN_OFFSET_SUB) m = double{from_half(offset16[at])} * sub_offsets[group];
        if (f.offset == GRIFFIN_OFFSET_F16) m = -from_half(offset16[at]);
        if (f.offset == GRIFFIN_OFFSET_CODE) m = s * offset8[at];
        const double code = codes[o * padded + i], truth = s * code - m;
        terms = std::max(terms, fabs(s * code) + fabs(m));
        const float value = found[matrix.neuron_major ? i * d + o : o * d + i];
        if (fabs(value - truth) > 1e-6 * (fabs(s * code) + fabs(m))) {
          failures++, printf("unpack %s: %g instead of %g, W %d %d at %d %d, neuron-major %d, s %g sub %d m %g, %s\n",
                             griffin_isa(), value, truth, matrix.d_out, matrix.d_in, int(o), int(i),
                             matrix.neuron_major, s, sub ? subs[group] : -1, m, kind.name().c_str());
          return;
        }
      }
  }
};

}  // namespace
