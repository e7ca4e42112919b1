// The generation step.
#pragma once
#include "calls.h"

namespace {

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

}  // namespace
