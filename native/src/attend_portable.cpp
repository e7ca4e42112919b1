#define GRIFFIN_ATTEND attend_portable
#include "attend.inl"
