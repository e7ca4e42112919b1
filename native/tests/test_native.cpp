// The library against plain double loops, made for the sanitizer build: every buffer is exactly as long as promised and
// on the heap, so that a read or write beyond it is caught. Random shapes, all formats and instruction sets; exits 1 on
// a miss.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "griffin_decode.h"
#include "griffin_gguf.h"

namespace {

std::mt19937 rng(1);
int failures = 0;

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }
float normal() { return std::normal_distribution<float>()(rng); }

uint16_t to_bf16(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return static_cast<uint16_t>(bits >> 16);
}
float from_bf16(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
float from_half(uint16_t v) {
  const float magnitude = v >> 10 & 31 ? ldexpf(static_cast<float>(1024 + (v & 1023)), (v >> 10 & 31) - 25)
                                       : ldexpf(static_cast<float>(v & 1023), -24);
  return v & 0x8000 ? -magnitude : magnitude;
}
uint16_t random_half(int low = 0x2000, int high = 0x2fff) { return static_cast<uint16_t>(between(low, high)); }

void expect(bool right, const char* what) {
  if (!right) failures++, printf("%s\n", what);
}

// How weights are stored: floats, the blocks of a GGUF type, or codes in any other format of groups.
struct Kind {
  int format = GRIFFIN_F32;
  int gguf = -1;
  griffin_grouped grouped{};
  int block = 1;  // d_in is a multiple of it

  std::string name() const {
    char text[80];
    snprintf(text, sizeof text, "format %d gguf %d (%d bits, %d, scale %d, offset %d, span %d)", format, gguf,
             grouped.bits, grouped.group, grouped.scale, grouped.offset, grouped.span);
    return text;
  }
};

std::vector<Kind> all_kinds() {
  std::vector<Kind> kinds(3);
  kinds[1].format = GRIFFIN_BF16, kinds[2].format = GRIFFIN_F16;
  for (int type = 0; type < 32; type++) {
    Kind kind;
    kind.format = GRIFFIN_GROUPED, kind.gguf = type;
    int32_t bytes;
    if (griffin_gguf_format(type, &kind.grouped, &kind.block, &bytes) == GRIFFIN_OK) kinds.push_back(kind);
  }
  expect(kinds.size() == 13, "there are ten types of GGUF blocks");
  for (const int bits : {2, 3, 4, 5, 6, 8})
    for (const int group : {16, 32})
      for (int scale = GRIFFIN_SCALE_SUB_UNSIGNED; scale <= GRIFFIN_SCALE_F32; scale++)
        for (int offset = GRIFFIN_OFFSET_NONE; offset <= GRIFFIN_OFFSET_CODE; offset++) {
          const bool sub = scale <= GRIFFIN_SCALE_SUB_SIGNED;
          if (sub ? offset > GRIFFIN_OFFSET_SUB : offset == GRIFFIN_OFFSET_SUB) continue;
          Kind kind;
          kind.format = GRIFFIN_GROUPED;
          const int zero = offset == GRIFFIN_OFFSET_NONE ? 1 << (bits - 1) : 0;
          const int span = sub ? 256 : group << between(0, group == 16 ? 4 : 3);
          kind.grouped = {static_cast<uint8_t>(bits),   static_cast<uint8_t>(group), static_cast<uint8_t>(scale),
                          static_cast<uint8_t>(offset), static_cast<uint16_t>(zero), static_cast<uint16_t>(span)};
          kinds.push_back(kind);
        }
  return kinds;
}

int size_of_kind(const Kind& kind, int wanted) { return (wanted + kind.block - 1) / kind.block * kind.block; }

// Random blocks of a GGUF type, with scales that are numbers of a common size.
std::vector<uint8_t> random_blocks(int type, int64_t count, int block_bytes) {
  std::vector<uint8_t> blocks(static_cast<size_t>(count * block_bytes));
  for (uint8_t& byte : blocks) byte = static_cast<uint8_t>(rng());
  const bool two = type == GRIFFIN_GGUF_Q4_1 || type == GRIFFIN_GGUF_Q5_1 || type == GRIFFIN_GGUF_Q4_K ||
                   type == GRIFFIN_GGUF_Q5_K || type == GRIFFIN_GGUF_Q2_K;
  const int at = type == GRIFFIN_GGUF_Q2_K ? 80 : type == GRIFFIN_GGUF_Q3_K ? 108 : type == GRIFFIN_GGUF_Q6_K ? 208 : 0;
  for (int64_t b = 0; b < count; b++)
    for (int i = 0; i <= two; i++) {
      const uint16_t half = random_half() | static_cast<uint16_t>(between(0, 1) << 15);
      memcpy(blocks.data() + b * block_bytes + at + 2 * i, &half, 2);
    }
  return blocks;
}

// A matrix from random values; `values` is what they mean, rows of W or, neuron-major, of neurons.
struct Weights {
  std::vector<uint8_t> rows, scales;
  std::vector<float> values;
  griffin_matrix matrix{};

  Weights(const Kind& kind, int d_out, int d_in, bool neuron_major = false) {
    matrix.d_in = d_in, matrix.d_out = d_out, matrix.format = kind.format, matrix.neuron_major = neuron_major;
    matrix.grouped = kind.grouped;
    const int n = neuron_major ? d_in : d_out, d = neuron_major ? d_out : d_in;
    values.resize(static_cast<size_t>(n) * d);
    if (kind.format == GRIFFIN_GROUPED) {
      griffin_parts parts;
      const int64_t scale_bytes = griffin_grouped_bytes(&matrix, &parts);
      const int64_t whole = (n + parts.block - 1) / parts.block * parts.block;
      rows.assign(static_cast<size_t>(parts.bytes * whole + GRIFFIN_SLACK), 0xff);
      scales.assign(static_cast<size_t>(scale_bytes), 0xff);
      matrix.weight = rows.data(), matrix.scales = neuron_major ? scales.data() : nullptr;
      kind.gguf >= 0 ? from_gguf(kind) : from_codes(kind);
    } else {
      matrix.stride = d * (kind.format == GRIFFIN_F32 ? 4 : 2);
      if (kind.format == GRIFFIN_F32) matrix.stride += 4 * between(0, 3);
      rows.resize(static_cast<size_t>(matrix.stride * n), 0xff);
      matrix.weight = rows.data();
      for (int i = 0; i < n; i++)
        for (int c = 0; c < d; c++) {
          const float v = normal();
          uint8_t* at = rows.data() + i * matrix.stride;
          const uint16_t half = kind.format == GRIFFIN_BF16 ? to_bf16(v) : random_half(0, 0x3fff);
          if (kind.format == GRIFFIN_F32)
            memcpy(at + 4 * c, &v, 4);
          else
            memcpy(at + 2 * c, &half, 2);
        }
    }
    expect(griffin_unpack(&matrix, nullptr, 0, n, 0, d, values.data(), GRIFFIN_F32, d, between(1, 3)) == GRIFFIN_OK,
           "unpack");
  }
  float at(int64_t o, int64_t i) const {  // of W
    return matrix.neuron_major ? values[static_cast<size_t>(i * matrix.d_out + o)]
                               : values[static_cast<size_t>(o * matrix.d_in + i)];
  }

 private:
  void from_gguf(const Kind& kind) {
    griffin_grouped format;
    int32_t weights, bytes;
    griffin_gguf_format(kind.gguf, &format, &weights, &bytes);
    const int64_t blocks = int64_t{matrix.d_out} * matrix.d_in / weights;
    const std::vector<uint8_t> file = random_blocks(kind.gguf, blocks, bytes);
    expect(griffin_pack_gguf(&matrix, kind.gguf, file.data(), nullptr, between(1, 3)) == GRIFFIN_OK, "pack_gguf");
  }

  void from_codes(const Kind& kind) {
    const griffin_grouped& f = kind.grouped;
    const bool sub = f.scale <= GRIFFIN_SCALE_SUB_SIGNED;
    const int padded = (matrix.d_in + f.group - 1) / f.group * f.group, groups = padded / f.group;
    const int spans = sub ? (padded + 255) / 256 : (padded + f.span - 1) / f.span, all = matrix.d_out * spans;
    std::vector<uint8_t> codes(static_cast<size_t>(matrix.d_out) * padded);
    for (uint8_t& code : codes) code = static_cast<uint8_t>(between(0, (1 << f.bits) - 1));
    std::vector<uint16_t> scale16(f.scale == GRIFFIN_SCALE_F32 ? 0 : all);
    std::vector<float> scale32(f.scale == GRIFFIN_SCALE_F32 ? all : 0);
    for (uint16_t& s : scale16) s = random_half();
    for (float& s : scale32) s = 0.01f * normal();
    std::vector<uint16_t> offset16(f.offset == GRIFFIN_OFFSET_SUB || f.offset == GRIFFIN_OFFSET_F16 ? all : 0);
    std::vector<uint8_t> offset8(f.offset == GRIFFIN_OFFSET_CODE ? all : 0);
    for (uint16_t& m : offset16) m = random_half() | static_cast<uint16_t>(between(0, 1) << 15);
    for (uint8_t& m : offset8) m = static_cast<uint8_t>(between(0, (1 << f.bits) - 1));
    std::vector<uint8_t> subs(sub ? matrix.d_out * groups : 0);
    std::vector<uint8_t> sub_offsets(f.offset == GRIFFIN_OFFSET_SUB ? matrix.d_out * groups : 0);
    for (uint8_t& s : subs) s = static_cast<uint8_t>(rng());
    for (uint8_t& s : sub_offsets) s = static_cast<uint8_t>(rng());
    const griffin_codes from{codes.data(), scale16.empty() ? static_cast<void*>(scale32.data()) : scale16.data(),
                             offset8.empty() ? static_cast<void*>(offset16.data()) : offset8.data(), subs.data(),
                             sub_offsets.data()};
    expect(griffin_pack_codes(&matrix, &from, between(1, 3)) == GRIFFIN_OK, "pack_codes");

    const int n = matrix.neuron_major ? matrix.d_in : matrix.d_out,
              d = matrix.neuron_major ? matrix.d_out : matrix.d_in;
    std::vector<float> found(values.size());
    griffin_unpack(&matrix, nullptr, 0, n, 0, d, found.data(), GRIFFIN_F32, d, 1);
    for (int64_t o = 0; o < matrix.d_out; o++)
      for (int64_t i = 0; i < matrix.d_in; i++) {
        const int64_t at = o * spans + i / (sub ? 256 : f.span), group = o * groups + i / f.group;
        double s = scale16.empty() ? scale32[at] : from_half(scale16[at]);
        if (sub) s *= f.scale == GRIFFIN_SCALE_SUB_SIGNED ? static_cast<int8_t>(subs[group]) : subs[group];
        double m = s * f.zero;
        if (f.offset == GRIFFIN_OFFSET_SUB) m = double{from_half(offset16[at])} * sub_offsets[group];
        if (f.offset == GRIFFIN_OFFSET_F16) m = -from_half(offset16[at]);
        if (f.offset == GRIFFIN_OFFSET_CODE) m = s * offset8[at];
        const double code = codes[o * padded + i], truth = s * code - m;
        const float value = found[matrix.neuron_major ? i * d + o : o * d + i];
        if (fabs(value - truth) > 1e-6 * (fabs(s * code) + fabs(m))) {
          failures++, printf("unpack %s: %g instead of %g, W %d %d at %d %d, neuron-major %d, s %g sub %d m %g, %s\n",
                             griffin_isa(), value, truth, matrix.d_out, matrix.d_in, int(o), int(i),
                             matrix.neuron_major, s, sub ? subs[group] : -1, m, kind.name().c_str());
          return;
        }
      }
  }
};

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
  return {sum, 1e-5 * sqrt(squares) +
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

// gate, up and down may be of different formats; c.d and c.d_ff fit them. `other`: a gate of its own of the dynamic
// selection, with the same meaning if it is of the gate's format.
void check_ff(const Kind& gate_kind, const Kind& up_kind, const Kind& down_kind, const Case& c) {
  Weights gate(gate_kind, c.d_ff, c.d), up(up_kind, c.d_ff, c.d), down(down_kind, c.d, c.d_ff, true);
  const auto gate_bias = random_bias(c.biased, c.d_ff), up_bias = random_bias(c.biased, c.d_ff),
             out_bias = random_bias(c.biased, c.d);
  griffin_ff_block block{};
  block.activation = c.activation;
  if (c.gated) block.gate = gate.matrix;
  block.up = up.matrix, block.down = down.matrix;
  block.gate.bias = or_null(gate_bias), block.up.bias = or_null(up_bias), block.down.bias = or_null(out_bias);

  Call call(c, c.d, c.d);
  const int kind = between(0, 3);  // all neurons, a shared set of int64, one set a row, and one expert a row
  const int k = kind == 3 ? 1 : between(1, c.d_ff);
  std::vector<int64_t> sets;
  for (int r = 0; r < (kind == 1 ? 1 : c.rows); r++) {
    std::vector<int64_t> order(static_cast<size_t>(c.d_ff));
    for (int j = 0; j < c.d_ff; j++) order[j] = j;
    for (int i = 0; i < k; i++) {
      std::swap(order[i], order[between(i, c.d_ff - 1)]);
      sets.push_back(order[i]);
    }
  }
  std::vector<int32_t> joined(static_cast<size_t>(c.rows) * k < static_cast<size_t>(c.d_ff) ? c.rows * k : c.d_ff);
  std::vector<uint16_t> mask(joined.size());
  std::vector<std::vector<int64_t>> wanted(c.rows);
  for (int r = 0; r < c.rows; r++)
    for (int j = 0; j < (kind == 0 ? c.d_ff : k); j++)
      wanted[r].push_back(kind == 0 ? j : sets[(kind == 1 ? 0 : r * k) + j]);
  if (kind == 1) {
    call.io.experts = sets.data();
    call.io.n_experts = k;
    call.io.index_bytes = 8;
  } else if (kind >= 2) {
    call.io.n_experts = griffin_union(sets.data(), 8, c.rows, k, c.d_ff, joined.data(), mask.data());
    call.io.experts = joined.data();
    call.io.index_bytes = 4;
    call.io.row_mask = mask.data();
  }
  // Dynamic selection of the `first` best of the same experts.
  griffin_dynamic dynamic{};
  std::vector<float> weight(static_cast<size_t>(c.d_ff));
  for (float& w : weight) w = exp2f(20 * std::uniform_real_distribution<float>()(rng));  // scores far apart
  const int first = between(1, kind == 0 ? c.d_ff : k);
  const bool selects = between(0, 1) == 1;
  std::vector<Value> expected;
  for (int r = 0; r < c.rows; r++) {
    const float* const x = call.x_value.data() + static_cast<size_t>(r) * c.d;
    std::vector<Value> first_product(static_cast<size_t>(c.d_ff)), z(first_product);
    for (const int64_t j : wanted[r]) {
      const Value u = product(up, j, x, c.biased ? up_bias[j] : 0);
      const Value g = c.gated ? product(gate, j, x, c.biased ? gate_bias[j] : 0) : u;
      const double a = act(c.activation, g.value), a_error = slope(c.activation, g.value) * g.error;
      first_product[j] = {fabs(a), a_error};
      z[j] = c.gated ? Value{a * u.value, a_error * fabs(u.value) + fabs(a) * u.error} : Value{a, a_error};
    }
    if (selects) {
      const auto score = [&](int64_t j) { return first_product[j].value * weight[j]; };
      std::sort(wanted[r].begin(), wanted[r].end(),
                [&](int64_t a, int64_t b) { return score(a) != score(b) ? score(a) > score(b) : a < b; });
      // What is too close to call may be either; then it must not matter.
      const size_t n = wanted[r].size(), edge = static_cast<size_t>(first);
      for (size_t i = 0; i < edge; i++)
        for (size_t j = edge; j < n; j++) {
          const int64_t a = wanted[r][i], b = wanted[r][j];
          if (score(b) > 0 &&
              score(a) - score(b) <= 3 * (first_product[a].error * weight[a] + first_product[b].error * weight[b]))
            return;
        }
      if (edge < n) wanted[r].resize(edge);
    }
    double top = 0;
    for (const int64_t j : wanted[r]) top = std::max(top, fabs(z[j].value));
    for (int i = 0; i < c.d; i++) {
      double y = c.biased ? out_bias[i] : 0, squares = 0;
      for (const int64_t j : wanted[r]) {
        const double w = down.at(i, j), term = w * z[j].value;
        const double error =
            fabs(w) * (z[j].error + (down_kind.format == GRIFFIN_GROUPED ? kOfNeurons * top : 0)) + 1e-5 * fabs(term);
        y += term, squares += error * error;
      }
      expected.push_back({y, sqrt(squares) + 1e-5 * fabs(y)});
    }
  }
  if (selects) {
    dynamic.weight = weight.data();
    dynamic.k = first;
    if (between(0, 1)) dynamic.gate = c.gated ? gate.matrix : up.matrix;
    call.io.dynamic = &dynamic;
  }
  for (int repeat = 0; repeat < 2; repeat++)
    expect(griffin_ff(&block, &call.io, c.threads) == GRIFFIN_OK, "ff refuses a block");
  compare("ff of " + gate_kind.name() + ", " + up_kind.name() + ", " + down_kind.name() + (selects ? ", dynamic" : "") +
              (kind ? ", experts" : ""),
          c, expected, call.y());
}

void check_matvec(const Kind& kind, const Case& c, bool neuron_major) {
  Weights w(kind, c.d_ff, c.d, neuron_major);
  const auto bias = random_bias(c.biased, c.d_ff);
  Call call(c, c.d, c.d_ff);
  w.matrix.bias = or_null(bias);
  expect(griffin_matvec(&w.matrix, &call.io, c.threads) == GRIFFIN_OK, "matvec refuses a matrix");
  std::vector<Value> expected;
  for (int r = 0; r < c.rows; r++)
    for (int o = 0; o < c.d_ff; o++)
      expected.push_back(product(w, o, call.x_value.data() + static_cast<size_t>(r) * c.d, c.biased ? bias[o] : 0));
  compare((neuron_major ? "neuron-major matvec of " : "matvec of ") + kind.name(), c, expected, call.y());
}

// Some rows, some columns, and bf16, against all as float32.
void check_unpack(const Kind& kind, int d_out, int d_in) {
  for (const bool neuron_major : {false, true}) {
    const Weights w(kind, d_out, d_in, neuron_major);
    const int count = neuron_major ? d_in : d_out, width = neuron_major ? d_out : d_in;
    const int begin = neuron_major ? between(0, (width - 1) / 256) * 256 : 0;
    const int end = neuron_major ? between(begin + 1, width) : width, n = between(1, 5), type = between(0, 1);
    std::vector<int64_t> rows;
    for (int i = 0; i < n; i++) rows.push_back(between(0, count - 1));
    std::vector<float> floats(type == GRIFFIN_F32 ? static_cast<size_t>(n) * (end - begin) : 0);
    std::vector<uint16_t> halves(type == GRIFFIN_BF16 ? static_cast<size_t>(n) * (end - begin) : 0);
    void* const out = type == GRIFFIN_F32 ? static_cast<void*>(floats.data()) : halves.data();
    std::vector<float> norms(static_cast<size_t>(count));
    expect(griffin_row_norms(&w.matrix, norms.data(), between(1, 3)) == GRIFFIN_OK, "norms of rows");
    for (int r = 0; r < count; r++) {
      double sum = 0;
      for (int c = 0; c < width; c++) {
        const double value = w.values[static_cast<size_t>(r) * width + c];
        sum += value * value;
      }
      expect(fabs(norms[r] - sqrt(sum)) <= 1e-5 * sqrt(sum), "norm of a row");
    }
    expect(
        griffin_unpack(&w.matrix, rows.data(), 0, n, begin, end, out, type, end - begin, between(1, 3)) == GRIFFIN_OK,
        "unpack of some rows");
    bool same = true;
    for (int i = 0; i < n; i++)
      for (int c = begin; c < end; c++) {
        const size_t at = static_cast<size_t>(i) * (end - begin) + (c - begin);
        const float truth = w.values[static_cast<size_t>(rows[i]) * width + c];
        const float found = type == GRIFFIN_F32 ? floats[at] : from_bf16(halves[at]);
        same &= fabsf(found - truth) <= (type == GRIFFIN_F32 ? 0.f : fabsf(truth) / 256);
      }
    if (!same) failures++, printf("unpacked rows differ: %s neuron-major %d\n", kind.name().c_str(), neuron_major);
  }
}

// The rows and the neurons of the same blocks mean the same; and rows in another order.
void check_layouts(const Kind& kind, int d_out, int d_in) {
  int32_t weights, bytes;
  griffin_grouped format;
  griffin_gguf_format(kind.gguf, &format, &weights, &bytes);
  const std::vector<uint8_t> file = random_blocks(kind.gguf, int64_t{d_out} * d_in / weights, bytes);
  std::vector<int64_t> order;
  for (int i = 0; i < d_out; i++) order.push_back(between(0, d_out - 1));
  Weights rows(kind, d_out, d_in), neurons(kind, d_out, d_in, true), ordered(kind, d_out, d_in);
  for (Weights* w : {&rows, &neurons, &ordered}) {
    expect(
        griffin_pack_gguf(&w->matrix, kind.gguf, file.data(), w == &ordered ? order.data() : nullptr, 2) == GRIFFIN_OK,
        "pack_gguf");
    const int n = w == &neurons ? d_in : d_out, d = w == &neurons ? d_out : d_in;
    griffin_unpack(&w->matrix, nullptr, 0, n, 0, d, w->values.data(), GRIFFIN_F32, d, 2);
  }
  bool same = true;
  for (int o = 0; o < d_out; o++)
    for (int i = 0; i < d_in; i++)
      same &= rows.at(o, i) == neurons.at(o, i) && ordered.at(o, i) == rows.at(order[o], i);
  if (!same) failures++, printf("layouts differ: %s\n", kind.name().c_str());
}

// Float weights through codes: no further off than the steps say.
void check_quantise(int bits, bool supers, int rows, int d_in) {
  Kind kind;
  kind.format = GRIFFIN_GROUPED;
  const int group = between(1, 2) * 16;
  kind.grouped = {static_cast<uint8_t>(bits),
                  static_cast<uint8_t>(group),
                  static_cast<uint8_t>(supers ? GRIFFIN_SCALE_SUB_UNSIGNED : GRIFFIN_SCALE_F16),
                  static_cast<uint8_t>(supers ? GRIFFIN_OFFSET_SUB : GRIFFIN_OFFSET_NONE),
                  static_cast<uint16_t>(supers ? 0 : 1 << (bits - 1)),
                  static_cast<uint16_t>(supers ? 256 : group)};
  const int padded = (d_in + group - 1) / group * group, spans = supers ? (padded + 255) / 256 : padded / group;
  std::vector<float> weight = random_bias(true, rows * d_in), importance;
  if (between(0, 1))
    for (int i = 0; i < d_in; i++) importance.push_back(fabsf(normal()) + 0.1f);
  std::vector<uint8_t> codes(static_cast<size_t>(rows) * padded), sub(supers ? rows * padded / group : 0),
      sub_offset(sub);
  std::vector<uint16_t> scale(static_cast<size_t>(rows) * spans), offset(supers ? scale.size() : 0);
  const griffin_codes out{codes.data(), scale.data(), offset.data(), sub.data(), sub_offset.data()};
  expect(griffin_quantise(&kind.grouped, weight.data(), rows, d_in, or_null(importance), &out, between(1, 3)) ==
             GRIFFIN_OK,
         "quantise");
  Weights w(kind, rows, d_in);
  expect(griffin_pack_codes(&w.matrix, &out, 1) == GRIFFIN_OK, "pack_codes of quantised weights");
  griffin_unpack(&w.matrix, nullptr, 0, rows, 0, d_in, w.values.data(), GRIFFIN_F32, d_in, 1);
  double error = 0, squares = 1e-3;
  for (size_t i = 0; i < weight.size(); i++) {
    error += (w.values[i] - weight[i]) * (w.values[i] - weight[i]);
    squares += weight[i] * weight[i];
  }
  const double steps =
      supers ? (1 << bits) - 1 : (1 << bits) - 2;  // over a range of some 5 (at least 4 standard deviations)
  if (error > squares * (7 / steps) * (7 / steps) / 12 + 1e-4)
    failures++,
        printf("quantise: %s rows %d d_in %d: error %g\n", kind.name().c_str(), rows, d_in, sqrt(error / squares));
  weight[0] = NAN, weight[weight.size() - 1] = INFINITY;  // has no code; it is 0
  expect(griffin_quantise(&kind.grouped, weight.data(), rows, d_in, nullptr, &out, 2) == GRIFFIN_OK, "quantise of NaN");
}

// A small decoder in a format, and one step of it: refused as soon as something is missing, and within its buffers.
// (That its logits are right is tested from Python, against Transformers.)
struct Decoder {
  static constexpr int kLayers = 2, kD = 24, kHeads = 4, kKvHeads = 2, kSize = 8, kWidth = 20, kVocabulary = 11;
  std::vector<Weights> weights;
  std::vector<griffin_layer> layers{kLayers};
  std::vector<float> norm = random_bias(true, kD), tables, logits;
  std::vector<std::vector<float>> buffers;
  std::vector<void*> keys, values;
  std::vector<int64_t> head_stride, tokens;
  std::vector<int32_t> length;
  griffin_decoder decoder{};
  griffin_cache cache{};
  int rows;

  griffin_matrix matrix(const Kind& kind, int d_out, int d_in, bool neuron_major = false) {
    weights.emplace_back(kind, d_out, d_in, neuron_major);
    return weights.back().matrix;
  }

  Decoder(const Kind& kind, int n_rows) : rows(n_rows) {
    weights.reserve(kLayers * 7 + 2);
    for (griffin_layer& layer : layers) {
      layer.attention = layer.feedforward = {norm.data(), 1e-5f, 0};
      layer.q = matrix(kind, kHeads * kSize, kD), layer.o = matrix(kind, kD, kHeads * kSize);
      layer.k = matrix(kind, kKvHeads * kSize, kD), layer.v = matrix(kind, kKvHeads * kSize, kD);
      griffin_ff_block& ff = layer.ff;
      ff.gate = matrix(kind, kWidth, kD), ff.up = matrix(kind, kWidth, kD);
      ff.down = matrix(kind, kD, kWidth, true), ff.activation = GRIFFIN_SILU;
    }
    for (int r = 0; r < rows; r++) {
      length.push_back(between(0, 9)), tokens.push_back(between(0, kVocabulary - 1));
      head_stride.push_back((length[r] + 1) * kSize * int64_t{4});
    }
    for (int i = 0; i < kLayers * rows * 2; i++) {  // with room for the one token of this step
      buffers.push_back(random_bias(true, kKvHeads * (length[i % rows] + 1) * kSize));
      (i < kLayers * rows ? keys : values).push_back(buffers.back().data());
    }
    decoder.n_layers = kLayers, decoder.d_model = kD, decoder.heads = kHeads, decoder.kv_heads = kKvHeads;
    decoder.head_size = decoder.rotary = kSize, decoder.vocabulary = kVocabulary;
    decoder.positions = *std::max_element(length.begin(), length.end()) + 1;
    tables = random_bias(true, decoder.positions * kSize / 2);
    decoder.cosines[0] = decoder.sines[0] = tables.data();
    decoder.attention_scale = decoder.embedding_scale = decoder.residual_scale = decoder.logits_scale = 1;
    decoder.layers = layers.data(), decoder.embedding = matrix(kind, kVocabulary, kD);
    decoder.final = {norm.data(), 1e-5f, 0}, decoder.head = matrix(kind, kVocabulary, kD);
    cache.keys = keys.data(), cache.values = values.data(), cache.head_stride = head_stride.data();
    cache.length = length.data(), cache.type = GRIFFIN_F32;
  }

  int run(const griffin_experts* experts = nullptr) {
    logits.assign(static_cast<size_t>(rows) * kVocabulary, NAN);
    return griffin_decode(&decoder, &cache, experts, tokens.data(), rows, logits.data(), between(1, 4));
  }

  // Runs with a value changed, which must be refused, and puts it back.
  template <class T, class U> void refuses(const char* what, T& place, U value) {
    const T before = place;
    place = static_cast<T>(value);
    if (run() != GRIFFIN_BAD_ARGUMENT) failures++, printf("decode takes a wrong %s\n", what);
    place = before;
  }
};

void check_decode(const Kind& kind) {
  Decoder d(kind, between(1, 5));
  if (d.run() != GRIFFIN_OK) failures++, printf("decode refuses %s\n", kind.name().c_str());
  for (const float v : d.logits)
    if (!(fabsf(v) < 1e6f)) failures++, printf("decode: a logit is %g in %s\n", v, kind.name().c_str());
  griffin_layer& layer = d.layers[1];
  griffin_ff_block& ff = layer.ff;
  for (griffin_matrix* const m :
       {&layer.q, &layer.k, &layer.v, &layer.o, &d.decoder.head, &d.decoder.embedding, &ff.gate, &ff.up, &ff.down}) {
    if (m != &ff.gate) d.refuses("weight", m->weight, nullptr);
    d.refuses("format", m->format, 4);
    d.refuses("format", m->format, -1);
    d.refuses("width", m->d_in, m->d_in + 1);
    d.refuses("height", m->d_out, m->d_out - 1);
    d.refuses("layout", m->neuron_major, !m->neuron_major);
    if (kind.format == GRIFFIN_GROUPED) d.refuses("number of bits", m->grouped.bits, 7);
  }
  if (kind.format == GRIFFIN_GROUPED) d.refuses("scales", ff.down.scales, nullptr);
  d.refuses("activation", ff.activation, 9);
  d.refuses("table", layer.rope, 1);
  d.refuses("table", layer.rope, 2);
  d.refuses("table", d.decoder.sines[0], nullptr);
  d.refuses("number of positions", d.decoder.positions, d.decoder.positions - 1);
  d.refuses("rotary width", d.decoder.rotary, 5);
  d.refuses("rotary width", d.decoder.rotary, Decoder::kSize + 2);
  d.refuses("vocabulary", d.decoder.vocabulary, Decoder::kVocabulary + 1);
  d.refuses("keys", d.keys.back(), nullptr);
  d.refuses("values", d.values.front(), nullptr);
  d.refuses("length", d.length[0], -1);
  d.refuses("token", d.tokens[0], Decoder::kVocabulary);
  d.decoder.positions = 0;  // not needed without rotary layers
  for (griffin_layer& each : d.layers) each.rope = -1;
  expect(d.run() == GRIFFIN_OK, "decode needs rotary tables without rotary layers");

  std::vector<griffin_experts> experts(Decoder::kLayers);
  const int32_t some[] = {1, 4, 9};
  experts[0].experts = some, experts[0].n_experts = 3, experts[0].index_bytes = 4;
  expect(d.run(experts.data()) == GRIFFIN_OK, "decode refuses experts");
  experts[0].index_bytes = 2;
  expect(d.run(experts.data()) == GRIFFIN_BAD_ARGUMENT, "decode takes experts of 2 bytes");

  // Another format in every matrix is as good.
  const std::vector<Kind> kinds = all_kinds();
  Decoder mixed(kinds[13], 2);
  std::vector<Weights> others;
  others.reserve(4);
  griffin_layer& first = mixed.layers[0];
  for (griffin_matrix* const m : {&first.k, &first.ff.up, &first.ff.down, &mixed.decoder.embedding}) {
    others.emplace_back(m == &first.ff.up ? kinds[1] : kind, m->d_out, m->d_in, m->neuron_major);
    *m = others.back().matrix;
  }
  expect(mixed.run() == GRIFFIN_OK, "decode refuses a mix of formats");
}

// What is refused, of a matrix that is otherwise right.
void check_refusals(const Kind& kind) {
  Weights w(kind, 40, 256);
  Weights down(kind, 256, 40 * kind.block, true);
  const Case c{256, 40, 3, 1, 0, false, false, false, false};
  Call call(c, 256, 40);
  std::vector<uint8_t> bytes(1 << 20);
  const griffin_codes codes{bytes.data(), bytes.data(), bytes.data(), bytes.data(), bytes.data()};
  griffin_matrix& m = w.matrix;
  const bool grouped = kind.format == GRIFFIN_GROUPED;
  const auto refused = [&](const char* what) {
    griffin_parts parts;
    bool all =
        griffin_matvec(&m, &call.io, 1) == GRIFFIN_BAD_ARGUMENT &&
        griffin_unpack(&m, nullptr, 0, 1, 0, m.d_in, bytes.data(), GRIFFIN_F32, m.d_in, 1) == GRIFFIN_BAD_ARGUMENT &&
        griffin_pack_codes(&m, &codes, 1) == GRIFFIN_BAD_ARGUMENT;
    if (kind.gguf >= 0) all &= griffin_pack_gguf(&m, kind.gguf, bytes.data(), nullptr, 1) == GRIFFIN_BAD_ARGUMENT;
    if (grouped && m.weight) all &= griffin_grouped_bytes(&m, &parts) == -1;
    if (!all) failures++, printf("a wrong %s is taken, %s\n", what, kind.name().c_str());
  };
  const auto refuses = [&](const char* what, auto& place, auto value) {
    const auto before = place;
    place = static_cast<std::remove_reference_t<decltype(place)>>(value);
    refused(what);
    place = before;
  };
  refuses("weight", m.weight, nullptr);
  refuses("width", m.d_in, 0);
  refuses("width", m.d_in, -1);
  refuses("height", m.d_out, 0);
  if (grouped) {
    refuses("width", m.d_in, 131072 + 256);
    for (const int bits : {0, 1, 7, 9, 255}) refuses("number of bits", m.grouped.bits, bits);
    for (const int group : {0, 8, 48, 64, 255}) refuses("group", m.grouped.group, group);
    for (const int span : {0, 1, 24, 96, 257, 512, 65535}) refuses("span", m.grouped.span, span);
    refuses("scale", m.grouped.scale, 4);
    refuses("offset", m.grouped.offset, 4);
    const bool sub = kind.grouped.scale <= GRIFFIN_SCALE_SUB_SIGNED;
    refuses("offset", m.grouped.offset, sub ? GRIFFIN_OFFSET_F16 : GRIFFIN_OFFSET_SUB);
  }
  const auto bad = [&](const char* what, int status) {
    if (status != GRIFFIN_BAD_ARGUMENT) failures++, printf("%s is taken, %s\n", what, kind.name().c_str());
  };
  bad("a null matrix", griffin_matvec(nullptr, &call.io, 1));
  bad("a null call", griffin_matvec(&m, nullptr, 1));
  bad("no thread", griffin_matvec(&m, &call.io, 0));
  for (const int rows : {0, -1, grouped ? 0 : 17}) {
    call.io.rows = rows;
    bad("a number of rows", griffin_matvec(&m, &call.io, 1));
  }
  call.io.rows = 3, call.io.x_type = GRIFFIN_F16;
  bad("x in float16", griffin_matvec(&m, &call.io, 1));
  call.io.x_type = GRIFFIN_F32;
  if (!grouped)
    m.neuron_major = 1, bad("a neuron-major float matrix", griffin_matvec(&m, &call.io, 1)), m.neuron_major = 0;
  const auto unpack = [&](const griffin_matrix& of, int64_t first, int64_t n, int64_t begin, int64_t end, int type) {
    bad("a range of unpack", griffin_unpack(&of, nullptr, first, n, begin, end, bytes.data(), type, end, 1));
  };
  unpack(m, 0, 41, 0, 256, 0), unpack(m, -1, 2, 0, 256, 0), unpack(m, 40, 1, 0, 256, 0), unpack(m, 0, -1, 0, 256, 0);
  unpack(m, 0, 1, 0, 255, 0), unpack(m, 0, 1, 0, 257, 0), unpack(m, 0, 1, 0, 256, GRIFFIN_F16);
  unpack(down.matrix, 0, 1, 16, 256, 0), unpack(down.matrix, 0, 1, 0, 257, 0), unpack(down.matrix, 0, 1, -256, 1, 0);
  const int64_t far[] = {0, 40};
  bad("a row beyond the last", griffin_unpack(&m, far, 0, 2, 0, 256, bytes.data(), GRIFFIN_F32, 256, 1));
  if (!grouped) return;
  griffin_parts parts;
  down.matrix.scales = nullptr;
  unpack(down.matrix, 0, 1, 0, 256, 0);
  bad("a matrix without scales", griffin_pack_codes(&down.matrix, &codes, 1));
  expect(griffin_grouped_bytes(nullptr, &parts) == -1 && griffin_grouped_bytes(&m, nullptr) == -1, "bytes of nothing");
  for (const int part : {0, 1, 2, 3, 4}) {
    griffin_codes less = codes;
    const bool sub = kind.grouped.scale <= GRIFFIN_SCALE_SUB_SIGNED,
               offset = kind.grouped.offset != GRIFFIN_OFFSET_NONE;
    if (part == 0) less.codes = nullptr;
    if (part == 1) less.scale = nullptr;
    if (part == 2 && offset) less.offset = nullptr;
    if (part == 3 && sub) less.sub = nullptr;
    if (part == 4 && kind.grouped.offset == GRIFFIN_OFFSET_SUB) less.sub_offset = nullptr;
    if (memcmp(&less, &codes, sizeof less)) bad("a missing array of codes", griffin_pack_codes(&m, &less, 1));
  }
  if (kind.gguf < 0) return;
  bad("an unknown type", griffin_pack_gguf(&m, 99, bytes.data(), nullptr, 1));
  bad("another type", griffin_pack_gguf(&m, kind.gguf == GRIFFIN_GGUF_Q8_0 ? GRIFFIN_GGUF_Q4_0 : GRIFFIN_GGUF_Q8_0,
                                        bytes.data(), nullptr, 1));
  bad("no blocks", griffin_pack_gguf(&m, kind.gguf, nullptr, nullptr, 1));
  m.d_in = 250;
  bad("a part of a block", griffin_pack_gguf(&m, kind.gguf, bytes.data(), nullptr, 1));
}

// Inputs that are not finite are not finite in what comes out of their rows, and only there.
void check_not_finite(const Kind& kind, float value) {
  const int d = size_of_kind(kind, 70), d_ff = size_of_kind(kind, 33);
  const Weights gate(kind, d_ff, d), up(kind, d_ff, d), down(kind, d, d_ff, true);
  griffin_ff_block block{gate.matrix, up.matrix, down.matrix, GRIFFIN_SILU, 0};
  const Case c{d, d_ff, 3, 2, 0, true, between(0, 1) == 1, false, false};
  Call call(c, d, d);
  const size_t at = static_cast<size_t>(d) + static_cast<size_t>(between(0, d - 1));
  c.bf16_x ? void(call.xb[at] = to_bf16(value)) : void(call.xf[at] = value);
  griffin_ff(&block, &call.io, 2);
  bool right = true;
  for (int r = 0; r < 3; r++)
    for (int i = 0; i < d; i++) right &= (fabsf(call.yf[static_cast<size_t>(r) * d + i]) < 1e30f) == (r != 1);
  if (!right) failures++, printf("%g in x: %s\n", value, kind.name().c_str());
}

}  // namespace

int main() {
  std::istringstream names(griffin_isas());
  int cases = 0;
  const std::vector<Kind> kinds = all_kinds();
  const std::vector<Kind> types(kinds.begin(), kinds.begin() + 13);  // floats and GGUF
  const auto any = [&] { return kinds[between(0, static_cast<int>(kinds.size()) - 1)]; };
  const int tiny[] = {1, 2, 31, 33, 63, 64, 65, 255, 257};
  for (std::string isa; names >> isa;) {
    griffin_set_isa(isa.c_str());
    for (const Kind& kind : kinds) {
      const bool type = kind.format != GRIFFIN_GROUPED || kind.gguf >= 0;
      for (int i = 0; i < (type ? 6 : 2); i++, cases++) {
        const int wanted = i == 0 ? tiny[between(0, 8)] : between(1, i % 2 ? 200 : 1100);
        const int d = size_of_kind(kind, wanted),
                  d_ff = size_of_kind(kind, i == 0 ? tiny[between(0, 3)] : between(1, 40));
        check_ff(kind, kind, kind, random_case(d, d_ff, between(1, 16)));
        const bool grouped = kind.format == GRIFFIN_GROUPED;
        const int rows = i % 2 && grouped ? between(17, 130) : between(1, 16),
                  short_d = size_of_kind(kind, between(1, 300));
        check_matvec(kind, random_case(rows > 16 ? short_d : d, between(1, 40), rows), false);
        if (grouped) check_matvec(kind, random_case(size_of_kind(kind, between(1, 80)), wanted, between(1, 20)), true);
      }
      check_unpack(kind, between(1, 600), size_of_kind(kind, between(1, 600)));
      if (kind.gguf >= 0) check_layouts(kind, between(1, 300), size_of_kind(kind, between(1, 600)));
      check_not_finite(kind, NAN), check_not_finite(kind, -INFINITY);
      if (kind.block == 1 && (kind.format != GRIFFIN_GROUPED || between(0, 9) == 0)) check_decode(kind);
      check_refusals(kind);
    }
    for (int i = 0; i < 80; i++, cases++) {  // every matrix in a format of its own
      const Kind gate = i % 2 ? any() : types[between(0, 12)], up = any(), down = i % 2 ? any() : types[between(0, 12)];
      const int d = size_of_kind(gate.block > up.block ? gate : up, between(1, 400));
      check_ff(gate, up, down, random_case(d, size_of_kind(down, between(1, 70)), between(1, 16)));
    }
    for (const int bits : {2, 3, 4, 5, 6, 8})
      for (const bool supers : {false, true})
        for (const int d_in : {1, 31, between(1, 600), 512})
          if (bits > 2 || supers) check_quantise(bits, supers, between(1, 6), d_in);
  }
  griffin_grouped wrong{4, 32, GRIFFIN_SCALE_F32, GRIFFIN_OFFSET_NONE, 8, 32};
  const float weight[32] = {};
  uint8_t room[256];
  const griffin_codes out{room, room, room, room, room};
  expect(griffin_quantise(&wrong, weight, 1, 32, nullptr, &out, 1) == GRIFFIN_BAD_ARGUMENT,
         "quantise to float32 scales");
  wrong.scale = GRIFFIN_SCALE_F16;
  expect(griffin_quantise(&wrong, weight, 1, 32, nullptr, &out, 1) == GRIFFIN_OK, "quantise of zeros");
  expect(griffin_quantise(&wrong, nullptr, 1, 32, nullptr, &out, 1) == GRIFFIN_BAD_ARGUMENT, "quantise of nothing");
  expect(griffin_quantise(&wrong, weight, 1, 0, nullptr, &out, 1) == GRIFFIN_BAD_ARGUMENT, "quantise of no columns");
  expect(griffin_ff(nullptr, nullptr, 1) == GRIFFIN_BAD_ARGUMENT && griffin_set_isa("mmx") == GRIFFIN_NO_ISA,
         "nothing");
  printf("%d cases on %s (%s), %d failed\n", cases, griffin_isas(), griffin_threading(), failures);
  return failures != 0;
}
