#include "gguf_blocks.h"

#include <string.h>

#include "griffin_gguf.h"

namespace griffin {
namespace {

void nibbles(const uint8_t* bytes, int n, uint8_t* low, uint8_t* high) {
  for (int i = 0; i < n; i++) low[i] = bytes[i] & 15, high[i] = bytes[i] >> 4;
}

// Eight pairs of 6-bit scales and offsets in 12 bytes.
void six_bit_pairs(const uint8_t* bytes, uint8_t* scale, uint8_t* offset) {
  for (int i = 0; i < 4; i++) {
    scale[i] = bytes[i] & 63, offset[i] = bytes[i + 4] & 63;
    scale[i + 4] = static_cast<uint8_t>((bytes[i + 8] & 15) | bytes[i] >> 6 << 4);
    offset[i + 4] = static_cast<uint8_t>(bytes[i + 8] >> 4 | bytes[i + 4] >> 6 << 4);
  }
}

}  // namespace

void small_block(int type, const uint8_t* block, int i, Piece& to) {
  uint8_t* const codes = to.codes + 32 * i;
  const bool offset = type == GRIFFIN_GGUF_Q4_1 || type == GRIFFIN_GGUF_Q5_1;
  memcpy(to.scale + 2 * i, block, 2), block += 2;
  if (offset) memcpy(to.offset + 2 * i, block, 2), block += 2;
  if (type == GRIFFIN_GGUF_Q8_0) {
    for (int j = 0; j < 32; j++) codes[j] = static_cast<uint8_t>(block[j] ^ 128);  // + 128 of a signed byte
    return;
  }
  uint32_t fifth = 0;
  const bool five = type == GRIFFIN_GGUF_Q5_0 || type == GRIFFIN_GGUF_Q5_1;
  if (five) memcpy(&fifth, block, 4), block += 4;
  nibbles(block, 16, codes, codes + 16);
  if (five)
    for (int j = 0; j < 32; j++) codes[j] = static_cast<uint8_t>(codes[j] | (fifth >> j & 1) << 4);
}

void super_block(int type, const uint8_t* block, Piece& to) {
  uint8_t* const codes = to.codes;
  switch (type) {
    case GRIFFIN_GGUF_Q2_K:
      for (int i = 0; i < 16; i++) to.sub[i] = block[i] & 15, to.sub_offset[i] = block[i] >> 4;
      for (int half = 0; half < 2; half++)
        for (int f = 0; f < 4; f++)
          for (int j = 0; j < 32; j++) codes[128 * half + 32 * f + j] = block[16 + 32 * half + j] >> 2 * f & 3;
      memcpy(to.scale, block + 80, 2), memcpy(to.offset, block + 82, 2);
      break;
    case GRIFFIN_GGUF_Q3_K: {
      const uint8_t *const high = block, *const low = block + 32, *const scales = block + 96;
      for (int half = 0; half < 2; half++)
        for (int f = 0; f < 4; f++)
          for (int j = 0; j < 32; j++)
            codes[128 * half + 32 * f + j] =
                static_cast<uint8_t>((low[32 * half + j] >> 2 * f & 3) | (high[j] >> (4 * half + f) & 1) << 2);
      for (int i = 0; i < 16; i++) {
        const int four = i < 8 ? scales[i] & 15 : scales[i - 8] >> 4, two = scales[8 + i % 4] >> 2 * (i / 4) & 3;
        to.sub[i] = static_cast<uint8_t>((four | two << 4) - 32);
      }
      memcpy(to.scale, block + 108, 2);
      break;
    }
    case GRIFFIN_GGUF_Q4_K:
    case GRIFFIN_GGUF_Q5_K: {
      const bool five = type == GRIFFIN_GGUF_Q5_K;
      memcpy(to.scale, block, 2), memcpy(to.offset, block + 2, 2);
      six_bit_pairs(block + 4, to.sub, to.sub_offset);
      const uint8_t *const high = block + 16, *const low = block + (five ? 48 : 16);
      for (int i = 0; i < 4; i++) nibbles(low + 32 * i, 32, codes + 64 * i, codes + 64 * i + 32);
      if (five)
        for (int g = 0; g < 8; g++)
          for (int j = 0; j < 32; j++)
            codes[32 * g + j] = static_cast<uint8_t>(codes[32 * g + j] | (high[j] >> g & 1) << 4);
      break;
    }
    default: {  // Q6_K
      const uint8_t *const low = block, *const high = block + 128;
      for (int half = 0; half < 2; half++)
        for (int j = 0; j < 32; j++) {
          const uint8_t a = low[64 * half + j], b = low[64 * half + 32 + j], h = high[32 * half + j];
          uint8_t* const out = codes + 128 * half + j;
          out[0] = static_cast<uint8_t>((a & 15) | (h & 3) << 4),
          out[32] = static_cast<uint8_t>((b & 15) | (h >> 2 & 3) << 4);
          out[64] = static_cast<uint8_t>(a >> 4 | (h >> 4 & 3) << 4),
          out[96] = static_cast<uint8_t>(b >> 4 | (h >> 6) << 4);
        }
      memcpy(to.sub, block + 192, 16), memcpy(to.scale, block + 208, 2);
    }
  }
}

const GgufType* gguf_type(int type) {
  static constexpr GgufType q4_0{32, 18, {4, 32, GRIFFIN_SCALE_F16, GRIFFIN_OFFSET_NONE, 8, 32}};
  static constexpr GgufType q4_1{32, 20, {4, 32, GRIFFIN_SCALE_F16, GRIFFIN_OFFSET_F16, 0, 32}};
  static constexpr GgufType q5_0{32, 22, {5, 32, GRIFFIN_SCALE_F16, GRIFFIN_OFFSET_NONE, 16, 32}};
  static constexpr GgufType q5_1{32, 24, {5, 32, GRIFFIN_SCALE_F16, GRIFFIN_OFFSET_F16, 0, 32}};
  static constexpr GgufType q8_0{32, 34, {8, 32, GRIFFIN_SCALE_F16, GRIFFIN_OFFSET_NONE, 128, 32}};
  static constexpr GgufType q2_k{256, 84, {2, 16, GRIFFIN_SCALE_SUB_UNSIGNED, GRIFFIN_OFFSET_SUB, 0, 256}};
  static constexpr GgufType q3_k{256, 110, {3, 16, GRIFFIN_SCALE_SUB_SIGNED, GRIFFIN_OFFSET_NONE, 4, 256}};
  static constexpr GgufType q4_k{256, 144, {4, 32, GRIFFIN_SCALE_SUB_UNSIGNED, GRIFFIN_OFFSET_SUB, 0, 256}};
  static constexpr GgufType q5_k{256, 176, {5, 32, GRIFFIN_SCALE_SUB_UNSIGNED, GRIFFIN_OFFSET_SUB, 0, 256}};
  static constexpr GgufType q6_k{256, 210, {6, 16, GRIFFIN_SCALE_SUB_SIGNED, GRIFFIN_OFFSET_NONE, 32, 256}};
  switch (type) {
    case GRIFFIN_GGUF_Q4_0: return &q4_0;
    case GRIFFIN_GGUF_Q4_1: return &q4_1;
    case GRIFFIN_GGUF_Q5_0: return &q5_0;
    case GRIFFIN_GGUF_Q5_1: return &q5_1;
    case GRIFFIN_GGUF_Q8_0: return &q8_0;
    case GRIFFIN_GGUF_Q2_K: return &q2_k;
    case GRIFFIN_GGUF_Q3_K: return &q3_k;
    case GRIFFIN_GGUF_Q4_K: return &q4_k;
    case GRIFFIN_GGUF_Q5_K: return &q5_k;
    case GRIFFIN_GGUF_Q6_K: return &q6_k;
    default: return nullptr;
  }
}

}  // namespace griffin
