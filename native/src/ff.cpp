// The fused feedforward call. Each thread takes a contiguous share of the experts (so the order of summation, and the
// result to the bit, depend on the thread count alone), a few experts at a time: gate and up products first, then their
// down rows together into an accumulator of its own of D floats a row of input, so that a visit of the accumulator
// serves several experts. After a barrier the threads add their accumulators up, each in its share of the columns.
#include <math.h>
#include <string.h>

#include <memory>
#include <optional>

#include "activation.h"
#include "checks.h"
#include "experts.h"
#include "parallel.h"
#include "parts.h"
#include "unpack.h"

namespace griffin {
namespace {

constexpr int kExperts = 8;     // whose float down rows are added together
constexpr int kColumns = 1024;  // of kExperts down rows: they stay in the first-level cache for all rows of input
constexpr int kListed = 32;     // experts of a visit: kExperts, or those of a group of neurons

// Off the 4096-byte multiples that share a cache set.
int64_t accumulator_stride(int d) { return round_up(d, kPad) + 16; }

class Part {
 public:
  Part(const griffin_ff_block& block, const Inputs& inputs, int rows, float* acc)
      : block_(block), kernels_(kernels()), up_(block.up, inputs), gate_(gated() ? block.gate : block.up, inputs),
        grouped_(in_integers(block.down)), down_bytes_(row_bytes(block.down)), rows_(rows), acc_(acc) {
    if (block.down.format != GRIFFIN_GROUPED) return;
    if (block.down.table) room_.reset(new float[kExperts * accumulator_stride(block.down.d_out)]);
    const griffin_grouped& f = block.down.grouped;
    down_plan_ = neuron_plan(f, block.down.d_out, block.down.d_in);
    group_bytes_ = has_supers(f) ? down_plan_.sub_stride + down_plan_.super_stride * f.group / kSuper
                                 : down_plan_.super_stride * f.group / f.span;
  }

  // How many of the experts from `i` on (their neurons: at(i), at(i + 1), ...) are visited together.
  template <class At> int64_t visit(int64_t i, int64_t end, int chunk, const At& at) const {
    int64_t last = i + 1;
    if (!grouped_) {
      last = i + chunk;
    } else {
      const int group = block_.down.grouped.group;
      const int64_t own = at(i) / group;
      while (last < end && last < i + kListed && at(last) / group == own) last++;
    }
    return last < end ? last : end;
  }

  // gate and up products of neuron j for the rows in `mask`; the down row joins the lists of the rows it matters to.
  void enter(int64_t j, int64_t next_j, uint32_t mask) {
    bool listed = false;
    in_passes(mask, [&](const int* rows, int n) {
      float out[2 * kMaxRows];
      if (gated())
        Rows::dot_both(up_, gate_, j, rows, n, out, next_j);
      else
        up_.dot(&j, 1, rows, n, out, &next_j);
      for (int i = 0; i < n; i++) {
        const float up = out[i] + up_.bias(j);
        const float z = gated() ? activate(block_.activation, out[n + i] + gate_.bias(j)) * up
                                : activate(block_.activation, up);
        listed |= list(rows[i], j, z);
      }
    });
    bytes_ += up_.row_bytes() + (gated() ? gate_.row_bytes() : 0) + listed * down_bytes_;
  }

  // The same for m neurons (1 or 2) whose gates are known: row r's act(gate) of neuron j[i] is gates[i][r * stride].
  // Without a gate, that is act(up), and z itself.
  void enter(const int64_t* j, const int64_t* next_j, int m, uint32_t mask, const float* const* gates, int64_t stride) {
    bool listed[2] = {};
    if (!gated()) {
      for (int i = 0; i < m; i++)
        for (int r = 0; r < rows_; r++)
          if (mask >> r & 1) listed[i] |= list(r, j[i], gates[i][r * stride]);
    } else {
      in_passes(mask, [&](const int* rows, int n) {
        float out[2 * kMaxRows];
        up_.dot(j, m, rows, n, out, next_j);
        for (int i = 0; i < m; i++)
          for (int at = 0; at < n; at++)
            listed[i] |= list(rows[at], j[i], gates[i][rows[at] * stride] * (out[i * n + at] + up_.bias(j[i])));
      });
      bytes_ += m * up_.row_bytes();
    }
    bytes_ += (listed[0] + listed[1]) * down_bytes_;
  }

