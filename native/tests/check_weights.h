// Weights that are moved into the layouts, taken out of them, or quantised.
#pragma once
#include "weights.h"

namespace {

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

}  // namespace
