// The activations of griffin_native.h.
#pragma once
#include <math.h>

#include "griffin_native.h"

namespace griffin {

inline float activate(int activation, float v) {
  switch (activation) {
    case GRIFFIN_SILU: return v / (1.f + expf(-v));
    case GRIFFIN_GELU: return 0.5f * v * (1.f + erff(v * 0.70710678118654752f));
    // (1 + tanh y) / 2 = 1 / (1 + exp(-2 y)), which is faster
    case GRIFFIN_GELU_TANH: return v / (1.f + expf(-1.5957691216057308f * (v + 0.044715f * v * v * v)));
    case GRIFFIN_RELU: return v < 0.f ? 0.f : v;  // a NaN stays one
    default: return v < 0.f ? 0.f : v * v;
  }
}

}  // namespace griffin