  // Bytes of weights and scales that were read.
  int64_t bytes() const { return bytes_; }

  const uint8_t* down_row(int64_t j) const {
    return static_cast<const uint8_t*>(block_.down.weight) + j * block_.down.stride;
  }

  // Adds the listed down rows and empties the lists. Meanwhile the down rows of the experts that come next, `ahead`,
  // are prefetched, as gate and up rows are in `enter`: in either phase the memory is kept at work on the other
  // neurons.
  void leave(const uint8_t* const* ahead, int n_ahead) {
    if (grouped_)
      add_group(ahead, n_ahead);
    else
      add_rows(ahead, n_ahead);
    memset(listed_, 0, sizeof listed_);
    n_unpacked_ = 0;
  }

 private:
  bool gated() const { return block_.gate.weight != nullptr; }

  // use(rows, n): the rows of input in `mask`, as many at a time as a product takes.
  template <class Use> void in_passes(uint32_t mask, const Use& use) const {
    int wanted[GRIFFIN_MAX_ROWS], count = 0;
    for (int r = 0; r < rows_; r++)
      if (mask >> r & 1) wanted[count++] = r;
    for (int first = 0; first < count; first += kMaxRows)
      use(wanted + first, count - first < kMaxRows ? count - first : kMaxRows);
  }

  // Neuron j's down row joins row r's list, unless z is 0 (ReLU): nothing to add, nothing to read.
  bool list(int r, int64_t j, float z) {
    if (z == 0.f) return false;
    group_ = j;
    z_[r][listed_[r]] = z;
    down_[r][listed_[r]++] = room_ ? unpacked(j) : down_row(j);
    return true;
  }

  // Neuron j's down row of a table format as float32, until the end of the visit.
  const uint8_t* unpacked(int64_t j) {
    const auto at = [&](int i) { return room_.get() + i * accumulator_stride(block_.down.d_out); };
    for (int i = 0; i < n_unpacked_; i++)
      if (unpacked_[i] == j) return reinterpret_cast<const uint8_t*>(at(i));
    float* const to = at(n_unpacked_);
    unpack_row(block_.down, j, to);
    unpacked_[n_unpacked_++] = j;
    const int64_t group = j / block_.down.grouped.group;
    if (group != scales_of_) bytes_ += group_bytes_, scales_of_ = group;
    return reinterpret_cast<const uint8_t*>(to);
  }

  void add_rows(const uint8_t* const* ahead, int n_ahead) {
    const int d = block_.down.d_out;
    for (int begin = 0; begin < d; begin += kColumns) {
      const int end = begin + kColumns < d ? begin + kColumns : d;
      int rest = room_ ? 0 : n_ahead;  // the first row of input prefetches for all
      for (int r = 0; r < rows_; r++) {
        if (!listed_[r]) continue;
        kernels_.axpy[room_ ? GRIFFIN_F32 : block_.down.format](acc_ + r * accumulator_stride(d), down_[r], z_[r], listed_[r], d, begin, end,
                                          ahead, rest);
        rest = 0;
      }
    }
  }

