#define GRIFFIN_ATTEND attend_avx512
#include "attend.inl"
