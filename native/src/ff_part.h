// One thread's part of a feedforward call: a few experts at a time, into accumulators of its own.
#pragma once
#include <math.h>
#include <string.h>

#include <memory>
#include <optional>

#include "parts.h"
#include "unpack.h"

namespace griffin {

constexpr int kExperts = 8;     // whose float down rows are added together
constexpr int kColumns = 1024;  // of kExperts down rows: they stay in the first-level cache for all rows of input
constexpr int kVisit = 32;      // experts of a visit at most: kExperts, or those of a group of neurons
constexpr int kRowsAhead = 6;   // rows to the grouped one that is prefetched

// Off the 4096-byte multiples that share a cache set.
inline int64_t accumulator_stride(int d) { return round_up(d, kPad) + 16; }

// Experts that are visited together: neurons, and which rows of input want each.
struct Visit {
  int n = 0;
  int64_t neuron[kVisit];
  uint32_t mask[kVisit];
  const uint8_t* levels = nullptr;  // (n, rows): planes of up and down that a row reads; null: all

  // The planes of the s-th that its row r reads.
  int level(int s, int r, int rows) const { return levels ? levels[s * rows + r] : kMaxPlanes; }
  // The most that any row reads.
  int most(int s, int rows) const {
    if (!levels) return kMaxPlanes;
    int most = 0;
    for (int r = 0; r < rows; r++) most = mask[s] >> r & 1 && level(s, r, rows) > most ? level(s, r, rows) : most;
    return most;
  }
};

class Part {
 public:
  Part(const griffin_ff_block& block, const Inputs& inputs, int rows, bool levels, float* acc)
      : block_(block), kernels_(kernels()), up_(block.up, inputs), gate_(gated() ? block.gate : block.up, inputs),
        grouped_(in_integers(block.down)), rows_(rows), acc_(acc) {
    for (int planes = 1; planes < kMaxPlanes && levels; planes++) up_first_[planes].emplace(block.up, inputs, planes);
    const int whole = static_cast<int>(row_bytes(block.down));
    for (int planes = 1; planes <= kMaxPlanes; planes++) down_bytes_[planes] = whole;
    if (block.down.format != GRIFFIN_GROUPED) return;
    if (block.down.table) room_.reset(new float[kExperts * accumulator_stride(block.down.d_out)]);
    const griffin_grouped& f = block.down.grouped;
    if (levels) zeros_.reset(new uint8_t[block.down.d_out / 4 + 2 * 64]());
    down_plan_ = neuron_plan(f, block.down.d_out, block.down.d_in);
    for (int planes = 1; planes < plane_count(f.bits); planes++)
      down_bytes_[planes] = static_cast<int>(down_plan_.part[planes]);
    group_shift_ = f.group == 32 ? 5 : 4;
    group_bytes_ = has_supers(f) ? down_plan_.sub_stride + down_plan_.super_stride * f.group / kSuper
                                 : down_plan_.super_stride * f.group / f.span;
  }

  // The experts i, i + 1, ... (their neurons: at(i), ...; their rows: mask(i), ...) that are visited together.
  template <class At, class Mask>
  void visit(int64_t i, int64_t end, int chunk, const At& at, const Mask& mask, Visit& out) const {
    out.n = 0;
    if (!grouped_) {
      for (; i < end && out.n < chunk; i++) out.neuron[out.n] = at(i), out.mask[out.n++] = mask(i);
      return;
    }
    const int64_t own = i < end ? at(i) >> group_shift_ : 0;
    for (; i < end && out.n < kVisit; i++) {
      const int64_t j = at(i);
      if (j >> group_shift_ != own) return;
      out.neuron[out.n] = j, out.mask[out.n++] = mask(i);
    }
  }

