#define GRIFFIN_VNNI 1
#include "grouped_avx512.inl"
