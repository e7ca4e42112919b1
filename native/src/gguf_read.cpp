// Matrices from GGUF files into the layouts of grouped.h: read and packed piece by piece, so that no more of a file is in
// memory twice than a piece for each thread.
#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <new>

#include "griffin_gguf.h"

namespace {

// Fills `to`; GRIFFIN_OK, or why not.
int read_at(int file, uint8_t* to, int64_t bytes, int64_t offset) {
  while (bytes > 0) {
    const ssize_t count = pread(file, to, static_cast<size_t>(bytes), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return GRIFFIN_READ_ERROR;
    if (count == 0) return GRIFFIN_FILE_ENDED;
    to += count, offset += count, bytes -= count;
  }
  return GRIFFIN_OK;
}

}  // namespace

extern "C" int griffin_pack_tensors(const griffin_gguf_tensor* tensors, int64_t n, int64_t* next) {
  if (!tensors || !next) return GRIFFIN_BAD_ARGUMENT;
  std::unique_ptr<uint8_t[]> room;
  int64_t size = 0;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < n;) {
    const griffin_gguf_tensor& tensor = tensors[i];
    int status = GRIFFIN_OK;
    if (tensor.bytes > size) {
      room.reset();  // before its successor is there
      room.reset(new (std::nothrow) uint8_t[static_cast<size_t>(tensor.bytes)]);
      size = room ? tensor.bytes : 0;
      if (!room) status = GRIFFIN_NO_MEMORY;
    }
    if (status == GRIFFIN_OK) status = read_at(tensor.file, room.get(), tensor.bytes, tensor.offset);
    if (status == GRIFFIN_OK) status = griffin_pack_gguf(&tensor.matrix, tensor.type, room.get(), tensor.row_order, 1);
    if (status != GRIFFIN_OK) {
      __atomic_store_n(next, n, __ATOMIC_RELAXED);  // nobody needs to go on
      return status;
    }
  }
  return GRIFFIN_OK;
}
