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
constexpr int kAllPlanes = 4;
constexpr int kVisit = 32;     // experts of a visit at most: kExperts, or those of a group of neurons
constexpr int kRowsAhead = 6;  // rows to the grouped one that is prefetched

// Off the 4096-byte multiples that share a cache set.
inline int64_t accumulator_stride(int d) { return round_up(d, kPad) + 16; }

// Experts that are visited together: neurons, and which rows of input want each.
struct Visit {
  int n = 0;
  int64_t neuron[kVisit];
  uint32_t mask[kVisit];
  const uint8_t* levels = nullptr;  // (n, rows): planes of up and down that a row reads; null: all

  // The planes of the s-th that its row r reads.
  int level(int s, int r, int rows) const { return levels ? levels[s * rows + r] : kAllPlanes; }
  // The most that any row reads.
  int most(int s, int rows) const {
    if (!levels) return kAllPlanes;
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
    for (int planes = 1; planes < kAllPlanes && levels; planes++) up_first_[planes].emplace(block.up, inputs, planes);
    const int whole = static_cast<int>(row_bytes(block.down));
    for (int planes = 1; planes <= kAllPlanes; planes++) down_bytes_[planes] = whole;
    if (block.down.format != GRIFFIN_GROUPED) return;
    if (block.down.table) room_.reset(new float[kExperts * accumulator_stride(block.down.d_out)]);
    const griffin_grouped& f = block.down.grouped;
    down_plan_ = neuron_plan(f, block.down.d_out, block.down.d_in);
    for (int planes = 1; planes < plane_count(f.bits); planes++)
      down_bytes_[planes] = static_cast<int>(down_plan_.plane[planes]);
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
    const uint8_t* ahead[kVisit];
    int bytes[kVisit];
    for (int s = 0; s < next.n; s++) {
      ahead[s] = down_row(next.neuron[s]);
      if (levels_) bytes[s] = down_bytes_[next.most(s, rows_)];
    }
    if (levels_)
      add_levels(ahead, bytes, next.n);
    else if (grouped_)
      add_group(ahead, next.n);
    else
      add_rows(ahead, next.n);
    memset(listed_, 0, sizeof listed_);
  }

 private:
  bool gated() const { return block_.gate.weight != nullptr; }

  const uint8_t* down_row(int64_t j) const {
    return static_cast<const uint8_t*>(block_.down.weight) + j * block_.down.stride;
  }

  // The neuron that is s-th from the visit's first on.
  static int64_t after(const Visit& visit, const Visit& next, int s) {
    if (s < visit.n) return visit.neuron[s];
    return s - visit.n < next.n ? next.neuron[s - visit.n] : visit.neuron[0];
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
    for (int s = 0; s < visit.n; s++) {
      const int ahead = s + kRowsAhead, over = ahead - visit.n;
      const uint8_t* const prefetched = ahead < visit.n ? of.row(visit.neuron[ahead])
                                        : over < next.n ? then.row(next.neuron[over])
                                                        : of.row(visit.neuron[s]);
      const int64_t j = visit.neuron[s];
      in_passes(visit.mask[s], [&](const int* rows, int n) {
        float products[kMaxRows];
        of.dot(j, rows, n, products, prefetched);
        for (int i = 0; i < n; i++) out[rows[i]][s] = products[i] + of.bias(j);
      });
    }
  }

  // Up's rows to their first planes.
  const Rows& up_to(int planes) const { return planes < kAllPlanes ? *up_first_[planes] : up_; }

  // Products and biases of up's rows, each to the planes that its rows of input read.
  void stream_levels(const Visit& visit, const Visit& next) {
    for (int s = 0; s < visit.n; s++) {
      const int ahead = s + kRowsAhead, over = ahead - visit.n;
      const int64_t j = visit.neuron[s];
      const uint8_t* const prefetched = up_.row(ahead < visit.n ? visit.neuron[ahead]
                                                : over < next.n ? next.neuron[over]
                                                                : j);
      for (int planes = 1; planes <= kAllPlanes; planes++) {
        uint32_t mask = 0;
        for (int r = 0; r < rows_; r++) mask |= static_cast<uint32_t>(visit.level(s, r, rows_) == planes) << r;
        in_passes(visit.mask[s] & mask, [&](const int* rows, int n) {
          float products[kMaxRows];
          up_to(planes).dot(j, rows, n, products, prefetched);
          for (int i = 0; i < n; i++) second_[rows[i]][s] = products[i] + up_.bias(j);
        });
      }
    }
  }

