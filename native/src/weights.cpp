// Unions of expert sets, copies of their rows, advice on pages, and the read bandwidth.
#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <string.h>

#include <atomic>
#include <chrono>
#include <vector>

#include "checks.h"
#include "griffin_native.h"
#include "half.h"
#include "parallel.h"
#include "kernels.h"

using namespace griffin;

namespace {

template <class Index>
int64_t make_union(const Index* experts, int rows, int64_t k, int64_t d_ff, int32_t* union_out, uint16_t* mask_out) {
  std::vector<uint16_t> wanted(static_cast<size_t>(d_ff));
  for (int r = 0; r < rows; r++)
    for (int64_t i = 0; i < k; i++) {
      const int64_t j = experts[r * k + i];
      if (j < 0 || j >= d_ff) return -GRIFFIN_BAD_EXPERT;
      wanted[static_cast<size_t>(j)] |= static_cast<uint16_t>(1u << r);
    }
  int64_t count = 0;
  for (int64_t j = 0; j < d_ff; j++)
    if (wanted[static_cast<size_t>(j)]) {
      union_out[count] = static_cast<int32_t>(j);
      mask_out[count++] = wanted[static_cast<size_t>(j)];
    }
  return count;
}

struct Copy {
  const griffin_matrix* matrix;
  const void* rows;
  int index_bytes;
  int64_t n;
  void* to;

  int64_t row(int64_t i) const {
    return index_bytes == 4 ? static_cast<const int32_t*>(rows)[i] : static_cast<const int64_t*>(rows)[i];
  }

  // Whole blocks of the copy for each thread.
  template <class Plan>
  void run(const Plan& plan, int thread, int threads) const {
    const int64_t blocks = (n + kBlock - 1) / kBlock, end = blocks * (thread + 1) / threads * kBlock;
    RowFinder from = plan.finder(matrix->weight), from_ahead = from, place = plan.finder(to);
    for (int64_t i = blocks * thread / threads * kBlock; i < n && i < end; i++) {
      const RowAt source = from(row(i)), target = place(i), ahead = from_ahead(row(i + 8 < n ? i + 8 : i));
      for (int p = 0; p < plan.planes; p++)
        for (int64_t at = 0; at < plan.part[p + 1] - plan.part[p]; at += 64)
          __builtin_prefetch(ahead.part[p] + at, 0, 2);
      for (int p = 0; p < plan.planes; p++)
        memcpy(const_cast<uint8_t*>(target.part[p]), source.part[p],
               static_cast<size_t>(plan.part[p + 1] - plan.part[p]));
    }
  }
};

}  // namespace

extern "C" {

int64_t griffin_union(const void* experts, int index_bytes, int rows, int64_t k, int64_t d_ff, int32_t* union_out,
                      uint16_t* mask_out) {
  if (!experts || !union_out || !mask_out || rows < 1 || rows > GRIFFIN_MAX_ROWS || k < 0 || d_ff < 1)
    return -GRIFFIN_BAD_ARGUMENT;
  if (index_bytes == 4) return make_union(static_cast<const int32_t*>(experts), rows, k, d_ff, union_out, mask_out);
  if (index_bytes == 8) return make_union(static_cast<const int64_t*>(experts), rows, k, d_ff, union_out, mask_out);
  return -GRIFFIN_BAD_ARGUMENT;
}

int griffin_copy_rows(const griffin_matrix* matrix, const void* rows, int index_bytes, int64_t n, void* to,
                      int threads) {
  if (!matrix || !rows || !to || n < 0 || threads < 1 || (index_bytes != 4 && index_bytes != 8) ||
      !valid_matrix(*matrix) || matrix->format != GRIFFIN_GROUPED)
    return GRIFFIN_BAD_ARGUMENT;
  const int64_t count = matrix->neuron_major ? matrix->d_in : matrix->d_out;
  Copy copy{matrix, rows, index_bytes, n, to};
  for (int64_t i = 0; i < n; i++)
    if (copy.row(i) < 0 || copy.row(i) >= count) return GRIFFIN_BAD_EXPERT;
  parallel(
      threads,
      [](void* data, int thread, int team) {
        const Copy& c = *static_cast<const Copy*>(data);
        if (c.matrix->neuron_major)
          c.run(neuron_plan(c.matrix->grouped, c.matrix->d_out, c.matrix->d_in), thread, team);
        else
          c.run(row_plan(c.matrix->grouped, c.matrix->d_in), thread, team);
      },
      &copy);
  return GRIFFIN_OK;
}

int griffin_advise_huge(void* address, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(address) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(bytes)) / page * page;
  if (end <= begin) return 0;
  return madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address;
  (void)bytes;
  return -1;
#endif
}

double griffin_read_bandwidth(const void* buffer, int64_t bytes, int threads) {
  struct Read {
    const float* data;
    int64_t count;
    std::atomic<float> total;
  } read{static_cast<const float*>(buffer), bytes / 4, {0.f}};
  if (!buffer || bytes < 4 || threads < 1) return 0;
  const auto start = std::chrono::steady_clock::now();
  parallel(
      threads,
      [](void* data, int thread, int team) {
        Read& r = *static_cast<Read*>(data);
        const int64_t begin = r.count * thread / team, end = r.count * (thread + 1) / team;
        r.total.store(kernels().sum(r.data + begin, end - begin), std::memory_order_relaxed);
      },
      &read);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return static_cast<double>(read.count * 4) / seconds.count();
}

}  // extern "C"
