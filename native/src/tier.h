// The second tier: the gates of all experts, and of which of them a token wants up and down.
#pragma once
#include "inputs.h"

namespace griffin {

// The experts that some row wants: places in griffin_rows::experts, ascending, and which rows want each (null: all do).
struct Chosen {
  const int32_t* places;
  const uint16_t* masks;
  int64_t count;
  const float* gates;  // act(gate) of every expert, (rows, stride)
  int64_t stride;
};

class Tier {
 public:
  // Whether a call with this tier can be computed.
  static bool valid(const griffin_ff_block& block, const griffin_tier& tier);
  static int64_t floats(const griffin_ff_block& block, const griffin_rows& rows, int threads);
  Tier(const griffin_ff_block& block, const griffin_rows& rows, float* memory);

  int format() const { return format_; }  // what `gate` wants its inputs prepared for
  // This thread's share of the gates. No barrier is inside.
  void gate(const Inputs& x, int thread, int threads);
  // After a barrier. Every thread chooses for itself, which is cheaper than waiting for one that does it for all.
  Chosen choose(int thread) const;

 private:
  static int64_t experts(const griffin_ff_block& block, const griffin_rows& rows) {
    return rows.experts ? rows.n_experts : block.d_ff;
  }

  const griffin_ff_block& block_;
  const griffin_rows& rows_;
  const griffin_tier& tier_;
  const int64_t n_, stride_;
  float *gates_, *scores_, *own_;
  // Where the gate's rows, their scales and biases are, strides in bytes.
  int format_;
  const uint8_t* weight_;
  const float *scale_, *bias_;
  int64_t weight_stride_, scale_stride_;
};

}  // namespace griffin
