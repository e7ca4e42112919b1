// The blocks of GGUF files, by their published layouts.
#pragma once
#include "griffin_native.h"
#include "grouped.h"

namespace griffin {

// Up to 256 weights of a row: their codes, and what the formats keep beside them, as it is kept. Scales and offsets of
// their own are one a span (the first of 2 or 4 bytes each), those of a super-group are one.
struct Piece {
  uint8_t codes[kSuper];
  uint8_t scale[64], offset[32];
  uint8_t sub[16], sub_offset[16];
};

// A type of blocks: the weights and bytes of one, and the format that they are in.
struct GgufType {
  int weights, bytes;
  griffin_grouped format;
};

const GgufType* gguf_type(int type);  // null: there is none of that number
// Block number `i` of a type with 32 weights a block into its place in a piece.
void small_block(int type, const uint8_t* block, int i, Piece& to);
void super_block(int type, const uint8_t* block, Piece& to);

}  // namespace griffin