  // z of the visit's neurons, and the lists of their down rows. `next` is visited after it.
  void enter(const Visit& visit, const Visit& next) {
    memset(first_, 0, sizeof first_[0] * rows_), memset(second_, 0, sizeof second_[0] * rows_);
    const bool streams = up_.grouped() && gate_.grouped();
    if (streams) {
      stream(up_, gated() ? second_ : first_, visit, gated() ? gate_ : up_, gated() ? visit : next);
      if (gated()) stream(gate_, first_, visit, up_, next);
    }
    for (int s = 0; s < visit.n; s++) {
      bytes_ += up_.row_bytes() + (gated() ? gate_.row_bytes() : 0);
      if (streams) continue;
      const int64_t j = visit.neuron[s], ahead = after(visit, next, s + (rows_ == 1 ? 1 : 2));
      in_passes(visit.mask[s], [&](const int* rows, int n) {
        float out[2 * kMaxRows];
        if (gated())
          Rows::dot_both(up_, gate_, j, rows, n, out, ahead);
        else
          up_.dot(&j, 1, rows, n, out, &ahead);
        for (int i = 0; i < n; i++) {
          (gated() ? second_ : first_)[rows[i]][s] = out[i] + up_.bias(j);
          if (gated()) first_[rows[i]][s] = out[n + i] + gate_.bias(j);
        }
      });
    }
    for (int r = 0; r < rows_; r++) {
      float z[kVisit];
      kernels_.activate(block_.activation, first_[r], gated() ? second_[r] : nullptr, z, visit.n);
      list(r, visit, z);
    }
    count_down(visit);
  }

  // The same for neurons whose gates are known: row r's act(gate) of the visit's s-th is gates[r * stride + place[s]].
  // Without a gate, that is act(up), and z itself.
  void enter(const Visit& visit, const Visit& next, const float* gates, int64_t stride, const int32_t* place) {
    memset(second_, 0, sizeof second_[0] * rows_);
    if (gated() && up_.grouped() && !visit.levels) stream(up_, second_, visit, up_, next);
    if (gated() && visit.levels) stream_levels(visit, next);
    if (gated() && !up_.grouped()) {
      for (int s = 0; s < visit.n;
           s += 2) {  // two neurons at a time share the loads of x, if they are for the same rows
        const int m = s + 1 < visit.n && visit.mask[s] == visit.mask[s + 1] ? 2 : 1;
        const int64_t ahead[2] = {after(visit, next, s + 2), after(visit, next, s + 3)};
        in_passes(visit.mask[s], [&](const int* rows, int n) {
          float out[2 * kMaxRows];
          up_.dot(visit.neuron + s, m, rows, n, out, ahead);
          for (int i = 0; i < m; i++)
            for (int at = 0; at < n; at++) second_[rows[at]][s + i] = out[i * n + at] + up_.bias(visit.neuron[s + i]);
        });
        s -= 2 - m;
      }
    }
    for (int s = 0; gated() && s < visit.n; s++) bytes_ += up_to(visit.most(s, rows_)).row_bytes();
    for (int r = 0; r < rows_; r++) {
      float z[kVisit];
      for (int s = 0; s < visit.n; s++) {
        const float gate = visit.mask[s] >> r & 1 ? gates[r * stride + place[s]] : 0.f;
        z[s] = gated() ? gate * second_[r][s] : gate;
      }
      list(r, visit, z);
    }
    count_down(visit);
  }

  // Bytes of weights and scales that were read.
  int64_t bytes() const { return bytes_; }

  // Adds the listed down rows and empties the lists. Meanwhile the down rows of the next visit are prefetched, as gate
  // and up rows are in `enter`: in either phase the memory is kept at work on the other neurons.
  void leave(const Visit& next) {
    if (grouped_) {
      Run runs[kVisit * kMaxPlanes];
      const int n = down_runs(next, runs);
      if (shared_)
        add_shared(runs, n);
      else
        add_group(runs, n);
    } else {
      const uint8_t* ahead[kVisit];
      for (int s = 0; s < next.n; s++) ahead[s] = down_row(next.neuron[s]);
      add_rows(ahead, next.n);
    }
    memset(listed_, 0, sizeof listed_);
  }

