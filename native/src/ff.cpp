// The fused feedforward call. Each thread takes the experts of a fixed share of all neurons, so that a row's order of
// summation, and its result to the bit, depend on the thread count alone and not on the rows beside it. It takes a few
// experts at a time: gate and up products first, then their down rows together into an accumulator of its own of D
// floats a row of input, so that a visit of the accumulator serves several experts. After a barrier the threads add
// their accumulators up, each in its share of the columns.
#include <optional>

#include "checks.h"
#include "experts.h"
#include "ff_part.h"
#include "parallel.h"

namespace griffin {
namespace {

bool valid(const griffin_ff_block& block, const griffin_io& io) {
  return valid_io(io) && valid_block(block) && valid_experts(io) &&
         (!io.dynamic || valid_dynamic(block, *io.dynamic)) && (!io.compact || valid_compact(block, io));
}

struct Call {
  const griffin_ff_block* block;
  const griffin_io* io;
  Inputs inputs;
  float* accumulators;
  Dynamic* dynamic;  // or null
  Barrier barrier;
};

// The first of k ascending experts that are thread `thread`'s: shares are of all neurons, in whole groups of 32. (Of
// experts in another order every one is still somebody's.)
template <class At>
int64_t share_begin(const griffin_ff_block& block, int64_t k, const At& at, int thread, int threads) {
  int64_t begin = 0;
  for (int t = 1; t <= thread && t < threads; t++) {
    const int64_t first = int64_t{block.up.d_out} / 32 * t / threads * 32;
    int64_t low = begin, high = k;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (at(middle) < first)
        low = middle + 1;
      else
        high = middle;
    }
    begin = low;
  }
  return thread == threads ? k : begin;
}

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
  const Experts expert{io};
  const int32_t* const places = chosen ? chosen->places : nullptr;
  const uint16_t* const masks = chosen ? chosen->masks : io.row_mask;
  const uint32_t all = (1u << io.rows) - 1;
  const auto at = [&](int64_t i) { return expert[places ? places[i] : i]; };
  const int64_t begin = share_begin(block, k, at, thread, threads);
  const int64_t end = share_begin(block, k, at, thread + 1, threads);
  const auto mask = [&](int64_t i) { return masks ? masks[i] & all : all; };
  const int chunk = io.rows == 1 ? 4 : kExperts;  // measured: several inputs want large visits
  const uint8_t* const levels = chosen ? chosen->levels : nullptr;
  Part part(io.compact ? *io.compact : block, x, io.rows, levels, io.compact != nullptr, mine);
  Visit visits[2];
  part.visit(begin, end, chunk, at, mask, levels, visits[0]);
  int64_t i = begin;
  for (int v = 0; i < end; v ^= 1) {
    const Visit& visit = visits[v];
    Visit& next = visits[v ^ 1];
    part.visit(i + visit.n, end, chunk, at, mask, levels, next);
    if (chosen)
      part.enter(visit, next, chosen->gates, chosen->stride, places + i);
    else
      part.enter(visit, next);
    part.leave(next);
    i += visit.n;
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
