#include "dynamic.h"

#include <math.h>

#include <algorithm>

#include "experts.h"
#include "half.h"
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

// The bits of |value|: they order as the magnitudes do, with NaN the largest.
uint32_t magnitude(float value) { return bits_of(value) & 0x7fffffffu; }

// A histogram over the scores' highest bits finds the bin that holds the k-th largest score; only that bin is sorted
// further. A NaN counts as the largest.
Edge edge(const float* scores, int64_t n, int64_t k, float* room) {
  uint32_t bins[kBins] = {};
  for (int64_t i = 0; i < n; i++)
    if (!(scores[i] < 0)) bins[magnitude(scores[i]) >> kShift]++;
  int64_t above = 0;
  int bin = kBins - 1;
  while (bin > 0 && above + bins[bin] < k) above += bins[bin--];
  int64_t count = 0;
  for (int64_t i = 0; i < n; i++)
    if (!(scores[i] < 0) && static_cast<int>(magnitude(scores[i]) >> kShift) == bin) room[count++] = scores[i];
  const int64_t wanted = std::min(k - above, count);
  if (wanted <= 0) return {};
  const auto larger = [](float a, float b) { return magnitude(a) > magnitude(b); };
  std::nth_element(room, room + (wanted - 1), room + count, larger);
  Edge found{room[wanted - 1], wanted};
  for (int64_t i = 0; i < wanted - 1; i++) found.equals -= larger(room[i], found.least);
  return found;
}

}  // namespace

int64_t Dynamic::floats(const griffin_ff_block& block, const griffin_io& io, int threads) {
  const int64_t stride = round_up(experts(block, io), 16);
  return 2 * io.rows * stride + threads * (2 * stride + stride / 2);
}

Dynamic::Dynamic(const griffin_ff_block& block, const griffin_io& io, float* memory)
    : block_(block), io_(io), dynamic_(*io.dynamic), n_(experts(block, io)), stride_(round_up(n_, 16)),
      rows_(dynamic_.gate.weight ? dynamic_.gate
            : block.gate.weight  ? block.gate
                                 : block.up),
      bias_(block.gate.weight ? block.gate.bias : block.up.bias) {
  gates_ = memory;
  scores_ = gates_ + io.rows * stride_;
  own_ = scores_ + io.rows * stride_;
}

void Dynamic::gate(const Inputs& x, int thread, int threads) {
  const int64_t begin = n_ * thread / threads, end = n_ * (thread + 1) / threads;
  const Experts expert{io_};
  const Rows w(rows_, x);
  int all[GRIFFIN_MAX_ROWS];
  for (int r = 0; r < io_.rows; r++) all[r] = r;
  for (int64_t i = begin; i < end; i += 2) {
    const int m = end - i >= 2 ? 2 : 1;
    const int64_t j[2] = {expert[i], expert[i + m - 1]};
    const int64_t ahead = i + 4 <= end ? i + 2 : i;
    const int64_t next[2] = {expert[ahead], expert[ahead + m - 1]};
    for (int first = 0; first < io_.rows; first += kMaxRows) {
      const int n = std::min(io_.rows - first, kMaxRows);
      float out[2 * kMaxRows];
      w.dot(j, m, all + first, n, out, next);
      for (int p = 0; p < m; p++) {
        const float bias = bias_ ? bias_[j[p]] : 0.f;
        for (int r = 0; r < n; r++) {
          const int64_t at = (first + r) * stride_ + i + p;
          gates_[at] = out[p * n + r] + bias;
        }
      }
    }
  }
  for (int r = 0; r < io_.rows; r++) {
    float *const gates = gates_ + r * stride_, *const scores = scores_ + r * stride_;
    kernels().activate(block_.activation, gates + begin, nullptr, gates + begin, static_cast<int>(end - begin));
    for (int64_t i = begin; i < end; i++) {
      const bool wanted = !io_.row_mask || (io_.row_mask[i] >> r & 1);
      scores[i] = wanted ? fabsf(gates[i]) * dynamic_.weight[r * dynamic_.weight_stride + expert[i]] : -1.f;
    }
  }
  count_ff_bytes((end - begin) * w.row_bytes());
}

Chosen Dynamic::choose(int thread) const {
  float* const room = own_ + thread * (2 * stride_ + stride_ / 2);
  int32_t* const places = reinterpret_cast<int32_t*>(room + stride_);
  uint16_t* const masks = reinterpret_cast<uint16_t*>(room + 2 * stride_);
  Edge edges[GRIFFIN_MAX_ROWS];
  for (int r = 0; r < io_.rows; r++) edges[r] = edge(scores_ + r * stride_, n_, dynamic_.k, room);
  int64_t count = 0;
  if (io_.rows == 1) {  // without branches: this is a visible share of a small block's time
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
    for (int r = 0; r < io_.rows; r++) {
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
