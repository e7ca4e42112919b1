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
#include <vector>

#include "griffin_decode.h"

namespace {

std::mt19937 rng(1);
int failures = 0;

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

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

// n rows in a format, from random values; `values` is what they mean.
struct Weights {
  std::vector<uint8_t> rows;
  std::vector<float> scale, values;
  int64_t stride;

  Weights(int format, int n, int d) : scale(static_cast<size_t>(n), 1.f), values(static_cast<size_t>(n) * d) {
    std::normal_distribution<float> normal;
    std::vector<float> source(values.size());
    for (float& v : source) v = normal(rng);
    stride = griffin_row_bytes(format, d);
    if (format == GRIFFIN_F32) stride += 4 * between(0, 3);
    rows.resize(static_cast<size_t>(stride * n), 0xff);
    if (format >= GRIFFIN_INT8) {
      griffin_pack(format, source.data(), n, d, d, rows.data(), stride, scale.data(), 4);
    } else {
      for (int i = 0; i < n; i++)
        for (int c = 0; c < d; c++) {
          const float v = source[static_cast<size_t>(i) * d + c];
          uint8_t* at = rows.data() + i * stride;
          const uint16_t half = format == GRIFFIN_BF16 ? to_bf16(v) : static_cast<uint16_t>(between(0, 0x3fff));
          if (format == GRIFFIN_F32)
            memcpy(at + 4 * c, &v, 4);
          else
            memcpy(at + 2 * c, &half, 2);
        }
    }
    griffin_unpack(format, rows.data(), n, d, stride, scale.data(), 4, values.data(), d);
  }
};

struct Case {
  int format, d, d_ff, rows, threads, activation;
  bool gated, bf16_x, bf16_y, biased;
};

double act(int activation, double v) {
  switch (activation) {
    case GRIFFIN_SILU: return v / (1 + exp(-v));
    case GRIFFIN_GELU: return 0.5 * v * (1 + erf(v / sqrt(2.0)));
    case GRIFFIN_GELU_TANH: return 0.5 * v * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (v + 0.044715 * v * v * v)));
    case GRIFFIN_RELU: return v > 0 ? v : 0;
    default: return v > 0 ? v * v : 0;
  }
}

