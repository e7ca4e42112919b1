#include "dynamic.h"

#include <math.h>
#include <string.h>

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
  // Whether the next score is chosen.
  bool takes(float score) { return !(score <= least) || (score == least && equals-- > 0); }  // a NaN is above
};

// The bits of |value|: they order as the magnitudes do, with NaN the largest.
uint32_t magnitude(float value) { return bits_of(value) & 0x7fffffffu; }

// A histogram over the scores' highest bits finds the bin that holds the k-th largest score, for one k after the other;
// only that bin is sorted further. A NaN counts as the largest.
class Edges {
 public:
  Edges(const float* scores, int64_t n) : scores_(scores), n_(n) {
    for (int64_t i = 0; i < n; i++)
      if (!(scores[i] < 0)) bins_[magnitude(scores[i]) >> kShift]++;
  }
  Edge at(int64_t k, float* room) const {
    int64_t above = 0;
    int bin = kBins - 1;
    while (bin > 0 && above + bins_[bin] < k) above += bins_[bin--];
    int64_t count = 0;
    for (int64_t i = 0; i < n_; i++)
      if (!(scores_[i] < 0) && static_cast<int>(magnitude(scores_[i]) >> kShift) == bin) room[count++] = scores_[i];
    const int64_t wanted = std::min(k - above, count);
    if (wanted <= 0) return {};
    const auto larger = [](float a, float b) { return magnitude(a) > magnitude(b); };
    std::nth_element(room, room + (wanted - 1), room + count, larger);
    Edge found{room[wanted - 1], wanted};
    for (int64_t i = 0; i < wanted - 1; i++) found.equals -= larger(room[i], found.least);
    return found;
  }

 private:
  const float* const scores_;
  const int64_t n_;
  uint32_t bins_[kBins] = {};
};

constexpr Edge kNone = {INFINITY, 0};

}  // namespace

