#define GRIFFIN_UNPACK unpack_portable
#include "unpack.inl"
