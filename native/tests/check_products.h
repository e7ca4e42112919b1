// Feedforward calls and products against plain double loops.
#pragma once
#include "calls.h"

namespace {

// The call once more with copies of the experts' rows: to the bit the same.
void check_compact(const griffin_ff_block& block, Call& call, const Case& c) {
  griffin_ff_block compact = block;
  std::vector<uint8_t> copies[3];
  int at = 0;
  for (griffin_matrix* m : {&compact.gate, &compact.up, &compact.down}) {
    if (!m->weight) continue;
    if (m->format != GRIFFIN_GROUPED || m->table) return;
    griffin_parts parts;
    griffin_grouped_bytes(m, &parts);
    const int64_t blocks = (call.io.n_experts + parts.block - 1) / parts.block;
    copies[at].assign(static_cast<size_t>(blocks * parts.block * parts.bytes + GRIFFIN_SLACK), 0xff);
    expect(griffin_copy_rows(m, call.io.experts, call.io.index_bytes, call.io.n_experts, copies[at].data(),
                             c.threads) == GRIFFIN_OK,
           "rows are not copied");
    m->weight = copies[at++].data();
  }
  const std::vector<double> in_place = call.y();
  call.io.compact = &compact;
  expect(griffin_ff(&block, &call.io, c.threads) == GRIFFIN_OK, "ff refuses a compact block");
  expect(call.y() == in_place, "a compact block gives something else");
}

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
  if (kind && !selects) check_compact(block, call, c);
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

}  // namespace
