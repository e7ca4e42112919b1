#include "inputs.h"

#include <string.h>

namespace griffin {

Inputs::Inputs(const griffin_io& io, int format, int d, void* memory)
    : kernels_(kernels()), io_(io), d_(d), integer_(format == GRIFFIN_INT8 || format == GRIFFIN_INT4),
      bf16_(format == GRIFFIN_BF16 && io.x_type == GRIFFIN_BF16 && kernels_.dot_bf16),
      dot_(bf16_ ? kernels_.dot_bf16 : kernels_.dot[format]) {
  const int64_t n = io.rows * d_padded(d);
  f32_ = static_cast<float*>(memory);
  lane_scale_ = f32_ + n;
  bf16_rows_ = reinterpret_cast<uint16_t*>(lane_scale_ + n / 4);
  q_ = reinterpret_cast<int8_t*>(bf16_rows_ + n);
  group_scale_ = reinterpret_cast<float*>(q_ + n);
  group_sum8_ = group_scale_ + n / kGroup;
  const int64_t pad = d_padded(d);
  for (int r = 0; r < io.rows; r++) {
    Input& in = input_[r];
    if (bf16_) {
      in.bf16 = bf16_rows_ + r * pad;
    } else if (integer_) {
      in.q = q_ + r * pad;
      in.lane_scale = lane_scale_ + r * pad / 4;
      in.group_scale = group_scale_ + r * pad / kGroup;
      in.group_sum8 = group_sum8_ + r * pad / kGroup;
    } else {
      in.f32 = f32_ + r * pad;
    }
  }
}

void Inputs::prepare(int thread, int threads) {
  const int64_t pad = d_padded(d_);
  for (int r = thread; r < io_.rows; r += threads) {
    const char* x = static_cast<const char*>(io_.x) + r * io_.x_stride;
    if (bf16_) {
      memcpy(bf16_rows_ + r * pad, x, sizeof(uint16_t) * d_);
      memset(bf16_rows_ + r * pad + d_, 0, sizeof(uint16_t) * (pad - d_));
      continue;
    }
    float* row = f32_ + r * pad;
    if (io_.x_type == GRIFFIN_BF16)
      kernels_.widen(reinterpret_cast<const uint16_t*>(x), row, d_);
    else
      memcpy(row, x, sizeof(float) * d_);
    memset(row + d_, 0, sizeof(float) * (pad - d_));
    if (integer_)
      input_[r].sum128 = kernels_.quantise(row, static_cast<int>(pad), q_ + r * pad, lane_scale_ + r * pad / 4,
                                           group_scale_ + r * pad / kGroup, group_sum8_ + r * pad / kGroup);
  }
}

}  // namespace griffin