  // The listed neurons are of one group: z is quantised too, its products with the codes are summed in integers and
  // scaled once.
  void add_group(const uint8_t* const* ahead, int n_ahead) {
    const griffin_grouped& f = block_.down.grouped;
    const auto down = kernels_.grouped->down[f.bits - 2];
    bool any = false;
    for (int r = 0; r < rows_; r++) {
      const int n = listed_[r];
      if (!n) continue;
      int32_t quads[kListed / 2];
      int total;
      const float factor = quantise_z(z_[r], n, quads, &total);
      for (int i = n; i % 4; i++) down_[r][i] = down_[r][n - 1];
      const GroupOfNeurons neurons{static_cast<const uint8_t*>(block_.down.scales),
                                   static_cast<int>(group_ / f.group),
                                   (n + 3) / 4,
                                   down_[r],
                                   quads,
                                   factor,
                                   factor * static_cast<float>(total),
                                   ahead,
                                   any ? 0 : n_ahead};
      down(down_plan_, neurons, 0, down_plan_.d, acc_ + r * accumulator_stride(block_.down.d_out));
      any = true;
    }
    bytes_ += any * group_bytes_;
  }

  const griffin_ff_block& block_;
  const Kernels& kernels_;
  const Rows up_, gate_;
  const bool grouped_;
  NeuronPlan down_plan_ = {};
  const int64_t down_bytes_;
  const int rows_;
  float* const acc_;
  int64_t bytes_ = 0, group_bytes_ = 0, group_ = 0;  // group_: a neuron of the listed group
  std::unique_ptr<float[]> room_;  // of a table format: the down rows of a visit
  int64_t unpacked_[kExperts], scales_of_ = -1;
  int n_unpacked_ = 0;
  int listed_[GRIFFIN_MAX_ROWS] = {};
  float z_[GRIFFIN_MAX_ROWS][kListed];
  const uint8_t* down_[GRIFFIN_MAX_ROWS][kListed];
};

bool valid(const griffin_ff_block& block, const griffin_io& io) {
  return valid_io(io) && valid_block(block) && valid_experts(io) && (!io.dynamic || valid_dynamic(block, *io.dynamic));
}

struct Call {
  const griffin_ff_block* block;
  const griffin_io* io;
  Inputs inputs;
  float* accumulators;
  Dynamic* dynamic;  // or null
  Barrier barrier;
};

}  // namespace

void ff_meet(const griffin_ff_block& block, const griffin_io& io, Inputs& inputs) {
  inputs.meet(block.up);
  if (block.gate.weight) inputs.meet(block.gate);
  if (io.dynamic && io.dynamic->gate.weight) inputs.meet(io.dynamic->gate);
}

int64_t ff_accumulator(int d_model, int rows) { return accumulator_stride(d_model) * rows; }

void ff_accumulate(const griffin_ff_block& block, const griffin_io& io, const Inputs& x, const Chosen* chosen,
                   float* accumulators, int thread, int threads) {
  const int d = block.down.d_out;
  const int64_t floats = ff_accumulator(d, io.rows);
  float* const mine = accumulators + thread * floats;
  memset(mine, 0, sizeof(float) * floats);
  const int64_t k = chosen ? chosen->count : io.experts ? io.n_experts : block.up.d_out;
  const int64_t begin = k * thread / threads, end = k * (thread + 1) / threads;
  const Experts expert{io};
  const int32_t* const places = chosen ? chosen->places : nullptr;
  const auto at = [&](int64_t i) { return expert[places ? places[i] : i]; };
  // Measured: rows of several kilobytes are best taken in small groups, several inputs in large ones.
  const int chunk = io.rows == 1 ? 4 : kExperts, distance = io.rows == 1 ? 1 : 2;
  const uint32_t all = (1u << io.rows) - 1;
  Part part(block, x, io.rows, mine);
  for (int64_t i = begin; i < end;) {
    const int64_t last = part.visit(i, end, chunk, at);
    if (!chosen) {
      for (; i < last; i++) {
        const int64_t j = at(i);
        part.enter(j, i + distance < end ? at(i + distance) : j, io.row_mask ? io.row_mask[i] & all : all);
      }
    } else {
      const auto mask = [&](int64_t place) { return chosen->masks ? chosen->masks[place] & all : all; };
      while (i < last) {  // two neurons at a time share the loads of x, if they are for the same rows
        const int m = i + 1 < last && mask(i) == mask(i + 1) ? 2 : 1;
        const int64_t p[2] = {places[i], places[i + m - 1]}, j[2] = {expert[p[0]], expert[p[1]]};
        const int64_t next[2] = {i + 2 < end ? at(i + 2) : j[0], i + 3 < end ? at(i + 3) : j[0]};
        const float* const gates[2] = {chosen->gates + p[0], chosen->gates + p[1]};
        part.enter(j, next, m, mask(i), gates, chosen->stride);
        i += m;
      }
    }
    const uint8_t* ahead[kListed];
    int n_ahead = 0;
    if (last < end)
      for (const int64_t stop = part.visit(last, end, chunk, at); last + n_ahead < stop; n_ahead++)
        ahead[n_ahead] = part.down_row(at(last + n_ahead));
    part.leave(ahead, n_ahead);
  }
  count_ff_bytes(part.bytes());
}

void ff_reduce(const griffin_ff_block& block, const griffin_io& io, const float* accumulators, int thread,
               int threads) {
  const int d = block.down.d_out;
  const int64_t stride = accumulator_stride(d), team_stride = ff_accumulator(d, io.rows);
  const bool bf16 = io.y_type == GRIFFIN_BF16;
  const int64_t blocks = round_up(d, 64) / 64;
  const int first = static_cast<int>(blocks * thread / threads * 64);
  const int64_t stop = blocks * (thread + 1) / threads * 64;
  const int count = static_cast<int>(stop < d ? stop : d) - first;
  if (count <= 0) return;
  for (int r = 0; r < io.rows; r++)
    kernels().reduce(accumulators + r * stride + first, team_stride, threads,
                     block.down.bias ? block.down.bias + first : nullptr,
                     static_cast<char*>(io.y) + r * io.y_stride + first * element_size(io.y_type), bf16, count);
}

}  // namespace griffin

