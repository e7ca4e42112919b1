// What the threads of one parallel region do together: each calls the part with its own number. No barrier is inside;
// what a part writes is whole once all threads have passed a barrier after it.
#pragma once
#include "inputs.h"
#include "dynamic.h"

namespace griffin {

// y = W x + bias for the rows of `x`; y is float32 or bf16, y_stride the bytes from one row to the next.
struct Product {
  const griffin_matrix* matrix;
  void* y;
  int64_t y_stride;
  bool bf16;
};

// The rows of all the matrices, which have one input, are shared out together.
void multiply_part(const Product* products, int count, const Inputs& x, int rows, int thread, int threads);

// What the inputs of a block's call have to be prepared for.
void ff_meet(const griffin_ff_block& block, const griffin_io& io, Inputs& inputs);
// Floats of one thread's accumulators.
int64_t ff_accumulator(int d_model, int rows);
// This thread's experts: their down rows, weighted, are added up in accumulators of its own, which lie one thread's
// after the other's. `io` gives the experts; its x and y are not used. `chosen`: the ones that dynamic selection keeps,
// or null.
void ff_accumulate(const griffin_ff_block& block, const griffin_io& io, const Inputs& x, const Chosen* chosen,
                   float* accumulators, int thread, int threads);
// After a barrier: this thread's columns of y, the sum of all threads' accumulators.
void ff_reduce(const griffin_ff_block& block, const griffin_io& io, const float* accumulators, int thread, int threads);

}  // namespace griffin
