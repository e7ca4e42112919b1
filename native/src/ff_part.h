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

// Off the 4096-byte multiples that share a cache set.
inline int64_t accumulator_stride(int d) { return round_up(d, kPad) + 16; }

// Experts that are visited together: neurons, and which rows of input want each.
struct Visit {
  int n = 0;
  int64_t neuron[kVisit], row[kVisit];  // row: where its weights are
  uint32_t mask[kVisit];
  const uint8_t* levels = nullptr;  // (n, rows): planes of up and down that a row reads; null: all
  // Where a grouped down's planes are, up to those that some row of input reads, padded to whole quads.
  const uint8_t* down[kMaxPlanes][kVisit];

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
  // compact: the experts' rows lie in their order (griffin_io::compact).
  Part(const griffin_ff_block& block, const Inputs& inputs, int rows, bool levels, bool compact, float* acc)
      : block_(block), kernels_(kernels()), up_(block.up, inputs), gate_(gated() ? block.gate : block.up, inputs),
        grouped_(in_integers(block.down)), compact_(compact), rows_(rows), acc_(acc) {
    for (int planes = 1; planes < kMaxPlanes && levels; planes++) up_first_[planes].emplace(block.up, inputs, planes);
    const int whole = static_cast<int>(row_bytes(block.down));
    for (int planes = 1; planes <= kMaxPlanes; planes++) down_bytes_[planes] = whole;
    if (block.down.format != GRIFFIN_GROUPED) return;
    if (block.down.table) room_.reset(new float[kExperts * accumulator_stride(block.down.d_out)]);
    const griffin_grouped& f = block.down.grouped;
    if (levels) zeros_.reset(new uint8_t[block.down.d_out / 4 + 2 * 64]());
    down_plan_ = neuron_plan(f, block.down.d_out, block.down.d_in);
    find_down_.emplace(down_plan_.finder(block.down.weight));
    for (int planes = 1; planes < plane_count(f.bits); planes++)
      down_bytes_[planes] = static_cast<int>(down_plan_.part[planes]);
    group_shift_ = f.group == 32 ? 5 : 4;
    group_bytes_ = has_supers(f) ? down_plan_.sub_stride + down_plan_.super_stride * f.group / kSuper
                                 : down_plan_.super_stride * f.group / f.span;
  }

  // The experts i, i + 1, ... (their neurons: at(i), ...; their rows: mask(i), ...) that are visited together.
  template <class At, class Mask>
  void visit(int64_t i, int64_t end, int chunk, const At& at, const Mask& mask, const uint8_t* levels, Visit& out) {
    out.n = 0, out.levels = levels ? levels + i * rows_ : nullptr;
    if (!grouped_) {
      for (; i < end && out.n < chunk; i++) out.neuron[out.n] = out.row[out.n] = at(i), out.mask[out.n++] = mask(i);
      return;
    }
    const int64_t own = i < end ? at(i) >> group_shift_ : 0;
    for (; i < end && out.n < kVisit; i++) {
      const int64_t j = at(i);
      if (j >> group_shift_ != own) break;
      const int s = out.n++;
      out.neuron[s] = j, out.row[s] = compact_ ? i : j, out.mask[s] = mask(i);
      const RowAt row = (*find_down_)(out.row[s]);
      const int most = out.most(s, rows_);
      for (int p = 0; p < kMaxPlanes; p++) out.down[p][s] = row.part[p < most ? p : 0];
    }
    for (int s = out.n; s % 4; s++)
      for (int p = 0; p < kMaxPlanes; p++) out.down[p][s] = out.down[p][s - 1];
  }

