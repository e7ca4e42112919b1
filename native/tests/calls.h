// One call: random inputs, and what its results may differ by.
#pragma once
#include "weights.h"

namespace {

struct Case {
  int d, d_ff, rows, threads, activation;
  bool gated, bf16_x, bf16_y, biased;
};

Case random_case(int d, int d_ff, int rows) {
  return {d,
          d_ff,
          rows,
          between(1, 4),
          between(0, 4),
          between(0, 1) == 1,
          between(0, 1) == 1,
          between(0, 1) == 1,
          between(0, 1) == 1};
}

double act(int activation, double v) {
  switch (activation) {
    case GRIFFIN_SILU: return v / (1 + exp(-v));
    case GRIFFIN_GELU: return 0.5 * v * (1 + erf(v / sqrt(2.0)));
    case GRIFFIN_GELU_TANH: return 0.5 * v * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (v + 0.044715 * v * v * v)));
    case GRIFFIN_RELU: return v > 0 ? v : 0;
    default: return v > 0 ? v * v : 0;
  }
}
double slope(int activation, double v) { return activation == GRIFFIN_RELU2 ? 2 * fabs(v) + 1e-3 : 1.2; }

// A value and how far the library may be from it: float32 sums; grouped weights meet inputs of 15 bits, neuron-major
// ones of 8.
struct Value {
  double value, error;
};

// One output of W x + b. Grouped: the inputs' rounding, of steps of the largest / 16256, neuron-major / 127: 5.6 standard
// deviations, 1 / sqrt(12) of a step each.
constexpr double kOfInputs = 1.62 / 16256, kOfNeurons = 1.62 / 127;
Value product(const Weights& w, int64_t o, const float* x, double bias) {
  double sum = bias, squares = bias * bias, weights = 0, top = 0;
  for (int i = 0; i < w.matrix.d_in; i++) {
    const double v = w.at(o, i), term = v * x[i];
    sum += term, squares += term * term, weights += v * v, top = std::max(top, fabs(double{x[i]}));
  }
  const bool grouped = w.matrix.format == GRIFFIN_GROUPED;
  return {sum, 1e-5 * sqrt(squares) + 2e-7 * w.terms * sqrt(w.matrix.d_in) * top +
                   (grouped ? (w.matrix.neuron_major ? kOfNeurons : kOfInputs) * sqrt(weights) * top : 0)};
}

// bf16 rounds y.
void compare(const std::string& what, const Case& c, const std::vector<Value>& expected, const std::vector<double>& y) {
  double error = 0, limit = 1e-12;
  for (size_t i = 0; i < y.size(); i++) {
    const double miss = y[i] - expected[i].value, round = c.bf16_y ? 0.004 * expected[i].value : 0;
    error += miss * miss;
    limit += expected[i].error * expected[i].error + round * round;
  }
  if (error <= limit) return;
  failures++;
  printf("%s %s d %d d_ff %d rows %d threads %d act %d gated %d biased %d bf16 %d %d: error %g, limit %g\n",
         what.c_str(), griffin_isa(), c.d, c.d_ff, c.rows, c.threads, c.activation, c.gated, c.biased, c.bf16_x,
         c.bf16_y, sqrt(error), sqrt(limit));
}

struct Call {  // x and y of one call, y poisoned with NaN
  std::vector<float> xf, yf, x_value;
  std::vector<uint16_t> xb, yb;
  griffin_io io{};

  Call(const Case& c, int d_in, int d_out) {
    x_value.resize(static_cast<size_t>(c.rows) * d_in);
    for (float& v : x_value) v = normal();
    if (c.bf16_x)
      for (float& v : x_value) xb.push_back(to_bf16(v)), v = from_bf16(xb.back());
    else
      xf = x_value;
    c.bf16_y ? yb.assign(static_cast<size_t>(c.rows) * d_out, 0x7fc0)
             : yf.assign(static_cast<size_t>(c.rows) * d_out, NAN);
    io.x = c.bf16_x ? static_cast<const void*>(xb.data()) : xf.data();
    io.y = c.bf16_y ? static_cast<void*>(yb.data()) : yf.data();
    io.x_type = c.bf16_x ? GRIFFIN_BF16 : GRIFFIN_F32;
    io.y_type = c.bf16_y ? GRIFFIN_BF16 : GRIFFIN_F32;
    io.x_stride = d_in * (c.bf16_x ? 2 : 4);
    io.y_stride = d_out * (c.bf16_y ? 2 : 4);
    io.rows = c.rows;
  }
  std::vector<double> y() const {
    std::vector<double> out(yf.begin(), yf.end());
    for (const uint16_t v : yb) out.push_back(from_bf16(v));
    return out;
  }
};

std::vector<float> random_bias(bool there, int n) {
  std::vector<float> bias;
  for (int i = 0; there && i < n; i++) bias.push_back(normal());
  return bias;
}
const float* or_null(const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); }

}  // namespace
