#include "grouped_avx512.inl"
