#define GRIFFIN_UNPACK unpack_avx512
#include "unpack.inl"
