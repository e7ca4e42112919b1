// Weight data: quantising and its inverse, unions of expert sets, advice on pages, and the read bandwidth.
#include <math.h>
#include <string.h>
#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <atomic>
#include <chrono>
#include <vector>

#include "griffin_native.h"
#include "half.h"
#include "parallel.h"
#include "kernels.h"

using namespace griffin;

namespace {

// Weight i of an int4 row is in the low or the high nibble of one byte (griffin_native.h has the layout).
struct Nibble {
  int64_t byte;
  int shift;
};
Nibble nibble(int64_t i, int64_t p) {
  const int64_t block = i & ~int64_t{127}, half = p - block >= 128 ? 64 : 32, at = i - block;
  return {block / 2 + at % half, at >= half ? 4 : 0};
}

float* scale_at(float* base, int64_t i, int64_t stride) {
  return reinterpret_cast<float*>(reinterpret_cast<char*>(base) + i * stride);
}

// The 4-bit levels of n weights for a scale, and the scale that fits these levels best; returns the squares that this
// leaves less than all weights zero would.
struct Fit {
  float scale = 0, gain = -1;
  int8_t level[kGroup] = {};
};
Fit fit(const float* w, int64_t n, float inverse) {
  Fit found;
  float across = 0, squares = 0;
  for (int64_t i = 0; i < n; i++) {
    const long level = lrintf(w[i] * inverse);
    found.level[i] = static_cast<int8_t>(level < -8 ? -8 : level > 7 ? 7 : level);
    across += found.level[i] * w[i];
    squares += static_cast<float>(found.level[i] * found.level[i]);
  }
  if (squares > 0) found.scale = across / squares, found.gain = across * across / squares;
  return found;
}

// The 16 levels cover the side of the largest weight with -8. A somewhat smaller or larger grid often fits the others
// better: the best of some is taken, by least squares.
void pack_int4(const float* source, int64_t d, uint8_t* row) {
  const int64_t p = round_up(d, 64);
  memset(row, 0x88, static_cast<size_t>(p / 2));
  for (int64_t g = 0; g < p / kGroup; g++) {
    float top = 0;
    const int64_t begin = g * kGroup, n = (begin + kGroup < d ? begin + kGroup : d) - begin;
    for (int64_t i = 0; i < n; i++)
      if (fabsf(source[begin + i]) > fabsf(top)) top = source[begin + i];
    Fit best;
    if (fabsf(top) > 1e-30f)
      for (const float reach : {-7.1f, -7.4f, -7.7f, -8.f, -8.3f, -8.6f, -8.9f}) {
        const Fit found = fit(source + begin, n, reach / top);
        if (found.gain > best.gain) best = found;
      }
    const uint16_t half = float_to_half(best.scale);
    memcpy(row + p / 2 + g * 2, &half, 2);
    for (int64_t i = 0; i < n; i++) {
      const Nibble at = nibble(begin + i, p);
      row[at.byte] = static_cast<uint8_t>((row[at.byte] & ~(15 << at.shift)) | ((best.level[i] + 8) << at.shift));
    }
  }
}

void pack_int8(const float* source, int64_t d, int8_t* row, float* scale) {
  float top = 0;
  for (int64_t i = 0; i < d; i++) top = fmaxf(top, fabsf(source[i]));
  *scale = top / 127.f;
  const float inverse = top > 1e-30f ? 127.f / top : 0.f;
  for (int64_t i = 0; i < d; i++) row[i] = static_cast<int8_t>(rintf(source[i] * inverse));
}

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

int64_t griffin_row_bytes(int format, int64_t d) {
  const int64_t p = round_up(d, 64);
  switch (format) {
    case GRIFFIN_F32: return 4 * d;
    case GRIFFIN_BF16:
    case GRIFFIN_F16: return 2 * d;
    case GRIFFIN_INT8: return d;
    case GRIFFIN_INT4: return p / 2 + p / kGroup * 2;
    default: return -GRIFFIN_BAD_ARGUMENT;
  }
}

int griffin_pack(int format, const float* source, int64_t n, int64_t d, int64_t source_stride, void* rows_out,
                 int64_t stride, float* scale, int64_t scale_stride) {
  if (!source || !rows_out || d < 1 || (format != GRIFFIN_INT8 && format != GRIFFIN_INT4)) return GRIFFIN_BAD_ARGUMENT;
  if (format == GRIFFIN_INT8 && !scale) return GRIFFIN_BAD_ARGUMENT;
  for (int64_t i = 0; i < n; i++) {
    uint8_t* row = static_cast<uint8_t*>(rows_out) + i * stride;
    if (format == GRIFFIN_INT4)
      pack_int4(source + i * source_stride, d, row);
    else
      pack_int8(source + i * source_stride, d, reinterpret_cast<int8_t*>(row), scale_at(scale, i, scale_stride));
  }
  return GRIFFIN_OK;
}

int griffin_unpack(int format, const void* rows_in, int64_t n, int64_t d, int64_t stride, const float* scale,
                   int64_t scale_stride, float* out, int64_t out_stride) {
  if (!rows_in || !out || griffin_row_bytes(format, d) < 0 || (format == GRIFFIN_INT8 && !scale))
    return GRIFFIN_BAD_ARGUMENT;
  const int64_t p = round_up(d, 64);
  for (int64_t i = 0; i < n; i++) {
    const uint8_t* row = static_cast<const uint8_t*>(rows_in) + i * stride;
    float* y = out + i * out_stride;
    const float s = format == GRIFFIN_INT8 ? *scale_at(const_cast<float*>(scale), i, scale_stride) : 1.f;
    for (int64_t c = 0; c < d; c++) {
      uint16_t half = 0;
      if (format == GRIFFIN_F32) {
        memcpy(y + c, row + 4 * c, 4);
      } else if (format == GRIFFIN_INT8) {
        y[c] = s * static_cast<float>(static_cast<int8_t>(row[c]));
      } else if (format == GRIFFIN_INT4) {
        const Nibble at = nibble(c, p);
        memcpy(&half, row + p / 2 + c / kGroup * 2, 2);
        y[c] = half_to_float(half) * static_cast<float>(((row[at.byte] >> at.shift) & 15) - 8);
      } else {
        memcpy(&half, row + 2 * c, 2);
        y[c] = format == GRIFFIN_BF16 ? bf16_to_float(half) : half_to_float(half);
      }
    }
  }
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