  // z of the visit's neurons, and the lists of their down rows. `next` is visited after it.
  void enter(const Visit& visit, const Visit& next) {
    memset(first_, 0, sizeof first_[0] * rows_), memset(second_, 0, sizeof second_[0] * rows_);
    auto& up = gated() ? second_ : first_;
    if (!up_.grouped() && !gate_.grouped()) {
      both_floats(visit, next);
    } else {
      products(up_, up, visit, gated() ? gate_ : up_, gated() ? visit : next);
      if (gated()) products(gate_, first_, visit, up_, next);
    }
    for (int s = 0; s < visit.n; s++) bytes_ += up_.row_bytes() + (gated() ? gate_.row_bytes() : 0);
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
    if (gated() && visit.levels) stream_levels(visit, next);
    if (gated() && !visit.levels) products(up_, second_, visit, up_, next);
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
      const int next_group = next.n ? static_cast<int>(next.neuron[0] >> group_shift_) : 0;
      const Upcoming upcoming{next.down[0], kVisit, next.n, next_group};
      if (shared_)
        add_shared(upcoming);
      else
        add_group(upcoming);
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

  // Products and biases of a matrix's rows; `then` and its visit come next.
  void products(const Rows& of, float (*out)[kVisit], const Visit& visit, const Rows& then, const Visit& next) const {
    if (of.grouped())
      stream(of, out, visit, then, next);
    else
      floats(of, out, visit, next);
  }

  // Two neurons at a time share the loads of x, if they are for the same rows of input.
  void floats(const Rows& of, float (*out)[kVisit], const Visit& visit, const Visit& next) const {
    for (int s = 0, m; s < visit.n; s += m) {
      m = s + 1 < visit.n && visit.mask[s] == visit.mask[s + 1] ? 2 : 1;
      const int64_t ahead[2] = {after(visit, next, s + 2), after(visit, next, s + 3)};
      in_passes(visit.mask[s], [&](const int* rows, int n) {
        float own[2 * kMaxRows];
        of.dot(visit.neuron + s, m, rows, n, own, ahead);
        for (int i = 0; i < m; i++)
          for (int at = 0; at < n; at++) out[rows[at]][s + i] = own[i * n + at] + of.bias(visit.neuron[s + i]);
      });
    }
  }

  // Up and gate of one neuron after the other, in one pass over the inputs.
  void both_floats(const Visit& visit, const Visit& next) {
    for (int s = 0; s < visit.n; s++) {
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
  }

  // Products and biases of a grouped matrix's rows; `then` and its visit come next.
  void stream(const Rows& of, float (*out)[kVisit], const Visit& visit, const Rows& then, const Visit& next) const {
    RowAt rows[kVisit + kRowsAhead];
    const int ahead = !then.grouped() ? 0 : next.n < kRowsAhead ? next.n : kRowsAhead;
    RowFinder find = of.finder(), find_next = then.finder();
    for (int s = 0; s < visit.n; s++) rows[s] = find(visit.row[s]);
    for (int s = 0; s < ahead; s++) rows[visit.n + s] = find_next(next.row[s]);
    if (for_all(visit)) {
      int all[GRIFFIN_MAX_ROWS];
      for (int r = 0; r < rows_; r++) all[r] = r;
      of.dot(rows, visit.n, ahead, all, rows_, out[0], kVisit);
    } else {
      for (int s = 0; s < visit.n; s++)
        in_passes(visit.mask[s], [&](const int* wanted, int n) {
          float products[kMaxRows];
          of.dot(rows + s, 1, visit.n - s - 1 + ahead, wanted, n, products, 1);
          for (int i = 0; i < n; i++) out[wanted[i]][s] = products[i];
        });
    }
    for (int r = 0; r < rows_; r++)
      for (int s = 0; s < visit.n; s++)
        if (visit.mask[s] >> r & 1) out[r][s] += of.bias(visit.neuron[s]);
  }

  // Up's rows to their first planes.
  const Rows& up_to(int planes) const { return planes < kMaxPlanes ? *up_first_[planes] : up_; }

  // Products and biases of up's rows, each to the planes that its rows of input read.
  void stream_levels(const Visit& visit, const Visit& next) {
    RowAt rows[kVisit + kRowsAhead];
    const int ahead = next.n < kRowsAhead ? next.n : kRowsAhead;
    RowFinder find[kMaxPlanes + 1] = {up_.finder(), up_to(1).finder(), up_to(2).finder(), up_to(3).finder(),
                                      up_.finder()};
    for (int s = 0; s < visit.n; s++) rows[s] = find[visit.most(s, rows_)](visit.row[s]);
    for (int s = 0; s < ahead; s++) rows[visit.n + s] = find[next.most(s, rows_)](next.row[s]);
    for (int s = 0; s < visit.n; s++) {
      for (uint32_t left = visit.mask[s]; left;) {
        int first = 0;
        while (!(left >> first & 1)) first++;
        const int planes = visit.level(s, first, rows_);
        uint32_t mask = 0;
        for (int r = first; r < rows_; r++) mask |= static_cast<uint32_t>(visit.level(s, r, rows_) == planes) << r;
        in_passes(left & mask, [&](const int* wanted, int n) {
          float products[kMaxRows];
          up_to(planes).dot(rows + s, 1, visit.n - s - 1 + ahead, wanted, n, products, 1);
          for (int i = 0; i < n; i++) second_[wanted[i]][s] = products[i] + up_.bias(visit.neuron[s]);
        });
        left &= ~mask;
      }
    }
  }

  // The visit's down rows are row r's list, without those whose z is 0 (ReLU): nothing to add, nothing to read. Several
  // rows of input that read the same planes share one list.
  void list(int r, const Visit& visit, const float* z) {
    group_ = static_cast<int>(visit.neuron[0] >> group_shift_);
    shared_ = rows_ > 1 && grouped_ && !visit.levels;
    uint32_t some = 0;
    for (int s = 0; s < visit.n; s++) some |= static_cast<uint32_t>(z[s] != 0.f) << s;
    for (int s = 0; s < visit.n && room_; s++)
      if (some & ~any_ & 1u << s) unpack_row(block_.down, visit.neuron[s], unpacked(s));
    any_ |= some;
    if (shared_ || (grouped_ && !visit.levels && some == ~0u >> (32 - visit.n))) {
      memcpy(z_[r], z, sizeof(float) * visit.n);
      listed_[r] = visit.n, rows_of_[r] = visit.down[0];
      return;
    }
    int n = 0;
    for (int s = 0; s < visit.n; s++) {
      if (!(some >> s & 1)) continue;
      z_[r][n] = z[s];
      if (grouped_) {
        const int level = visit.level(s, r, rows_), bits = down_plan_.format.bits;
        for (int i = 0; i < down_plan_.planes; i++) down_[r][i][n] = i < level ? visit.down[i][s] : zeros_.get();
        mean_[r][n] = static_cast<float>((1 << (bits - bits_of_planes(bits, level))) - 1) / 2;
      } else {
        down_[r][0][n] = room_ ? reinterpret_cast<const uint8_t*>(unpacked(s)) : down_row(visit.neuron[s]);
      }
      n++;
    }
    for (int i = n; i % 4 && grouped_; i++)
      for (int p = 0; p < down_plan_.planes; p++) down_[r][p][i] = down_[r][p][n - 1];
    listed_[r] = n, rows_of_[r] = down_[r][0];
  }

  // Where the visit's s-th down row of a table format is, as float32.
  float* unpacked(int s) const { return room_.get() + s * accumulator_stride(block_.down.d_out); }

  void count_down(const Visit& visit) {
    for (int s = 0; s < visit.n && visit.levels; s++)
      if (any_ >> s & 1) bytes_ += down_bytes_[visit.most(s, rows_)];
    if (!visit.levels) bytes_ += int64_t{down_bytes_[kMaxPlanes]} * __builtin_popcount(any_);
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
  void add_group(Upcoming next) {
    const auto down = kernels_.grouped->down[block_.down.grouped.bits - 2];
    for (int r = 0; r < rows_; r++) {
      const int n = listed_[r];
      if (!n) continue;
      int32_t quads[kVisit / 4];
      int total;
      const float factor = quantise_z(z_[r], n, quads, &total);
      const int8_t* const z = reinterpret_cast<const int8_t*>(quads);
      float rest = 0;
      for (int i = 0; i < n && zeros_; i++) rest += mean_[r][i] * static_cast<float>(z[i]);
      const GroupOfNeurons neurons{static_cast<const uint8_t*>(block_.down.scales),
                                   group_,
                                   (n + 3) / 4,
                                   total,
                                   rest,
                                   rows_of_[r],
                                   kVisit,
                                   quads,
                                   factor,
                                   next};
      down(down_plan_, neurons, 0, down_plan_.d, acc_ + r * accumulator_stride(block_.down.d_out));
      next.count = 0;  // the first row of input prefetches for all
    }
  }

  // The same for a list that several rows of input share: the codes are unpacked once. To the bit as one row's.
  void add_shared(const Upcoming& next) {
    const int n = listed_[0], quads = (n + 3) / 4;
    int32_t z[GRIFFIN_MAX_ROWS][kGroupQuads], total[GRIFFIN_MAX_ROWS];
    float factor[GRIFFIN_MAX_ROWS];
    if (!n) return;
    for (int r = 0; r < rows_; r++) factor[r] = quantise_z(z_[r], n, z[r], total + r);
    const ManyZ many{rows_, z[0], kGroupQuads, total, factor, 1, acc_, accumulator_stride(block_.down.d_out)};
    const GroupsOfNeurons groups{
        static_cast<const uint8_t*>(block_.down.scales), group_, 1, quads, rows_of_[0], kVisit, next};
    kernels_.grouped->down_many[block_.down.grouped.bits - 2](down_plan_, groups, 0, down_plan_.d, many);
  }

  const griffin_ff_block& block_;
  const Kernels& kernels_;
  const Rows up_, gate_;
  std::optional<Rows> up_first_[kMaxPlanes];  // [planes]
  const bool grouped_, compact_;
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
  float mean_[GRIFFIN_MAX_ROWS][kVisit];                       // of what is not read of a code
  const uint8_t* down_[GRIFFIN_MAX_ROWS][kMaxPlanes][kVisit];  // a list of its own
  const uint8_t* const* rows_of_[GRIFFIN_MAX_ROWS];            // that, or the visit's
  std::optional<RowFinder> find_down_;
  std::unique_ptr<uint8_t[]> zeros_;  // for the planes that are not read
};

}  // namespace griffin
