// The fused feedforward call. Each thread takes a contiguous share of the experts (so the order of summation, and the
// result to the bit, depend on the thread count alone), a few experts at a time: gate and up products first, then their
// down rows together into an accumulator of its own of D floats a row of input, so that a visit of the accumulator
// serves several experts. After a barrier the threads add their accumulators up, each in its share of the columns.
#include <string.h>

#include <optional>

#include "activation.h"
#include "checks.h"
#include "experts.h"
#include "parallel.h"
#include "parts.h"

namespace griffin {
namespace {

constexpr int kExperts = 8;     // whose down rows are added together
constexpr int kColumns = 1024;  // of kExperts down rows: they stay in the first-level cache for all rows of input

// Off the 4096-byte multiples that share a cache set.
int64_t accumulator_stride(int d) { return round_up(d, kPad) + 16; }

class Part {
 public:
  Part(const griffin_ff_block& block, const Kernels& kernels, const Inputs& inputs, int rows, float* acc)
      : block_(block), kernels_(kernels), inputs_(inputs), rows_(rows), acc_(acc) {}

  // gate and up products of neuron j for the rows in `mask`; the down row joins the lists of the rows it matters to.
  void enter(int64_t j, int64_t next_j, uint32_t mask) {
    const bool gated = block_.gate != nullptr;
    const uint8_t* w[2] = {row(block_.up, block_.up_stride, j), nullptr};
    const uint8_t* next[2] = {row(block_.up, block_.up_stride, next_j), nullptr};
    if (gated) {
      w[1] = row(block_.gate, block_.gate_stride, j);
      next[1] = row(block_.gate, block_.gate_stride, next_j);
    }
    const float up_scale = scale(block_.up_scale, j);
    const float gate_scale = gated ? scale(block_.gate_scale, j) : 1.f;
    const float up_bias = block_.up_bias ? block_.up_bias[j] : 0.f;
    const float gate_bias = block_.gate_bias ? block_.gate_bias[j] : 0.f;
    bool listed = false;
    multiply(w, gated ? 2 : 1, next, mask, [&](const int* wanted, int n, const float* out) {
      for (int i = 0; i < n; i++) {
        const float up = out[i] * up_scale + up_bias;
        const float z = gated ? activate(block_.activation, out[n + i] * gate_scale + gate_bias) * up
                              : activate(block_.activation, up);
        listed |= list(wanted[i], j, z);
      }
    });
    rows_read_ += (gated ? 2 : 1) + listed;
  }

  // The same for m neurons (1 or 2) whose gates are known: row r's act(gate) of neuron j[i] is gates[i][r * stride].
  // Without a gate, that is act(up), and z itself.
  void enter(const int64_t* j, const int64_t* next_j, int m, uint32_t mask, const float* const* gates, int64_t stride) {
    const uint8_t *w[2], *next[2];
    bool listed[2] = {};
    if (!block_.gate) {
      for (int i = 0; i < m; i++) {
        for (int r = 0; r < rows_; r++)
          if (mask >> r & 1) listed[i] |= list(r, j[i], gates[i][r * stride]);
        rows_read_ += listed[i];
      }
      return;
    }
    for (int i = 0; i < m; i++) {
      w[i] = row(block_.up, block_.up_stride, j[i]);
      next[i] = row(block_.up, block_.up_stride, next_j[i]);
    }
    multiply(w, m, next, mask, [&](const int* wanted, int n, const float* out) {
      for (int i = 0; i < m; i++) {
        const float up_scale = scale(block_.up_scale, j[i]), bias = block_.up_bias ? block_.up_bias[j[i]] : 0.f;
        for (int at = 0; at < n; at++) {
          const int r = wanted[at];
          listed[i] |= list(r, j[i], gates[i][r * stride] * (out[i * n + at] * up_scale + bias));
        }
      }
    });
    rows_read_ += m + listed[0] + listed[1];
  }

  // Weight rows that were read.
  int64_t rows_read() const { return rows_read_; }

