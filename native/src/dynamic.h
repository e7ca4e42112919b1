// Dynamic neuron selection: for each token, the gates of all experts, then the choice of the k experts whose up and
// down are read. Its relatives TEAL and CATS threshold activations; here the k largest gate scores of a token are
// chosen.
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
  static int64_t experts(const griffin_ff_block& block, const griffin_io& io) {
    return io.experts ? io.n_experts : block.up.d_out;
  }

  const griffin_ff_block& block_;
  const griffin_io& io_;
  const griffin_dynamic& dynamic_;
  const int64_t n_, stride_;
  float *gates_, *scores_, *own_;
  const griffin_matrix& rows_;  // what the activation is of
  const float* const bias_;
};

}  // namespace griffin
