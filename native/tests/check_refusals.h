// Calls that must be refused, and inputs that are not finite.
#pragma once
#include "calls.h"

namespace {

// What is refused, of a matrix that is otherwise right.
void check_refusals(const Kind& kind) {
  Weights w(kind, 40, 256);
  Weights down(kind, 256, 40 * kind.block, true);
  const Case c{256, 40, 3, 1, 0, false, false, false, false};
  Call call(c, 256, 40);
  std::vector<uint8_t> bytes(1 << 20);
  const griffin_codes codes{bytes.data(), bytes.data(), bytes.data(), bytes.data(), bytes.data()};
  griffin_matrix& m = w.matrix;
  const bool grouped = kind.format == GRIFFIN_GROUPED;
  const auto refused = [&](const char* what) {
    griffin_parts parts;
    bool all =
        griffin_matvec(&m, &call.io, 1) == GRIFFIN_BAD_ARGUMENT &&
        griffin_unpack(&m, nullptr, 0, 1, 0, m.d_in, bytes.data(), GRIFFIN_F32, m.d_in, 1) == GRIFFIN_BAD_ARGUMENT &&
        griffin_pack_codes(&m, &codes, 1) == GRIFFIN_BAD_ARGUMENT;
    if (kind.gguf >= 0) all &= griffin_pack_gguf(&m, kind.gguf, bytes.data(), nullptr, 1) == GRIFFIN_BAD_ARGUMENT;
    if (grouped && m.weight) all &= griffin_grouped_bytes(&m, &parts) == -1;
    if (!all) failures++, printf("a wrong %s is taken, %s\n", what, kind.name().c_str());
  };
  const auto refuses = [&](const char* what, auto& place, auto value) {
    const auto before = place;
    place = static_cast<std::remove_reference_t<decltype(place)>>(value);
    refused(what);
    place = before;
  };
  refuses("weight", m.weight, nullptr);
  refuses("width", m.d_in, 0);
  refuses("width", m.d_in, -1);
  refuses("height", m.d_out, 0);
  if (grouped) {
    refuses("width", m.d_in, 131072 + 256);
    for (const int bits : {0, 1, 7, 9, 255}) refuses("number of bits", m.grouped.bits, bits);
    for (const int group : {0, 8, 48, 64, 255}) refuses("group", m.grouped.group, group);
    for (const int span : {0, 1, 24, 96, 257, 512, 65535}) refuses("span", m.grouped.span, span);
    refuses("scale", m.grouped.scale, 4);
    refuses("offset", m.grouped.offset, 4);
    const bool sub = kind.grouped.scale <= GRIFFIN_SCALE_SUB_SIGNED;
    refuses("offset", m.grouped.offset, sub ? GRIFFIN_OFFSET_F16 : GRIFFIN_OFFSET_SUB);
  }
  const auto bad = [&](const char* what, int status) {
    if (status != GRIFFIN_BAD_ARGUMENT) failures++, printf("%s is taken, %s\n", what, kind.name().c_str());
  };
  bad("a null matrix", griffin_matvec(nullptr, &call.io, 1));
  bad("a null call", griffin_matvec(&m, nullptr, 1));
  bad("no thread", griffin_matvec(&m, &call.io, 0));
  for (const int rows : {0, -1, grouped ? 0 : 17}) {
    call.io.rows = rows;
    bad("a number of rows", griffin_matvec(&m, &call.io, 1));
  }
  call.io.rows = 3, call.io.x_type = GRIFFIN_F16;
  bad("x in float16", griffin_matvec(&m, &call.io, 1));
  call.io.x_type = GRIFFIN_F32;
  if (!grouped)
    m.neuron_major = 1, bad("a neuron-major float matrix", griffin_matvec(&m, &call.io, 1)), m.neuron_major = 0;
  const auto unpack = [&](const griffin_matrix& of, int64_t first, int64_t n, int64_t begin, int64_t end, int type) {
    bad("a range of unpack", griffin_unpack(&of, nullptr, first, n, begin, end, bytes.data(), type, end, 1));
  };
  unpack(m, 0, 41, 0, 256, 0), unpack(m, -1, 2, 0, 256, 0), unpack(m, 40, 1, 0, 256, 0), unpack(m, 0, -1, 0, 256, 0);
  unpack(m, 0, 1, 0, 255, 0), unpack(m, 0, 1, 0, 257, 0), unpack(m, 0, 1, 0, 256, GRIFFIN_F16);
  unpack(down.matrix, 0, 1, 16, 256, 0), unpack(down.matrix, 0, 1, 0, 257, 0), unpack(down.matrix, 0, 1, -256, 1, 0);
  const int64_t far[] = {0, 40};
  bad("a row beyond the last", griffin_unpack(&m, far, 0, 2, 0, 256, bytes.data(), GRIFFIN_F32, 256, 1));
  if (!grouped) return;
  griffin_parts parts;
  down.matrix.scales = nullptr;
  unpack(down.matrix, 0, 1, 0, 256, 0);
  bad("a matrix without scales", griffin_pack_codes(&down.matrix, &codes, 1));
  expect(griffin_grouped_bytes(nullptr, &parts) == -1 && griffin_grouped_bytes(&m, nullptr) == -1, "bytes of nothing");
  for (const int part : {0, 1, 2, 3, 4}) {
    griffin_codes less = codes;
    const bool sub = kind.grouped.scale <= GRIFFIN_SCALE_SUB_SIGNED,
               offset = kind.grouped.offset != GRIFFIN_OFFSET_NONE;
    if (part == 0) less.codes = nullptr;
    if (part == 1) less.scale = nullptr;
    if (part == 2 && offset) less.offset = nullptr;
    if (part == 3 && sub) less.sub = nullptr;
    if (part == 4 && kind.grouped.offset == GRIFFIN_OFFSET_SUB) less.sub_offset = nullptr;
    if (memcmp(&less, &codes, sizeof less)) bad("a missing array of codes", griffin_pack_codes(&m, &less, 1));
  }
  if (kind.gguf < 0) return;
  bad("an unknown type", griffin_pack_gguf(&m, 99, bytes.data(), nullptr, 1));
  bad("another type", griffin_pack_gguf(&m, kind.gguf == GRIFFIN_GGUF_Q8_0 ? GRIFFIN_GGUF_Q4_0 : GRIFFIN_GGUF_Q8_0,
                                        bytes.data(), nullptr, 1));
  bad("no blocks", griffin_pack_gguf(&m, kind.gguf, nullptr, nullptr, 1));
  m.d_in = 250;
  bad("a part of a block", griffin_pack_gguf(&m, kind.gguf, bytes.data(), nullptr, 1));
}

// Inputs that are not finite are not finite in what comes out of their rows, and only there.
void check_not_finite(const Kind& kind, float value) {
  const int d = size_of_kind(kind, 70), d_ff = size_of_kind(kind, 33);
  const Weights gate(kind, d_ff, d), up(kind, d_ff, d), down(kind, d, d_ff, true);
  griffin_ff_block block{gate.matrix, up.matrix, down.matrix, GRIFFIN_SILU, 0};
  const Case c{d, d_ff, 3, 2, 0, true, between(0, 1) == 1, false, false};
  Call call(c, d, d);
  const size_t at = static_cast<size_t>(d) + static_cast<size_t>(between(0, d - 1));
  c.bf16_x ? void(call.xb[at] = to_bf16(value)) : void(call.xf[at] = value);
  griffin_ff(&block, &call.io, 2);
  bool right = true;
  for (int r = 0; r < 3; r++)
    for (int i = 0; i < d; i++) right &= (fabsf(call.yf[static_cast<size_t>(r) * d + i]) < 1e30f) == (r != 1);
  if (!right) failures++, printf("%g in x: %s\n", value, kind.name().c_str());
}

}  // namespace