using namespace griffin;

extern "C" int griffin_ff(const griffin_ff_block* block, const griffin_io* io, int threads) {
  if (!block || !io || threads < 1 || !valid(*block, *io)) return GRIFFIN_BAD_ARGUMENT;
  const int64_t inputs = Inputs::bytes(block->up.d_in, io->rows);
  const int64_t accumulators = 4 * threads * ff_accumulator(block->up.d_in, io->rows);
  const int64_t dynamic_bytes = io->dynamic ? 4 * Dynamic::floats(*block, *io, threads) : 0;
  char* const memory = static_cast<char*>(scratch(inputs + accumulators + dynamic_bytes));
  if (!memory) return GRIFFIN_NO_MEMORY;
  std::optional<Dynamic> dynamic;
  if (io->dynamic) dynamic.emplace(*block, *io, reinterpret_cast<float*>(memory + inputs + accumulators));
  Call call{block,
            io,
            Inputs(*io, block->up.d_in, memory),
            reinterpret_cast<float*>(memory + inputs),
            dynamic ? &*dynamic : nullptr,
            {}};
  ff_meet(*block, *io, call.inputs);
  parallel(
      threads,
      [](void* data, int thread, int team) {
        Call& c = *static_cast<Call*>(data);
        Chosen chosen;
        c.inputs.prepare(thread, team);
        c.barrier.wait(team);
        if (c.dynamic) {
          c.dynamic->gate(c.inputs, thread, team);
          c.barrier.wait(team);
          chosen = c.dynamic->choose(thread);
        }
        ff_accumulate(*c.block, *c.io, c.inputs, c.dynamic ? &chosen : nullptr, c.accumulators, thread, team);
        c.barrier.wait(team);
        ff_reduce(*c.block, *c.io, c.accumulators, thread, team);
      },
      &call);
  count_call();
  return GRIFFIN_OK;
}
