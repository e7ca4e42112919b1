// Blocks of packed rows as bf16 or float32, for the GEMMs of the prompt phase: each thread takes a share of the rows.
#include "unpack.h"

#include <string.h>

#include "griffin_native.h"
#include "parallel.h"

using namespace griffin;

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

extern "C" int griffin_unpack_block(int format, const void* rows_in, int64_t n, int64_t d, int64_t stride,
                                    const float* scale, int64_t scale_stride, int64_t begin, int64_t end, void* out,
                                    int out_type, int64_t out_stride, int threads) {
  const bool known = format == GRIFFIN_INT4 || (format == GRIFFIN_INT8 && scale);
  if (!known || !rows_in || !out || n < 0 || threads < 1 || begin < 0 || begin % 128 || end < begin || end > d ||
      (out_type != GRIFFIN_F32 && out_type != GRIFFIN_BF16))
    return GRIFFIN_BAD_ARGUMENT;
  struct Call {
    Unpack part;
    int64_t n;
    UnpackFn function;
  } call{{format, static_cast<const uint8_t*>(rows_in), d, stride, scale, scale_stride, begin, end, out, out_stride,
          out_type == GRIFFIN_BF16},
         n,
         chosen()};
  parallel(
      threads,
      [](void* data, int thread, int team) {
        const Call& c = *static_cast<Call*>(data);
        c.function(c.part, c.n * thread / team, c.n * (thread + 1) / team);
      },
      &call);
  return GRIFFIN_OK;
}