int64_t Dynamic::floats(const griffin_ff_block& block, const griffin_io& io, int threads) {
  const int64_t stride = round_up(experts(block, io), 16);
  return 2 * io.rows * stride + threads * own_floats(stride, io.rows);
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

int64_t Dynamic::float_gates(const Rows& of, int64_t begin, int64_t end) {
  const Experts expert{io_};
  int all[GRIFFIN_MAX_ROWS];
  for (int r = 0; r < io_.rows; r++) all[r] = r;
  for (int64_t i = begin; i < end; i += 2) {
    const int m = end - i >= 2 ? 2 : 1;
    const int64_t j[2] = {expert[i], expert[i + m - 1]};
    const int64_t after = i + 2 + m <= end ? i + 2 : i;
    const int64_t next[2] = {expert[after], expert[after + m - 1]};
    for (int from = 0; from < io_.rows; from += kMaxRows) {
      const int n = std::min(io_.rows - from, kMaxRows);
      float out[2 * kMaxRows];
      of.dot(j, m, all + from, n, out, next);
      for (int p = 0; p < m; p++)
        for (int r = 0; r < n; r++) gates_[(from + r) * stride_ + i + p] = out[p * n + r] + (bias_ ? bias_[j[p]] : 0.f);
    }
  }
  return (end - begin) * of.row_bytes();
}

// A run of neurons at a time whose gates the same inputs read whole.
int64_t Dynamic::grouped_gates(const Rows& whole, const Rows& first, int64_t begin, int64_t end) {
  const Experts expert{io_};
  const bool levels = dynamic_.n_levels > 0;
  const uint32_t all = (1u << io_.rows) - 1;
  const auto wholly = [&](int64_t i) { return levels ? dynamic_.whole[i] & all : all; };
  RowFinder find_whole = whole.finder(), find_first = first.finder();
  int64_t bytes = 0;
  RowAt rows[kManyRows + kRowsAhead];
  float out[GRIFFIN_MAX_ROWS * kManyRows];
  for (int64_t i = begin; i < end; i += kManyRows) {
    const int m = static_cast<int>(std::min(end - i, int64_t{kManyRows}));
    const int next = static_cast<int>(std::min(end - i - m, int64_t{kRowsAhead}));
    for (int p = 0; p < m + next; p++) rows[p] = (wholly(i + p) ? find_whole : find_first)(expert[i + p]);
    for (int p = 0, count; p < m; p += count) {
      for (count = 1; p + count < m && wholly(i + p + count) == wholly(i + p);) count++;
      bytes += (wholly(i + p) ? whole : first).row_bytes() * count;
      for (const bool wholes : {true, false}) {
        const uint32_t mask = wholes ? wholly(i + p) : all & ~wholly(i + p);
        int wanted[GRIFFIN_MAX_ROWS], n = 0;
        for (int r = 0; r < io_.rows; r++)
          if (mask >> r & 1) wanted[n++] = r;
        if (!n) continue;
        (wholes ? whole : first).dot(rows + p, count, m + next - p - count, wanted, n, out, kManyRows);
        for (int r = 0; r < n; r++)
          for (int k = p; k < p + count; k++)
            gates_[wanted[r] * stride_ + i + k] = out[r * kManyRows + k - p] + (bias_ ? bias_[expert[i + k]] : 0.f);
      }
    }
  }
  return bytes;
}

void Dynamic::gate(const Inputs& x, int thread, int threads) {
  const int64_t begin = n_ * thread / threads, end = n_ * (thread + 1) / threads;
  const Experts expert{io_};
  const Rows whole(rows_, x), first(rows_, x, dynamic_.n_levels ? dynamic_.first : 0);
  const int64_t bytes = whole.grouped() ? grouped_gates(whole, first, begin, end) : float_gates(whole, begin, end);
  for (int r = 0; r < io_.rows; r++) {
    float *const gates = gates_ + r * stride_, *const scores = scores_ + r * stride_;
    kernels().activate(block_.activation, gates + begin, nullptr, gates + begin, static_cast<int>(end - begin));
    for (int64_t i = begin; i < end; i++) {
      const bool wanted = !io_.row_mask || (io_.row_mask[i] >> r & 1);
      scores[i] = wanted ? fabsf(gates[i]) * dynamic_.weight[r * dynamic_.weight_stride + expert[i]] : -1.f;
    }
  }
  count_ff_bytes(bytes);
}

Chosen Dynamic::choose(int thread) const {
  float* const room = own_ + thread * own_floats(stride_, io_.rows);
  int32_t* const places = reinterpret_cast<int32_t*>(room + stride_);
  uint16_t* const masks = reinterpret_cast<uint16_t*>(room + 2 * stride_);
  uint8_t* const levels = reinterpret_cast<uint8_t*>(room + 2 * stride_ + stride_ / 2);
  const int more = dynamic_.n_levels > 1 ? dynamic_.n_levels - 1 : 0;
  Edge edges[GRIFFIN_MAX_ROWS], higher[GRIFFIN_MAX_ROWS][3];
  for (int r = 0; r < io_.rows; r++) {
    const Edges own(scores_ + r * stride_, n_);
    edges[r] = own.at(dynamic_.k, room);
    for (int l = 0; l < more; l++) higher[r][l] = dynamic_.levels[l + 1] ? own.at(dynamic_.levels[l + 1], room) : kNone;
  }
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
    if (dynamic_.n_levels) {
      memset(levels, 1, static_cast<size_t>(count));
      for (int l = 0; l < more; l++)
        for (int64_t c = 0; c < count; c++) levels[c] += higher[0][l].takes(scores_[places[c]]);
    }
    return {places, nullptr, count, gates_, stride_, dynamic_.n_levels ? levels : nullptr};
  }
  for (int64_t i = 0; i < n_; i++) {
    uint32_t mask = 0;
    for (int r = 0; r < io_.rows; r++) {
      const float score = scores_[r * stride_ + i];
      const bool takes = edges[r].takes(score);
      mask |= static_cast<uint32_t>(takes) << r;
      if (!dynamic_.n_levels) continue;
      levels[count * io_.rows + r] = takes;
      for (int l = 0; takes && l < more; l++) levels[count * io_.rows + r] += higher[r][l].takes(score);
    }
    places[count] = static_cast<int32_t>(i);
    masks[count] = static_cast<uint16_t>(mask);
    count += mask != 0;
  }
  return {places, masks, count, gates_, stride_, dynamic_.n_levels ? levels : nullptr};
}

}  // namespace griffin
