// Whether what a call describes can be computed. Sizes, formats and null pointers; not what the pointers point to.
#pragma once
#include "griffin_native.h"

namespace griffin {

inline bool valid_format(int format) { return format >= GRIFFIN_F32 && format <= GRIFFIN_INT4; }

inline bool valid_io(const griffin_io& io) {
  const bool types = (io.x_type == GRIFFIN_F32 || io.x_type == GRIFFIN_BF16) &&
                     (io.y_type == GRIFFIN_F32 || io.y_type == GRIFFIN_BF16);
  return io.x && io.y && types && io.rows >= 1 && io.rows <= GRIFFIN_MAX_ROWS;
}

// Experts as griffin_io and griffin_experts have them.
template <class T>
bool valid_experts(const T& of) {
  if (!of.experts) return !of.row_mask;
  return of.n_experts >= 0 && (of.index_bytes == 4 || of.index_bytes == 8);
}

inline bool valid_matrix(const griffin_matrix& matrix) {
  return matrix.weight && matrix.d_in >= 1 && matrix.d_out >= 1 && valid_format(matrix.format) &&
         (matrix.format != GRIFFIN_INT8 || matrix.scale);
}

inline bool valid_block(const griffin_ff_block& block) {
  if (!block.up || !block.down || block.d_model < 1 || block.d_ff < 1 || !valid_format(block.format)) return false;
  if (block.activation < GRIFFIN_SILU || block.activation > GRIFFIN_RELU2) return false;
  return block.format != GRIFFIN_INT8 || (block.up_scale && block.down_scale && (!block.gate || block.gate_scale));
}

inline bool valid_dynamic(const griffin_ff_block& block, const griffin_dynamic& dynamic) {
  if (!dynamic.weight || dynamic.weight_stride < 0 || dynamic.k < 1) return false;
  const griffin_matrix& gate = dynamic.gate;
  return !gate.weight || (valid_matrix(gate) && gate.d_in == block.d_model && gate.d_out == block.d_ff);
}

}  // namespace griffin
