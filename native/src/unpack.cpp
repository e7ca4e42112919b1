// Weights as bf16 or float32: for lookups, and for the GEMMs of the prompt phase. Each thread takes a share of the rows.
#include "unpack.h"

#include <math.h>
#include <string.h>

#include <vector>

#include "checks.h"
#include "griffin_gguf.h"
#include "parallel.h"

namespace griffin {
namespace {

UnpackFn chosen() {
#if defined(GRIFFIN_X86)
  const char* const isa = griffin_isa();
  if (!strncmp(isa, "avx512", 6)) return unpack_avx512;
  if (!strncmp(isa, "avx2", 4)) return unpack_avx2;
#endif
  return unpack_portable;
}

}  // namespace

void unpack_row(const griffin_matrix& matrix, int64_t row, float* out) {
  unpack_row(matrix, row, 0, matrix.neuron_major ? matrix.d_out : matrix.d_in, out);
}

void unpack_row(const griffin_matrix& matrix, int64_t row, int64_t begin, int64_t end, float* out) {
  chosen()({&matrix, nullptr, row, begin, end, out, end - begin, false}, 0, 1);
}

}  // namespace griffin

using namespace griffin;

extern "C" int griffin_unpack(const griffin_matrix* matrix, const int64_t* rows, int64_t first, int64_t n,
                              int64_t begin, int64_t end, void* out, int out_type, int64_t out_stride, int threads) {
  if (!matrix || !valid_matrix(*matrix) || !out || n < 0 || threads < 1 ||
      (out_type != GRIFFIN_F32 && out_type != GRIFFIN_BF16))
    return GRIFFIN_BAD_ARGUMENT;
  const int64_t columns = matrix->neuron_major ? matrix->d_out : matrix->d_in;
  const int64_t count = matrix->neuron_major ? matrix->d_in : matrix->d_out;
  if (begin < 0 || begin > end || end > columns || begin % 256 || (!matrix->neuron_major && (begin || end < columns)))
    return GRIFFIN_BAD_ARGUMENT;
  for (int64_t i = 0; i < n; i++) {
    const int64_t row = rows ? rows[i] : first + i;
    if (row < 0 || row >= count) return GRIFFIN_BAD_ARGUMENT;
    if (!rows) i = i < n - 2 ? n - 2 : i;  // the first and the last say it for all
  }
  struct Call {
    Unpack part;
    int64_t n;
    UnpackFn function;
  } call{{matrix, rows, first, begin, end, out, out_stride, out_type == GRIFFIN_BF16}, n, chosen()};
  parallel(
      threads,
      [](void* data, int thread, int team) {
        const Call& c = *static_cast<Call*>(data);
        c.function(c.part, c.n * thread / team, c.n * (thread + 1) / team);
      },
      &call);
  return GRIFFIN_OK;
}

extern "C" int griffin_row_norms(const griffin_matrix* matrix, float* out, int threads) {
  if (!matrix || !valid_matrix(*matrix) || !out || threads < 1) return GRIFFIN_BAD_ARGUMENT;
  struct Call {
    const griffin_matrix* matrix;
    float* out;
    UnpackFn function;
  } call{matrix, out, chosen()};
  parallel(
      threads,
      [](void* data, int thread, int team) {
        const Call& c = *static_cast<Call*>(data);
        const bool major = c.matrix->neuron_major;
        const int64_t columns = major ? c.matrix->d_out : c.matrix->d_in,
                      rows = major ? c.matrix->d_in : c.matrix->d_out;
        std::vector<float> row(static_cast<size_t>(columns));
        for (int64_t i = rows * thread / team; i < rows * (thread + 1) / team; i++) {
          c.function({c.matrix, nullptr, i, 0, columns, row.data(), columns, false}, 0, 1);
          double sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t k = 0; k < columns; k++) sum += double{row[k]} * row[k];
          c.out[i] = static_cast<float>(sqrt(sum));
        }
      },
      &call);
  return GRIFFIN_OK;
}