  // The visit's down rows join row r's list, unless z is 0 (ReLU): nothing to add, nothing to read.
  void list(int r, const Visit& visit, const float* z) {
    int n = 0;
    for (int s = 0; s < visit.n; s++) {
      if (z[s] == 0.f) continue;
      if (room_ && !(any_ >> s & 1)) unpack_row(block_.down, visit.neuron[s], unpacked(s));
      any_ |= 1u << s;
      if (visit.levels) level_[r][n] = static_cast<uint8_t>(visit.level(s, r, rows_));
      z_[r][n] = z[s];
      down_[r][n++] = room_ ? reinterpret_cast<const uint8_t*>(unpacked(s)) : down_row(visit.neuron[s]);
    }
    listed_[r] = n;
    levels_ = visit.levels != nullptr;
    group_ = static_cast<int>(visit.neuron[0] >> group_shift_);
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
        kernels_.axpy[format](acc_ + r * accumulator_stride(d), down_[r], z_[r], listed_[r], d, begin, end, ahead,
                              rest);
        rest = 0;
      }
    }
  }

  // The listed neurons are of one group: z is quantised too, its products with the codes are summed in integers and
  // scaled once.
  void add_group(const uint8_t* const* ahead, int n_ahead) {
    const auto down = kernels_.grouped->down[block_.down.grouped.bits - 2];
    for (int r = 0; r < rows_; r++) {
      const int n = listed_[r];
      if (!n) continue;
      int32_t quads[kVisit / 4];
      int total;
      const float factor = quantise_z(z_[r], n, quads, &total);
      for (int i = n; i % 4; i++) down_[r][i] = down_[r][n - 1];
      const GroupOfNeurons neurons{static_cast<const uint8_t*>(block_.down.scales),
                                   group_,
                                   (n + 3) / 4,
                                   total,
                                   down_[r],
                                   quads,
                                   factor,
                                   ahead,
                                   n_ahead};
      down(down_plan_, neurons, 0, down_plan_.d, acc_ + r * accumulator_stride(block_.down.d_out));
      n_ahead = 0;  // the first row of input prefetches for all
    }
  }

  // The same where the codes of a neuron are read to its level: sums of every level, scaled together.
  void add_levels(const uint8_t* const* ahead, const int* ahead_bytes, int n_ahead) {
    const int bits = block_.down.grouped.bits;
    for (int r = 0; r < rows_; r++) {
      const int n = listed_[r];
      if (!n) continue;
      int32_t packed[kVisit / 4];
      GroupOfNeurons of{};
      of.scales = static_cast<const uint8_t*>(block_.down.scales), of.group = group_;
      of.factor = quantise_z(z_[r], n, packed, &of.total);
      of.ahead = ahead, of.n_ahead = n_ahead;
      const int8_t* const z = reinterpret_cast<const int8_t*>(packed);
      const uint8_t* rows[kAllPlanes][kVisit + 4];
      int8_t own[kAllPlanes][kVisit + 4] = {};
      int32_t quads[kAllPlanes][kVisit / 4];
      LevelOfNeurons levels[kAllPlanes];
      int used = 0;
      for (int planes = 1; planes <= kAllPlanes; planes++) {
        int count = 0, total = 0;
        for (int i = 0; i < n; i++)
          if ((level_[r][i] < plane_count(bits) ? level_[r][i] : kAllPlanes) == planes)
            rows[used][count] = down_[r][i], own[used][count++] = z[i], total += z[i];
        if (!count) continue;
        const int read = bits_of_planes(bits, planes);
        for (int i = count; i % 4; i++) rows[used][i] = rows[used][count - 1];
        memcpy(quads[used], own[used], static_cast<size_t>((count + 3) / 4 * 4));
        levels[used] = {read, bits - read, (count + 3) / 4, total, rows[used], quads[used]};
        used++;
      }
      kernels_.grouped->down_levels(down_plan_, of, levels, used, ahead_bytes, down_plan_.d,
                                    acc_ + r * accumulator_stride(block_.down.d_out));
      n_ahead = 0;
    }
  }

  const griffin_ff_block& block_;
  const Kernels& kernels_;
  const Rows up_, gate_;
  std::optional<Rows> up_first_[kAllPlanes];  // [planes]
  const bool grouped_;
  NeuronPlan down_plan_ = {};
  int down_bytes_[kAllPlanes + 1] = {};  // of a row's first planes
  const int rows_;
  float* const acc_;
  int64_t bytes_ = 0, group_bytes_ = 0;
  std::unique_ptr<float[]> room_;    // of a table format: the visit's down rows
  int group_shift_ = 0, group_ = 0;  // the listed neurons' group
  uint32_t any_ = 0;                 // which of the visit some row has listed
  int listed_[GRIFFIN_MAX_ROWS] = {};
  float first_[GRIFFIN_MAX_ROWS][kVisit], second_[GRIFFIN_MAX_ROWS][kVisit];  // what is activated, its factor
  float z_[GRIFFIN_MAX_ROWS][kVisit];
  uint8_t level_[GRIFFIN_MAX_ROWS][kVisit];
  bool levels_ = false;
  const uint8_t* down_[GRIFFIN_MAX_ROWS][kVisit];
};

}  // namespace griffin