// |y - expected| against the norm of it: float32 summation, and bf16 rounds y. What int8 and int4 weights see of x is
// rounded in the expected values just as in the library, so that they need no wider limit.
void compare(const char* what, const std::string& isa, const Case& c, const std::vector<double>& expected,
             const std::vector<double>& y, bool bf16_y) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < y.size(); i++) {
    error += (y[i] - expected[i]) * (y[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  const double limit = bf16_y ? 0.004 : 3e-5;
  if (sqrt(error) <= limit * sqrt(norm) + 1e-5) return;
  failures++;
  printf("%s %s format %d d %d d_ff %d rows %d threads %d act %d gated %d: error %g of %g\n", what, isa.c_str(),
         c.format, c.d, c.d_ff, c.rows, c.threads, c.activation, c.gated, sqrt(error), sqrt(norm));
}

struct Call {  // x and y of one call, y poisoned with NaN
  std::vector<float> xf, yf, x_value;
  std::vector<uint16_t> xb, yb;
  griffin_io io{};

  Call(const Case& c, int d_in, int d_out) {
    std::normal_distribution<float> normal;
    xf.resize(static_cast<size_t>(c.rows) * d_in);
    for (float& v : xf) v = normal(rng);
    x_value = xf;
    if (c.bf16_x)
      for (size_t i = 0; i < xf.size(); i++) {
        xb.push_back(to_bf16(xf[i]));
        x_value[i] = from_bf16(xb.back());
      }
    for (int r = 0; c.format >= GRIFFIN_INT8 && r < c.rows; r++)
      for (int g = 0; g < d_in; g += 32) {  // to 1/127 of its group's maximum
        float top = 0, *group = &x_value[static_cast<size_t>(r) * d_in + g];
        const int n = d_in - g < 32 ? d_in - g : 32;
        for (int i = 0; i < n; i++) top = fmaxf(top, fabsf(group[i]));
        for (int i = 0; i < n; i++) group[i] = rintf(group[i] * (127.f / top)) * (top / 127.f);
      }
    yf.assign(static_cast<size_t>(c.rows) * d_out, NAN);
    yb.assign(yf.size(), 0x7fc0);
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
    if (io.y_type == GRIFFIN_BF16)
      for (size_t i = 0; i < out.size(); i++) out[i] = from_bf16(yb[i]);
    return out;
  }
};

std::vector<float> random_bias(bool there, int n) {
  std::vector<float> bias;
  std::normal_distribution<float> normal;
  for (int i = 0; there && i < n; i++) bias.push_back(normal(rng));
  return bias;
}
const float* or_null(const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); }

void check_ff(const std::string& isa, const Case& c) {
  const Weights gate(c.format, c.d_ff, c.d), up(c.format, c.d_ff, c.d), down(c.format, c.d_ff, c.d);
  const auto gate_bias = random_bias(c.biased, c.d_ff), up_bias = random_bias(c.biased, c.d_ff),
             out_bias = random_bias(c.biased, c.d);
  griffin_ff_block block{};
  block.d_model = c.d;
  block.d_ff = c.d_ff;
  block.format = c.format;
  block.activation = c.activation;
  if (c.gated) block.gate = gate.rows.data();
  block.up = up.rows.data();
  block.down = down.rows.data();
  block.gate_stride = gate.stride;
  block.up_stride = up.stride;
  block.down_stride = down.stride;
  if (c.format == GRIFFIN_INT8) {
    block.gate_scale = gate.scale.data();
    block.up_scale = up.scale.data();
    block.down_scale = down.scale.data();
    block.scale_stride = 4;
  }
  block.gate_bias = or_null(gate_bias);
  block.up_bias = or_null(up_bias);
  block.out_bias = or_null(out_bias);

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
  const int first = between(1, kind == 0 ? c.d_ff : k);
  const bool selects = between(0, 1) == 1;
  std::vector<double> expected;
  for (int r = 0; r < c.rows; r++) {
    std::vector<double> y(static_cast<size_t>(c.d)), first_product(static_cast<size_t>(c.d_ff)), z(first_product);
    for (int i = 0; i < c.d; i++) y[i] = c.biased ? out_bias[i] : 0;
    for (const int64_t j : wanted[r]) {
      double g = c.biased ? gate_bias[j] : 0, u = c.biased ? up_bias[j] : 0;
      for (int i = 0; i < c.d; i++) {
        g += double{gate.values[j * c.d + i]} * call.x_value[static_cast<size_t>(r) * c.d + i];
        u += double{up.values[j * c.d + i]} * call.x_value[static_cast<size_t>(r) * c.d + i];
      }
      first_product[j] = fabs(act(c.activation, c.gated ? g : u));
      z[j] = c.gated ? act(c.activation, g) * u : act(c.activation, u);
    }
    if (selects) {
      if (r == 0)
        for (float& w : weight) w = static_cast<float>(between(1, 1000));
      const auto score = [&](int64_t j) { return first_product[j] * weight[j]; };
      std::sort(wanted[r].begin(), wanted[r].end(),
                [&](int64_t a, int64_t b) { return score(a) != score(b) ? score(a) > score(b) : a < b; });
      // What is too close to call in float32 may be either; then it must not matter.
      const size_t n = wanted[r].size(), edge = static_cast<size_t>(first);
      if (edge < n && score(wanted[r][edge]) > 0 && score(wanted[r][edge]) > 0.9999 * score(wanted[r][edge - 1]))
        return;
      if (edge < n) wanted[r].resize(edge);
    }
    for (const int64_t j : wanted[r])
      for (int i = 0; i < c.d; i++) y[i] += z[j] * down.values[j * c.d + i];
    expected.insert(expected.end(), y.begin(), y.end());
  }
  if (selects) {
    dynamic.weight = weight.data();
    dynamic.k = first;
    const Weights& read = c.gated ? gate : up;
    if (between(0, 1))
      dynamic.gate = {c.d, c.d_ff, c.format, 0, read.rows.data(), read.stride, read.scale.data(), nullptr};
    call.io.dynamic = &dynamic;
  }
  for (int repeat = 0; repeat < 2; repeat++)
    if (griffin_ff(&block, &call.io, c.threads) != GRIFFIN_OK) failures++;
  compare("ff", isa, c, expected, call.y(), c.bf16_y);
}

void check_matvec(const std::string& isa, const Case& c) {
  const Weights w(c.format, c.d_ff, c.d);
  const auto bias = random_bias(c.biased, c.d_ff);
  Call call(c, c.d, c.d_ff);
  const griffin_matrix matrix{c.d, c.d_ff, c.format, 0, w.rows.data(), w.stride, w.scale.data(), or_null(bias)};
  if (griffin_matvec(&matrix, &call.io, c.threads) != GRIFFIN_OK) failures++;
  std::vector<double> expected;
  for (int r = 0; r < c.rows; r++)
    for (int o = 0; o < c.d_ff; o++) {
      double y = c.biased ? bias[o] : 0;
      for (int i = 0; i < c.d; i++)
        y += double{w.values[static_cast<size_t>(o) * c.d + i]} * call.x_value[static_cast<size_t>(r) * c.d + i];
      expected.push_back(y);
    }
  compare("matvec", isa, c, expected, call.y(), c.bf16_y);
}

// A small decoder in a format, and one step of it: refused as soon as something is missing, and within its buffers.
// (That its logits are right is tested from Python, against Transformers.)
struct Decoder {
  static constexpr int kLayers = 2, kD = 24, kHeads = 4, kKvHeads = 2, kSize = 8, kWidth = 20, kVocabulary = 11;
  std::vector<Weights> weights;
  std::vector<griffin_layer> layers{kLayers};
  std::vector<float> norm = random_bias(true, kD), embedding, tables, logits;
  std::vector<std::vector<float>> buffers;
  std::vector<void*> keys, values;
  std::vector<int64_t> head_stride, tokens;
  std::vector<int32_t> length;
  griffin_decoder decoder{};
  griffin_cache cache{};
  int rows;

  griffin_matrix matrix(int format, int d_out, int d_in) {
    weights.emplace_back(format, d_out, d_in);
    const Weights& w = weights.back();
    return {d_in, d_out, format, 0, w.rows.data(), w.stride, w.scale.data(), nullptr};
  }

  Decoder(int format, int n_rows) : rows(n_rows) {
    weights.reserve(kLayers * 7 + 1);
    for (griffin_layer& layer : layers) {
      layer.attention = layer.feedforward = {norm.data(), 1e-5f, 0};
      layer.q = matrix(format, kHeads * kSize, kD), layer.o = matrix(format, kD, kHeads * kSize);
      layer.k = matrix(format, kKvHeads * kSize, kD), layer.v = matrix(format, kKvHeads * kSize, kD);
      const griffin_matrix gate = matrix(format, kWidth, kD), up = matrix(format, kWidth, kD),
                           down = matrix(format, kWidth, kD);
      griffin_ff_block& ff = layer.ff;
      ff.d_model = kD, ff.d_ff = kWidth, ff.format = format, ff.activation = GRIFFIN_SILU;
      ff.gate = gate.weight, ff.up = up.weight, ff.down = down.weight;
      ff.gate_stride = gate.stride, ff.up_stride = up.stride, ff.down_stride = down.stride;
      ff.gate_scale = gate.scale, ff.up_scale = up.scale, ff.down_scale = down.scale, ff.scale_stride = 4;
    }
    embedding = random_bias(true, kVocabulary * kD);
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
    decoder.layers = layers.data(), decoder.embedding = embedding.data(), decoder.embedding_stride = 4 * kD;
    decoder.final = {norm.data(), 1e-5f, 0}, decoder.head = matrix(format, kVocabulary, kD);
    cache.keys = keys.data(), cache.values = values.data(), cache.head_stride = head_stride.data();
    cache.length = length.data(), cache.type = GRIFFIN_F32;
  }

  int run(const griffin_experts* experts = nullptr) {
    logits.assign(static_cast<size_t>(rows) * kVocabulary, NAN);
    return griffin_decode(&decoder, &cache, experts, tokens.data(), rows, logits.data(), between(1, 4));
  }

  // Runs with a value changed, which must be refused, and puts it back.
  template <class T, class U>
  void refuses(const char* what, T& place, U value) {
    const T before = place;
    place = static_cast<T>(value);
    if (run() != GRIFFIN_BAD_ARGUMENT) failures++, printf("decode takes a wrong %s\n", what);
    place = before;
  }
};

void check_decode(int format) {
  Decoder d(format, between(1, 5));
  if (d.run() != GRIFFIN_OK) failures++, printf("decode refuses format %d\n", format);
  for (const float v : d.logits)
    if (!(fabsf(v) < 1e6f)) failures++, printf("decode: a logit is %g in format %d\n", v, format);
  griffin_layer& layer = d.layers[1];
  for (griffin_matrix* const m : {&layer.q, &layer.k, &layer.v, &layer.o, &d.decoder.head}) {
    d.refuses("weight", m->weight, nullptr);
    d.refuses("format", m->format, 5);
    d.refuses("format", m->format, -1);
    d.refuses("width", m->d_in, m->d_in + 1);
    d.refuses("height", m->d_out, m->d_out - 1);
    if (format == GRIFFIN_INT8) d.refuses("scale", m->scale, nullptr);
  }
  d.refuses("mix of formats", layer.k.format, format == GRIFFIN_F32 ? GRIFFIN_BF16 : GRIFFIN_F32);
  d.refuses("up", layer.ff.up, nullptr);
  d.refuses("down", layer.ff.down, nullptr);
  d.refuses("block width", layer.ff.d_model, Decoder::kD + 1);
  d.refuses("block format", layer.ff.format, 7);
  d.refuses("activation", layer.ff.activation, 9);
  d.refuses("table", layer.rope, 1);
  d.refuses("table", layer.rope, 2);
  d.refuses("table", d.decoder.sines[0], nullptr);
  d.refuses("number of positions", d.decoder.positions, d.decoder.positions - 1);
  d.refuses("rotary width", d.decoder.rotary, 5);
  d.refuses("rotary width", d.decoder.rotary, Decoder::kSize + 2);
  d.refuses("embedding", d.decoder.embedding, nullptr);
  d.refuses("embedding format", d.decoder.embedding_format, GRIFFIN_F16);
  d.refuses("vocabulary", d.decoder.vocabulary, Decoder::kVocabulary + 1);
  d.refuses("keys", d.keys.back(), nullptr);
  d.refuses("values", d.values.front(), nullptr);
  d.refuses("length", d.length[0], -1);
  d.refuses("token", d.tokens[0], Decoder::kVocabulary);
  d.decoder.positions = 0;  // not needed without rotary layers
  for (griffin_layer& each : d.layers) each.rope = -1;
  if (d.run() != GRIFFIN_OK) failures++, printf("decode needs rotary tables without rotary layers\n");

  std::vector<griffin_experts> experts(Decoder::kLayers);
  const int32_t some[] = {1, 4, 9};
  experts[0].experts = some, experts[0].n_experts = 3, experts[0].index_bytes = 4;
  if (d.run(experts.data()) != GRIFFIN_OK) failures++, printf("decode refuses experts\n");
  experts[0].index_bytes = 2;
  if (d.run(experts.data()) != GRIFFIN_BAD_ARGUMENT) failures++, printf("decode takes experts of 2 bytes\n");
}

}  // namespace

int main() {
  std::istringstream names(griffin_isas());
  int cases = 0;
  for (std::string isa; names >> isa;) {
    griffin_set_isa(isa.c_str());
    for (int format = GRIFFIN_F32; format <= GRIFFIN_INT4; format++)
      for (int i = 0; i < 60; i++, cases++) {
        const Case c{format,
                     between(1, i % 3 ? 200 : 1300),
                     between(1, 40),
                     between(1, 16),
                     between(1, 4),
                     between(0, 4),
                     between(0, 1) == 1,
                     between(0, 1) == 1,
                     between(0, 1) == 1,
                     between(0, 1) == 1};
        check_ff(isa, c);
        check_matvec(isa, c);
      }
    for (int format = GRIFFIN_F32; format <= GRIFFIN_INT4; format++) check_decode(format);
  }
  if (griffin_ff(nullptr, nullptr, 1) != GRIFFIN_BAD_ARGUMENT || griffin_set_isa("mmx") != GRIFFIN_NO_ISA) failures++;
  printf("%d cases on %s (%s), %d failed\n", cases, griffin_isas(), griffin_threading(), failures);
  return failures != 0;
}