  // Adds the listed down rows and empties the lists. Meanwhile the down rows of the experts that come next, `ahead`,
  // are prefetched, as gate and up rows are in `enter`: in either phase the memory is kept at work on the other
  // neurons.
  void leave(const uint8_t* const* ahead, int n_ahead) {
    const int d = block_.d_model;
    for (int begin = 0; begin < d; begin += kColumns) {
      const int end = begin + kColumns < d ? begin + kColumns : d;
      int rest = n_ahead;  // the first row of input prefetches for all
      for (int r = 0; r < rows_; r++) {
        if (!listed_[r]) continue;
        kernels_.axpy[block_.format](acc_ + r * accumulator_stride(d), down_[r], z_[r], listed_[r], d, begin, end,
                                     ahead, rest);
        rest = 0;
      }
    }
    memset(listed_, 0, sizeof listed_);
  }

 private:
  static const uint8_t* row(const void* base, int64_t stride, int64_t j) {
    return static_cast<const uint8_t*>(base) + j * stride;
  }
  float scale(const float* base, int64_t j) const {
    return base ? *reinterpret_cast<const float*>(reinterpret_cast<const char*>(base) + j * block_.scale_stride) : 1.f;
  }

  // Products of m weight rows (1 or 2) with the inputs in `mask`, as many inputs at a time as `dot` takes. After each
  // pass use(rows, n, out): out[i * n + at] is the product of w[i] with row rows[at].
  template <class Use>
  void multiply(const uint8_t* const* w, int m, const uint8_t* const* next, uint32_t mask, const Use& use) {
    int wanted[GRIFFIN_MAX_ROWS], count = 0;
    for (int r = 0; r < rows_; r++)
      if (mask >> r & 1) wanted[count++] = r;
    for (int first = 0; first < count; first += kMaxRows) {
      const int n = count - first < kMaxRows ? count - first : kMaxRows;
      const Input* x[kMaxRows];
      float out[2 * kMaxRows];
      for (int i = 0; i < n; i++) x[i] = &inputs_[wanted[first + i]];
      inputs_.dot()(w, m, x, n, block_.d_model, out, next);
      use(wanted + first, n, out);
    }
  }

  // Neuron j's down row joins row r's list, unless z is 0 (ReLU): nothing to add, nothing to read.
  bool list(int r, int64_t j, float z) {
    if (z == 0.f) return false;
    z_[r][listed_[r]] = z * scale(block_.down_scale, j);
    down_[r][listed_[r]++] = row(block_.down, block_.down_stride, j);
    return true;
  }

  const griffin_ff_block& block_;
  const Kernels& kernels_;
  const Inputs& inputs_;
  const int rows_;
  float* const acc_;
  int64_t rows_read_ = 0;
  int listed_[GRIFFIN_MAX_ROWS] = {};
  float z_[GRIFFIN_MAX_ROWS][kExperts];
  const uint8_t* down_[GRIFFIN_MAX_ROWS][kExperts];
};

bool valid(const griffin_ff_block& block, const griffin_io& io) {
  return valid_io(io) && valid_block(block) && valid_experts(io) && (!io.dynamic || valid_dynamic(block, *io.dynamic));
}

struct Call {
  const griffin_ff_block* block;
  const griffin_io* io;
  Inputs inputs, gate_inputs;  // the second one for dynamic selection only
  float* accumulators;
  Dynamic* dynamic;  // or null
  Barrier barrier;
};

}  // namespace

int64_t ff_accumulator(int d_model, int rows) { return accumulator_stride(d_model) * rows; }

void ff_accumulate(const griffin_ff_block& block, const griffin_io& io, const Inputs& x, const Chosen* chosen,
                   float* accumulators, int thread, int threads) {
  const int64_t floats = ff_accumulator(block.d_model, io.rows);
  float* const mine = accumulators + thread * floats;
  memset(mine, 0, sizeof(float) * floats);
  const int64_t k = chosen ? chosen->count : io.experts ? io.n_experts : block.d_ff;
  const int64_t begin = k * thread / threads, end = k * (thread + 1) / threads;
  const Experts expert{io};
  // Measured: rows of several kilobytes are best taken in small groups, short ones and several inputs in large ones.
  const bool small = block.format != GRIFFIN_INT4 && io.rows == 1;
  const int chunk = small ? 4 : kExperts, distance = small ? 1 : 2;
  const uint32_t all = (1u << io.rows) - 1;
  Part part(block, kernels(), x, io.rows, mine);
  const auto leave = [&](int64_t last, const int32_t* places) {
    const uint8_t* ahead[kExperts];
    int n_ahead = 0;
    for (; n_ahead < chunk && last + n_ahead < end; n_ahead++)
      ahead[n_ahead] = static_cast<const uint8_t*>(block.down) +
                       expert[places ? places[last + n_ahead] : last + n_ahead] * block.down_stride;
    part.leave(ahead, n_ahead);
  };
  if (!chosen) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t j = expert[i];
      part.enter(j, i + distance < end ? expert[i + distance] : j, io.row_mask ? io.row_mask[i] & all : all);
      if ((i - begin) % chunk == chunk - 1 || i + 1 == end) leave(i + 1, nullptr);
    }
  } else {
    const int32_t* const places = chosen->places;
    const auto mask = [&](int64_t i) { return chosen->masks ? chosen->masks[i] & all : all; };
    for (int64_t i = begin; i < end;) {
      const int64_t last = i + chunk < end ? i + chunk : end;
      while (i < last) {  // two neurons at a time share the loads of x, if they are for the same rows
        const int m = i + 1 < last && mask(i) == mask(i + 1) ? 2 : 1;
        const int64_t p[2] = {places[i], places[i + m - 1]}, j[2] = {expert[p[0]], expert[p[1]]};
        const int64_t next[2] = {i + 2 < end ? expert[places[i + 2]] : j[0],
                                 i + 3 < end ? expert[places[i + 3]] : j[0]};
        const float* const gates[2] = {chosen->gates + p[0], chosen->gates + p[1]};
        part.enter(j, next, m, mask(i), gates, chosen->stride);
        i += m;
      }
      leave(last, places);
    }
  }
  count_ff_bytes(part.rows_read() * (griffin_row_bytes(block.format, block.d_model) + (block.up_scale ? 4 : 0)));
}

