#define GRIFFIN_ATTEND attend_avx2
#include "attend.inl"