 private:
  bool gated() const { return block_.gate.weight != nullptr; }

  const uint8_t* down_row(int64_t j) const {
    return static_cast<const uint8_t*>(block_.down.weight) + j * block_.down.stride;
  }

  // What will be read of a visit's grouped down rows.
  int down_runs(const Visit& visit, Run* runs) const {
    const NeuronPlan& p = down_plan_;
    int n = 0;
    for (int s = 0; s < visit.n; s++) {
      const int most = visit.most(s, rows_), read = most < p.planes ? most : p.planes;
      const RowAt row = p.at(block_.down.weight, visit.neuron[s]);
      for (int i = 0; i < read; i++) {
        const int64_t in_line = reinterpret_cast<uintptr_t>(row.part[i]) % 64;
        runs[n++] = {row.part[i], static_cast<int>((in_line + p.part[i + 1] - p.part[i] + 63) / 64)};
      }
    }
    return n;
  }

  // The neuron that is s-th from the visit's first on.
  static int64_t after(const Visit& visit, const Visit& next, int s) {
    if (s < visit.n) return visit.neuron[s];
    return s - visit.n < next.n ? next.neuron[s - visit.n] : visit.neuron[0];
  }

  // Whether every row of input wants every neuron of a visit.
  bool for_all(const Visit& visit) const {
    const uint32_t all = (1u << rows_) - 1;
    for (int s = 0; s < visit.n; s++)
      if (visit.mask[s] != all) return false;
    return true;
  }

  // use(rows, n): the rows of input in `mask`, as many at a time as a product takes.
  template <class Use> void in_passes(uint32_t mask, const Use& use) const {
    int wanted[GRIFFIN_MAX_ROWS], count = 0;
    for (int r = 0; r < rows_; r++)
      if (mask >> r & 1) wanted[count++] = r;
    for (int first = 0; first < count; first += kMaxRows)
      use(wanted + first, count - first < kMaxRows ? count - first : kMaxRows);
  }

  // Products and biases of a grouped matrix's rows, one row after the other; `then` and its visit come next.
  void stream(const Rows& of, float (*out)[kVisit], const Visit& visit, const Rows& then, const Visit& next) const {
    if (rows_ >= kMany && for_all(visit)) {
      RowAt rows[2 * kVisit];
      for (int s = 0; s < visit.n; s++) rows[s] = of.at(visit.neuron[s]);
      for (int s = 0; s < next.n; s++) rows[visit.n + s] = then.at(next.neuron[s]);
      of.dot_many(rows, visit.n, next.n, 0, rows_, out[0], kVisit);
      for (int r = 0; r < rows_; r++)
        for (int s = 0; s < visit.n; s++) out[r][s] += of.bias(visit.neuron[s]);
      return;
    }
    for (int s = 0; s < visit.n; s++) {
      const int ahead = s + kRowsAhead, over = ahead - visit.n;
      const RowAt prefetched = ahead < visit.n ? of.at(visit.neuron[ahead])
                               : over < next.n ? then.at(next.neuron[over])
                                               : RowAt{};
      const int64_t j = visit.neuron[s];
      in_passes(visit.mask[s], [&](const int* rows, int n) {
        float products[kMaxRows];
        of.dot(j, rows, n, products, prefetched);
        for (int i = 0; i < n; i++) out[rows[i]][s] = products[i] + of.bias(j);
      });
    }
  }

  // Up's rows to their first planes.
  const Rows& up_to(int planes) const { return planes < kMaxPlanes ? *up_first_[planes] : up_; }

