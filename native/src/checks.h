// Whether what a call describes can be computed. Sizes, formats and null pointers; not what the pointers point to.
#pragma once
#include "griffin_native.h"
#include "grouped.h"

namespace griffin {

inline bool valid_io(const griffin_io& io, int most = GRIFFIN_MAX_ROWS) {
  const bool types = (io.x_type == GRIFFIN_F32 || io.x_type == GRIFFIN_BF16) &&
                     (io.y_type == GRIFFIN_F32 || io.y_type == GRIFFIN_BF16);
  return io.x && io.y && types && io.rows >= 1 && io.rows <= most;
}

// Experts as griffin_io and griffin_experts have them.
template <class T>
bool valid_experts(const T& of) {
  if (!of.experts) return !of.row_mask;
  return of.n_experts >= 0 && (of.index_bytes == 4 || of.index_bytes == 8);
}

inline bool valid_matrix(const griffin_matrix& matrix) {
  if (!matrix.weight || matrix.d_in < 1 || matrix.d_out < 1 || matrix.format < GRIFFIN_F32) return false;
  if (matrix.format != GRIFFIN_GROUPED) return matrix.format < GRIFFIN_GROUPED;
  const griffin_grouped& f = matrix.grouped;
  if (matrix.table && ((f.bits != 4 && f.bits != 8) || has_supers(f) || f.offset != GRIFFIN_OFFSET_NONE)) return false;
  return valid_grouped(f) && matrix.d_in <= kMaxSupers * kSuper && (!matrix.neuron_major || matrix.scales);
}

// y = W x: a matrix whose rows are those of W.
inline bool valid_rows(const griffin_matrix& matrix) { return valid_matrix(matrix) && !matrix.neuron_major; }

inline bool valid_block(const griffin_ff_block& block) {
  if (block.activation < GRIFFIN_SILU || block.activation > GRIFFIN_RELU2) return false;
  if (!valid_rows(block.up) || !valid_matrix(block.down) || !block.down.neuron_major) return false;
  if (block.down.d_in != block.up.d_out || block.down.d_out != block.up.d_in) return false;
  const griffin_matrix& gate = block.gate;
  return !gate.weight || (valid_rows(gate) && gate.d_in == block.up.d_in && gate.d_out == block.up.d_out);
}

// Whether rows can be read to their first planes.
inline bool has_planes(const griffin_matrix& m) { return m.format == GRIFFIN_GROUPED && !m.table; }

inline bool valid_dynamic(const griffin_ff_block& block, const griffin_dynamic& dynamic) {
  if (!dynamic.weight || dynamic.weight_stride < 0 || dynamic.k < 1) return false;
  const griffin_matrix& gate = dynamic.gate;
  if (dynamic.n_levels) {
    const bool planes =
        has_planes(block.up) && has_planes(block.down) && (!block.gate.weight || has_planes(block.gate));
    if (!planes || gate.weight || !dynamic.whole || dynamic.n_levels < 1 || dynamic.n_levels > 4) return false;
    if (dynamic.first < 1 || dynamic.first > 4 || dynamic.levels[0] != dynamic.k) return false;
    for (int l = 1; l < dynamic.n_levels; l++)
      if (dynamic.levels[l] < 0 || dynamic.levels[l] > dynamic.levels[l - 1]) return false;
  }
  return !gate.weight || (valid_rows(gate) && gate.d_in == block.up.d_in && gate.d_out == block.up.d_out);
}

// T: griffin_io or griffin_experts, with a compact block.
template <class T>
bool valid_compact(const griffin_ff_block& block, const T& of) {
  const griffin_ff_block& own = *of.compact;
  if (!of.experts || of.dynamic || !valid_block(own) || !own.gate.weight != !block.gate.weight) return false;
  if (!has_planes(own.up) || !has_planes(own.down) || (own.gate.weight && !has_planes(own.gate))) return false;
  return own.up.d_in == block.up.d_in && own.up.d_out == block.up.d_out;
}

}  // namespace griffin
