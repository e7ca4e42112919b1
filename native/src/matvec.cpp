// y = W x + b: each thread takes a contiguous share of W's rows, two at a time, so that both share the loads of x.
#include "inputs.h"
#include "parallel.h"

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
  const griffin_rows* rows;
  void* workspace;
  griffin_barrier barrier;
};

bool valid(const griffin_matrix& matrix, const griffin_rows& rows) {
  const bool types = (rows.x_type == GRIFFIN_F32 || rows.x_type == GRIFFIN_BF16) &&
                     (rows.y_type == GRIFFIN_F32 || rows.y_type == GRIFFIN_BF16);
  if (!rows.x || !rows.y || !types || rows.rows < 1 || rows.rows > GRIFFIN_MAX_ROWS) return false;
  return matrix.weight && matrix.d_in >= 1 && matrix.d_out >= 1 && matrix.format >= GRIFFIN_F32 &&
         matrix.format <= GRIFFIN_INT4 && (matrix.format != GRIFFIN_INT8 || matrix.scale);
}

}  // namespace
}  // namespace griffin

using namespace griffin;

extern "C" {

int64_t griffin_matvec_workspace(const griffin_matrix* matrix, int rows) { return Inputs::bytes(matrix->d_in, rows); }

void griffin_matvec_part(const griffin_matrix* matrix, const griffin_rows* rows, void* workspace,
                         griffin_barrier* barrier, int thread, int threads) {
  Inputs inputs(kernels(), *rows, matrix->format, matrix->d_in, workspace);
  inputs.prepare(thread, threads);
  griffin_barrier_wait(barrier, threads);
  inputs.open();

  // Shares begin at multiples of 32 rows, so that no two threads write to one cache line of y.
  const int64_t blocks = round_up(matrix->d_out, 32) / 32;
  const int64_t begin = blocks * thread / threads * 32;
  int64_t end = blocks * (thread + 1) / threads * 32;
  if (end > matrix->d_out) end = matrix->d_out;
  const uint8_t* const base = static_cast<const uint8_t*>(matrix->weight);
  const bool bf16 = rows->y_type == GRIFFIN_BF16;
  for (int64_t o = begin; o < end; o += 2) {
    const int m = end - o >= 2 ? 2 : 1;
    const int64_t ahead = o + kRowsAhead + 2 <= end ? o + kRowsAhead : o;
    const uint8_t* const w[2] = {base + o * matrix->stride, base + (o + m - 1) * matrix->stride};
    const uint8_t* const next[2] = {base + ahead * matrix->stride, base + (ahead + m - 1) * matrix->stride};
    for (int first = 0; first < rows->rows; first += kMaxRows) {
      const int n = rows->rows - first < kMaxRows ? rows->rows - first : kMaxRows;
      const Input* x[kMaxRows];
      float out[2 * kMaxRows];
      for (int r = 0; r < n; r++) x[r] = &inputs[first + r];
      inputs.dot()(w, m, x, n, matrix->d_in, out, next);
      for (int i = 0; i < m; i++) {
        const float scale = matrix->scale ? matrix->scale[o + i] : 1.f;
        const float bias = matrix->bias ? matrix->bias[o + i] : 0.f;
        for (int r = 0; r < n; r++)
          store(static_cast<char*>(rows->y) + (first + r) * rows->y_stride, bf16, o + i, out[i * n + r] * scale + bias);
      }
    }
  }
  griffin_barrier_wait(barrier, threads);
}

int griffin_matvec(const griffin_matrix* matrix, const griffin_rows* rows, int threads) {
  if (!matrix || !rows || threads < 1 || !valid(*matrix, *rows)) return GRIFFIN_BAD_ARGUMENT;
  Call call{matrix, rows, scratch(griffin_matvec_workspace(matrix, rows->rows)), {}};
  if (!call.workspace) return GRIFFIN_NO_MEMORY;
  parallel(
      threads,
      [](void* data, int thread, int team) {
        Call& c = *static_cast<Call*>(data);
        griffin_matvec_part(c.matrix, c.rows, c.workspace, &c.barrier, thread, team);
      },
      &call);
  count_call();
  return GRIFFIN_OK;
}

}  // extern "C"
