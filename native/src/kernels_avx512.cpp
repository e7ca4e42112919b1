#include "kernels_avx512.inl"
const Kernels kAvx512 = GRIFFIN_AVX512_KERNELS("avx512");
}  // namespace griffin
