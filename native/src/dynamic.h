// Dynamic neuron selection: for each token, the gates of all experts, then the choice of the k experts whose up and
// down are read, and of how many planes of them. Its relatives TEAL and CATS threshold activations; here the k largest
// gate scores of a token are chosen.
#pragma once
#include "inputs.h"

namespace griffin {

// The experts that some row wants: places in griffin_io::experts, ascending, and which rows want each (null: all do).
struct Chosen {
  const int32_t* places;
  const uint16_t* masks;
  int64_t count;
  const float* gates;  // act(gate) of every expert, (rows, stride)
  int64_t stride;
  const uint8_t* levels;  // of every chosen one, (count, rows): planes of its up and down; null: all are read whole
};

class Dynamic {
 public:
  static int64_t floats(const griffin_ff_block& block, const griffin_io& io, int threads);
  Dynamic(const griffin_ff_block& block, const griffin_io& io, float* memory);

  // This thread's share of the gates. No barrier is inside.
  void gate(const Inputs& x, int thread, int threads);
  // After a barrier. Every thread makes the same choice, which is cheaper than waiting for one thread to make it.
  Chosen choose(int thread) const;

 private:
  // Gates of this thread's share, before the activation; returns the bytes that are read.
  int64_t float_gates(const Rows& of, int64_t begin, int64_t end);
  int64_t grouped_gates(const Rows& whole, const Rows& first, int64_t begin, int64_t end);

  static int64_t experts(const griffin_ff_block& block, const griffin_io& io) {
    return io.experts ? io.n_experts : block.up.d_out;
  }

  // Of one thread: room for scores, places, masks, levels.
  static int64_t own_floats(int64_t stride, int rows) { return 2 * stride + stride / 2 + (rows + 3) / 4 * stride; }

  const griffin_ff_block& block_;
  const griffin_io& io_;
  const griffin_dynamic& dynamic_;
  const int64_t n_, stride_;
  float *gates_, *scores_, *own_;
  const griffin_matrix& rows_;  // what the activation is of
  const float* const bias_;
};

}  // namespace griffin
