// Rows of input, prepared once a call for the weight format and shared by all threads.
#pragma once
#include "griffin_native.h"
#include "kernels.h"

namespace griffin {

constexpr int element_size(int type) { return type == GRIFFIN_F32 ? 4 : 2; }

class Inputs {
 public:
  static int64_t bytes(int d, int rows) { return round_up(rows * (d_padded(d) * 8 + d_padded(d) / 4), 64); }
  Inputs(const griffin_io& io, int format, int d, void* memory);
  void prepare(int thread, int threads);  // this thread's share of the rows; after a barrier they may be used
  const Input& operator[](int r) const { return input_[r]; }
  DotFn dot() const { return dot_; }

 private:
  static int64_t d_padded(int d) { return round_up(d, kPad); }

  const Kernels& kernels_;
  const griffin_io& io_;
  const int d_;
  const bool integer_;  // weights meet x in integers
  const bool bf16_;     // weights meet x in bf16
  DotFn dot_;
  float *f32_, *lane_scale_, *group_scale_, *group_sum8_;
  uint16_t* bf16_rows_;
  int8_t* q_;
  Input input_[GRIFFIN_MAX_ROWS];
};

}  // namespace griffin