  // Products and biases of up's rows, each to the planes that its rows of input read.
  void stream_levels(const Visit& visit, const Visit& next) {
    for (int s = 0; s < visit.n; s++) {
      const int ahead = s + kRowsAhead, over = ahead - visit.n;
      const int64_t j = visit.neuron[s];
      const RowAt prefetched = ahead < visit.n ? up_to(visit.most(ahead, rows_)).at(visit.neuron[ahead])
                               : over < next.n ? up_to(next.most(over, rows_)).at(next.neuron[over])
                                               : RowAt{};
      for (uint32_t left = visit.mask[s]; left;) {
        int first = 0;
        while (!(left >> first & 1)) first++;
        const int planes = visit.level(s, first, rows_);
        uint32_t mask = 0;
        for (int r = first; r < rows_; r++) mask |= static_cast<uint32_t>(visit.level(s, r, rows_) == planes) << r;
        in_passes(left & mask, [&](const int* rows, int n) {
          float products[kMaxRows];
          up_to(planes).dot(j, rows, n, products, prefetched);
          for (int i = 0; i < n; i++) second_[rows[i]][s] = products[i] + up_.bias(j);
        });
        left &= ~mask;
      }
    }
  }

  // The visit's down rows join row r's list, unless z is 0 (ReLU): nothing to add, nothing to read. Several rows of input
  // that read the same planes share one list.
  void list(int r, const Visit& visit, const float* z) {
    int n = 0;
    group_ = static_cast<int>(visit.neuron[0] >> group_shift_);
    shared_ = rows_ > 1 && grouped_ && !visit.levels;
    if (shared_) {
      memcpy(z_[r], z, sizeof(float) * visit.n);
      for (int s = 0; s < visit.n; s++) any_ |= static_cast<uint32_t>(z[s] != 0.f) << s;
      listed_[r] = visit.n;
      if (r) return;
      for (int s = 0; s < visit.n; s++) {
        const RowAt row = down_plan_.at(block_.down.weight, visit.neuron[s]);
        for (int i = 0; i < down_plan_.planes; i++) down_[0][i][s] = row.part[i];
      }
      return;
    }
    for (int s = 0; s < visit.n; s++) {
      if (z[s] == 0.f) continue;
      if (room_ && !(any_ >> s & 1)) unpack_row(block_.down, visit.neuron[s], unpacked(s));
      any_ |= 1u << s;
      z_[r][n] = z[s];
      if (grouped_) {
        const int level = visit.level(s, r, rows_), bits = down_plan_.format.bits;
        const RowAt row = down_plan_.at(block_.down.weight, visit.neuron[s]);
        for (int i = 0; i < down_plan_.planes; i++) down_[r][i][n] = i < level ? row.part[i] : zeros_.get();
        mean_[r][n] = static_cast<float>((1 << (bits - bits_of_planes(bits, level))) - 1) / 2;
      } else {
        down_[r][0][n] = room_ ? reinterpret_cast<const uint8_t*>(unpacked(s)) : down_row(visit.neuron[s]);
      }
      n++;
    }
    listed_[r] = n;
  }

  // Where the visit's s-th down row of a table format is, as float32.
  float* unpacked(int s) const { return room_.get() + s * accumulator_stride(block_.down.d_out); }

  void count_down(const Visit& visit) {
    for (int s = 0; s < visit.n; s++)
      if (any_ >> s & 1) bytes_ += down_bytes_[visit.most(s, rows_)];
    bytes_ += any_ ? group_bytes_ : 0;
    any_ = 0;
  }

  void add_rows(const uint8_t* const* ahead, int n_ahead) {
    const int d = block_.down.d_out;
    for (int begin = 0; begin < d; begin += kColumns) {
      const int end = begin + kColumns < d ? begin + kColumns : d;
      int rest = room_ ? 0 : n_ahead;  // the first row of input prefetches for all
      for (int r = 0; r < rows_; r++) {
        if (!listed_[r]) continue;
        const int format = room_ ? GRIFFIN_F32 : block_.down.format;
        kernels_.axpy[format](acc_ + r * accumulator_stride(d), down_[r][0], z_[r], listed_[r], d, begin, end, ahead,
                              rest);
        rest = 0;
      }
    }
  }

