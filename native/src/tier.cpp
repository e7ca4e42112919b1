#include "tier.h"

#include <math.h>
#include <string.h>

#include <algorithm>

#include "activation.h"
#include "experts.h"
#include "parallel.h"

namespace griffin {
namespace {

constexpr int kShift = 20, kBins = 1 << (31 - kShift);  // a float's exponent and 3 bits of its fraction

// Of n scores those above `least` are chosen, and of those equal to it the first `equals`: k together, or all of them
// that are not negative, if they are fewer.
struct Edge {
  float least = 0;
  int64_t equals = 0;
};

uint32_t bits(float value) {
  uint32_t found;
  memcpy(&found, &value, 4);
  return found;
}

// Scores are counted by their highest bits, which order as they do, and only those of the bin at the edge are looked at
// closely. NaN counts as the largest.
Edge edge(const float* scores, int64_t n, int64_t k, float* room) {
  uint32_t bins[kBins] = {};
  for (int64_t i = 0; i < n; i++)
    if (!(scores[i] < 0)) bins[(bits(scores[i]) & 0x7fffffffu) >> kShift]++;
  int64_t above = 0;
  int bin = kBins - 1;
  while (bin > 0 && above + bins[bin] < k) above += bins[bin--];
  int64_t count = 0;
  for (int64_t i = 0; i < n; i++)
    if (!(scores[i] < 0) && static_cast<int>((bits(scores[i]) & 0x7fffffffu) >> kShift) == bin) room[count++] = scores[i];
  const int64_t wanted = std::min(k - above, count);
  if (wanted <= 0) return {};
  // By their bits: a NaN among them, which compares with nothing, has its place.
  const auto larger = [](float a, float b) { return (bits(a) & 0x7fffffffu) > (bits(b) & 0x7fffffffu); };
  std::nth_element(room, room + (wanted - 1), room + count, larger);
  Edge found{room[wanted - 1], wanted};
  for (int64_t i = 0; i < wanted - 1; i++) found.equals -= larger(room[i], found.least);
  return found;
}

}  // namespace

bool Tier::valid(const griffin_ff_block& block, const griffin_tier& tier) {
  if (!tier.weight || tier.weight_stride < 0 || tier.k < 1) return false;
  const griffin_matrix& gate = tier.gate;
  return !gate.weight || (gate.d_in == block.d_model && gate.d_out == block.d_ff && gate.format >= GRIFFIN_F32 &&
                          gate.format <= GRIFFIN_INT4 && (gate.format != GRIFFIN_INT8 || gate.scale));
}

int64_t Tier::floats(const griffin_ff_block& block, const griffin_rows& rows, int threads) {
  const int64_t stride = round_up(experts(block, rows), 16);
  return 2 * rows.rows * stride + threads * (2 * stride + stride / 2);
}

Tier::Tier(const griffin_ff_block& block, const griffin_rows& rows, float* memory)
    : block_(block), rows_(rows), tier_(*rows.tier), n_(experts(block, rows)), stride_(round_up(n_, 16)) {
  gates_ = memory;
  scores_ = gates_ + rows.rows * stride_;
  own_ = scores_ + rows.rows * stride_;
  const bool other = tier_.gate.weight != nullptr;
  format_ = other ? tier_.gate.format : block.format;
  const bool gated = block.gate != nullptr;  // else up is what the activation is of
  weight_ = static_cast<const uint8_t*>(other ? tier_.gate.weight : gated ? block.gate : block.up);
  weight_stride_ = other ? tier_.gate.stride : gated ? block.gate_stride : block.up_stride;
  scale_ = other ? tier_.gate.scale : gated ? block.gate_scale : block.up_scale;
  bias_ = gated ? block.gate_bias : block.up_bias;
  scale_stride_ = other ? sizeof(float) : block.scale_stride;
}

void Tier::gate(const Inputs& x, int thread, int threads) {
  const int64_t begin = n_ * thread / threads, end = n_ * (thread + 1) / threads;
  const Experts expert{rows_};
  const auto row = [this](int64_t j) { return weight_ + j * weight_stride_; };
  for (int64_t i = begin; i < end; i += 2) {
    const int m = end - i >= 2 ? 2 : 1;
    const int64_t j[2] = {expert[i], expert[i + m - 1]};
    const int64_t ahead = i + 4 <= end ? i + 2 : i;
    const uint8_t* const w[2] = {row(j[0]), row(j[1])};
    const uint8_t* const next[2] = {row(expert[ahead]), row(expert[ahead + m - 1])};
    for (int first = 0; first < rows_.rows; first += kMaxRows) {
      const int n = std::min(rows_.rows - first, kMaxRows);
      const Input* in[kMaxRows];
      float out[2 * kMaxRows];
      for (int r = 0; r < n; r++) in[r] = &x[first + r];
      x.dot()(w, m, in, n, block_.d_model, out, next);
      for (int p = 0; p < m; p++) {
        const float scale = scale_ ? *reinterpret_cast<const float*>(reinterpret_cast<const char*>(scale_) + j[p] * scale_stride_) : 1.f;
        const float bias = bias_ ? bias_[j[p]] : 0.f;
        for (int r = 0; r < n; r++) {
          const int64_t at = (first + r) * stride_ + i + p;
          const bool wanted = !rows_.row_mask || (rows_.row_mask[i + p] >> (first + r) & 1);
          gates_[at] = activate(block_.activation, out[p * n + r] * scale + bias);
          scores_[at] = wanted ? fabsf(gates_[at]) * tier_.weight[(first + r) * tier_.weight_stride + j[p]] : -1.f;
        }
      }
    }
  }
  count_ff_bytes((end - begin) * (griffin_row_bytes(format_, block_.d_model) + (scale_ ? 4 : 0)));
}

Chosen Tier::choose(int thread) const {
  float* const room = own_ + thread * (2 * stride_ + stride_ / 2);
  int32_t* const places = reinterpret_cast<int32_t*>(room + stride_);
  uint16_t* const masks = reinterpret_cast<uint16_t*>(room + 2 * stride_);
  Edge edges[GRIFFIN_MAX_ROWS];
  for (int r = 0; r < rows_.rows; r++) edges[r] = edge(scores_ + r * stride_, n_, tier_.k, room);
  int64_t count = 0;
  if (rows_.rows == 1) {  // without branches: this is a visible share of a small block's time
    const Edge only = edges[0];
    int64_t equals = only.equals;
    for (int64_t i = 0; i < n_; i++) {
      const int equal = scores_[i] == only.least, above = !(scores_[i] <= only.least);  // a NaN is above
      places[count] = static_cast<int32_t>(i);
      count += above | (equal & (equals > 0));
      equals -= equal;
    }
    return {places, nullptr, count, gates_, stride_};
  }
  for (int64_t i = 0; i < n_; i++) {
    uint32_t mask = 0;
    for (int r = 0; r < rows_.rows; r++) {
      const float score = scores_[r * stride_ + i];
      const bool above = !(score <= edges[r].least);
      mask |= static_cast<uint32_t>(above || (score == edges[r].least && edges[r].equals-- > 0)) << r;
    }
    places[count] = static_cast<int32_t>(i);
    masks[count] = static_cast<uint16_t>(mask);
    count += mask != 0;
  }
  return {places, masks, count, gates_, stride_};
}

}  // namespace griffin
