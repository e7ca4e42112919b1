// What one instruction set provides: products with weight rows. Each set is one translation unit with its own compiler
// flags; to keep code of one set out of the others (the linker may merge inline functions), those units include C
// headers only and define everything in an anonymous namespace.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "grouped_kernels.h"

namespace griffin {

constexpr int kPad = 512;    // inputs are zero-padded to this many values, accumulators too
constexpr int kMaxRows = 8;  // rows of input that one `dot` call takes

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// One row of input, prepared for the weight formats that it meets; the others' pointers are not set. Padded to kPad
// values with zeros.
struct Input {
  const float* f32 = nullptr;
  const uint16_t* bf16 = nullptr;
  GroupedInput grouped[2];  // for groups of 16, of 32
};

// out[i * n + r] = <w[i], x[r]> for i < m (1 or 2), r < n (1..kMaxRows). `next`: rows that
//  will be wanted soon (m of them, never null; prefetched only).
using DotFn = void (*)(const uint8_t* const* w, int m, const Input* const* x, int n, int d, float* out,
                       const uint8_t* const* next);
// acc[c] += sum over i < n of z[i] * w[i][c], for columns c in [begin, end); begin is a multiple of 128, end too or d.
// The same columns of ahead[0 .. n_ahead) are prefetched meanwhile.
using AxpyFn = void (*)(float* acc, const uint8_t* const* w, const float* z, int n, int d, int begin, int end,
                        const uint8_t* const* ahead, int n_ahead);

struct Kernels {
  const char* name;
  DotFn dot[3];    // by griffin_format
  DotFn dot_bf16;  // bf16 weights with bf16 input, or null
  AxpyFn axpy[3];
  // out[c] = bias[c] + sum over t < parts of part[t * stride + c], for c < count; bias may be null. out may be bf16.
  void (*reduce)(const float* part, int64_t stride, int parts, const float* bias, void* out, bool bf16, int count);
  void (*widen)(const uint16_t* bf16, float* out, int count);
  float (*sum)(const float* data, int64_t count);
  // out[i] = act(v[i]) * by[i], or act(v[i]) if `by` is null; activation: enum griffin_activation.
  void (*activate)(int activation, const float* v, const float* by, float* out, int n);
  const GroupedKernels* grouped;
};

extern const Kernels kPortable;
#if defined(GRIFFIN_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
void dot_bf16_avx512(const uint8_t* const* w, int m, const Input* const* x, int n, int d, float* out,
                     const uint8_t* const* next);
#endif

const Kernels& kernels();  // the set in use

}  // namespace griffin