  // The listed neurons are of one group: z is quantised too, its products with the codes are summed in integers and
  // scaled once.
  void add_group(const Run* ahead, int n_ahead) {
    const auto down = kernels_.grouped->down[block_.down.grouped.bits - 2];
    for (int r = 0; r < rows_; r++) {
      const int n = listed_[r];
      if (!n) continue;
      int32_t quads[kVisit / 4];
      int total;
      const float factor = quantise_z(z_[r], n, quads, &total);
      const int8_t* const z = reinterpret_cast<const int8_t*>(quads);
      float rest = 0;
      for (int i = 0; i < n; i++) rest += mean_[r][i] * static_cast<float>(z[i]);
      for (int w = 0; w < down_plan_.planes; w++)
        for (int i = n; i % 4; i++) down_[r][w][i] = down_[r][w][n - 1];
      const GroupOfNeurons neurons{static_cast<const uint8_t*>(block_.down.scales),
                                   group_,
                                   (n + 3) / 4,
                                   total,
                                   rest,
                                   down_[r][0],
                                   kVisit,
                                   quads,
                                   factor,
                                   ahead,
                                   n_ahead};
      down(down_plan_, neurons, 0, down_plan_.d, acc_ + r * accumulator_stride(block_.down.d_out));
      n_ahead = 0;  // the first row of input prefetches for all
    }
  }

  // The same for a list that several rows of input share: the codes are unpacked once. To the bit as one row's.
  void add_shared(const Run* ahead, int n_ahead) {
    const int n = listed_[0], quads = (n + 3) / 4;
    int32_t z[GRIFFIN_MAX_ROWS][kGroupQuads], total[GRIFFIN_MAX_ROWS];
    float factor[GRIFFIN_MAX_ROWS];
    if (!n) return;
    for (int r = 0; r < rows_; r++) factor[r] = quantise_z(z_[r], n, z[r], total + r);
    for (int w = 0; w < down_plan_.planes; w++)
      for (int i = n; i % 4; i++) down_[0][w][i] = down_[0][w][n - 1];
    const ManyZ many{rows_, z[0], kGroupQuads, total, factor, 1, acc_, accumulator_stride(block_.down.d_out)};
    const GroupsOfNeurons groups{
        static_cast<const uint8_t*>(block_.down.scales), group_, 1, quads, down_[0][0], kVisit, ahead, n_ahead};
    kernels_.grouped->down_many[block_.down.grouped.bits - 2](down_plan_, groups, 0, down_plan_.d, many);
  }

  const griffin_ff_block& block_;
  const Kernels& kernels_;
  const Rows up_, gate_;
  std::optional<Rows> up_first_[kMaxPlanes];  // [planes]
  const bool grouped_;
  NeuronPlan down_plan_ = {};
  int down_bytes_[kMaxPlanes + 1] = {};  // of a row's first planes
  const int rows_;
  float* const acc_;
  int64_t bytes_ = 0, group_bytes_ = 0;
  std::unique_ptr<float[]> room_;    // of a table format: the visit's down rows
  int group_shift_ = 0, group_ = 0;  // the listed neurons' group
  bool shared_ = false;              // one list for all rows of input
  uint32_t any_ = 0;                 // which of the visit some row has listed
  int listed_[GRIFFIN_MAX_ROWS] = {};
  float first_[GRIFFIN_MAX_ROWS][kVisit], second_[GRIFFIN_MAX_ROWS][kVisit];  // what is activated, its factor
  float z_[GRIFFIN_MAX_ROWS][kVisit];
  float mean_[GRIFFIN_MAX_ROWS][kVisit];  // of what is not read of a code
  const uint8_t* down_[GRIFFIN_MAX_ROWS][kMaxPlanes][kVisit];
  std::unique_ptr<uint8_t[]> zeros_;  // for the planes that are not read
};

}  // namespace griffin