void ff_reduce(const griffin_ff_block& block, const griffin_io& io, const float* accumulators, int thread,
               int threads) {
  const int d = block.d_model;
  const int64_t stride = accumulator_stride(d), team_stride = ff_accumulator(d, io.rows);
  const bool bf16 = io.y_type == GRIFFIN_BF16;
  const int64_t blocks = round_up(d, 64) / 64;
  const int first = static_cast<int>(blocks * thread / threads * 64);
  const int64_t stop = blocks * (thread + 1) / threads * 64;
  const int count = static_cast<int>(stop < d ? stop : d) - first;
  if (count <= 0) return;
  for (int r = 0; r < io.rows; r++)
    kernels().reduce(accumulators + r * stride + first, team_stride, threads,
                     block.out_bias ? block.out_bias + first : nullptr,
                     static_cast<char*>(io.y) + r * io.y_stride + first * element_size(io.y_type), bf16, count);
}

}  // namespace griffin

using namespace griffin;

extern "C" int griffin_ff(const griffin_ff_block* block, const griffin_io* io, int threads) {
  if (!block || !io || threads < 1 || !valid(*block, *io)) return GRIFFIN_BAD_ARGUMENT;
  const int64_t inputs = Inputs::bytes(block->d_model, io->rows);
  const int64_t accumulators = 4 * threads * ff_accumulator(block->d_model, io->rows);
  const int64_t dynamic_bytes = io->dynamic ? inputs + 4 * Dynamic::floats(*block, *io, threads) : 0;
  char* const memory = static_cast<char*>(scratch(inputs + accumulators + dynamic_bytes));
  if (!memory) return GRIFFIN_NO_MEMORY;
  char* const dynamic_memory = memory + inputs + accumulators;
  std::optional<Dynamic> dynamic;
  if (io->dynamic) dynamic.emplace(*block, *io, reinterpret_cast<float*>(dynamic_memory + inputs));
  Call call{block,
            io,
            Inputs(*io, block->format, block->d_model, memory),
            Inputs(*io, dynamic ? dynamic->format() : block->format, block->d_model, dynamic ? dynamic_memory : memory),
            reinterpret_cast<float*>(memory + inputs),
            dynamic ? &*dynamic : nullptr,
            {}};
  parallel(
      threads,
      [](void* data, int thread, int team) {
        Call& c = *static_cast<Call*>(data);
        Chosen chosen;
        c.inputs.prepare(thread, team);
        if (c.dynamic) c.gate_inputs.prepare(thread, team);
        c.barrier.wait(team);
        if (c.dynamic) {
          c.dynamic->gate(c.gate_inputs, thread, team);
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
