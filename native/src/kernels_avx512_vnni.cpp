#define GRIFFIN_VNNI 1
#include "kernels_avx512.inl"
const Kernels kAvx512Vnni = GRIFFIN_AVX512_KERNELS("avx512 vnni");
}  // namespace griffin
