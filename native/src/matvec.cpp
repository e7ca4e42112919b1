// y = W x + b: each thread takes a contiguous share of W's rows, two at a time, so that both share the loads of x.
#include "checks.h"
#include "parallel.h"
#include "parts.h"

namespace griffin {
namespace {

constexpr int kRowsAhead = 2;  // rows of W to the one that is prefetched

void store(void* y, bool bf16, int64_t at, float value) {
  if (!bf16) {
    static_cast<float*>(y)[at] = value;
    return;
  }
  kernels().reduce(&value, 0, 1, nullptr, static_cast<uint16_t*>(y) + at, true, 1);
}

struct Call {
  const griffin_matrix* matrix;
  const griffin_io* io;
  Inputs inputs;
  Barrier barrier;
};

// Rows begin..end of one matrix.
void multiply(const Product& product, const Inputs& x, int rows, int64_t begin, int64_t end) {
  const Rows w(*product.matrix, x);
  int all[GRIFFIN_MAX_ROWS];
  for (int r = 0; r < rows; r++) all[r] = r;
  for (int64_t o = begin; o < end; o += 2) {
    const int m = end - o >= 2 ? 2 : 1;
    const int64_t ahead = o + kRowsAhead + 2 <= end ? o + kRowsAhead : o;
    const int64_t own[2] = {o, o + m - 1}, next[2] = {ahead, ahead + m - 1};
    for (int first = 0; first < rows; first += kMaxRows) {
      const int n = rows - first < kMaxRows ? rows - first : kMaxRows;
      float out[2 * kMaxRows];
      w.dot(own, m, all + first, n, out, next);
      for (int i = 0; i < m; i++)
        for (int r = 0; r < n; r++)
          store(static_cast<char*>(product.y) + (first + r) * product.y_stride, product.bf16, o + i,
                out[i * n + r] + w.bias(o + i));
    }
  }
}

}  // namespace

void multiply_part(const Product* products, int count, const Inputs& x, int rows, int thread, int threads) {
  // Shares begin at multiples of 32 rows, so that no two threads write to one cache line of y.
  int64_t blocks = 0;
  for (int i = 0; i < count; i++) blocks += round_up(products[i].matrix->d_out, 32) / 32;
  const int64_t begin = blocks * thread / threads * 32, end = blocks * (thread + 1) / threads * 32;
  int64_t at = 0;  // of this matrix's first row in all
  for (int i = 0; i < count; i++) {
    const int64_t d_out = products[i].matrix->d_out;
    const int64_t from = begin > at ? begin - at : 0, to = end - at < d_out ? end - at : d_out;
    if (from < to) multiply(products[i], x, rows, from, to);
    at += round_up(d_out, 32);
  }
}

}  // namespace griffin

using namespace griffin;

extern "C" int griffin_matvec(const griffin_matrix* matrix, const griffin_io* io, int threads) {
  if (!matrix || !io || threads < 1 || !valid_io(*io) || !valid_rows(*matrix)) return GRIFFIN_BAD_ARGUMENT;
  void* const memory = scratch(Inputs::bytes(matrix->d_in, io->rows));
  if (!memory) return GRIFFIN_NO_MEMORY;
  Call call{matrix, io, Inputs(*io, matrix->d_in, memory), {}};
  call.inputs.meet(*matrix);
  parallel(
      threads,
      [](void* data, int thread, int team) {
        Call& c = *static_cast<Call*>(data);
        c.inputs.prepare(thread, team);
        c.barrier.wait(team);
        const Product product{c.matrix, c.io->y, c.io->y_stride, c.io->y_type == GRIFFIN_BF16};
        multiply_part(&product, 1, c.inputs, c.io->rows, thread, team);
      },
      &call);
  count_call();
  return GRIFFIN_OK;
}
