#define GRIFFIN_UNPACK unpack_avx2
#include "unpack.inl"
