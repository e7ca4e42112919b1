// The layout of the interface's structs, for a caller that declares them once more.
#include <stddef.h>
#include <string.h>

#include "griffin_decode.h"
#include "griffin_gguf.h"

namespace {

struct Layout {
  const char* name;
  int64_t size, last_offset;
};

#define LAYOUT(type, last) {#type, sizeof(type), offsetof(type, last)}
constexpr Layout kLayouts[] = {
    LAYOUT(griffin_ff_block, reserved), LAYOUT(griffin_matrix, table),     LAYOUT(griffin_dynamic, first),
    LAYOUT(griffin_io, compact),        LAYOUT(griffin_norm, reserved),    LAYOUT(griffin_layer, window),
    LAYOUT(griffin_decoder, sines),     LAYOUT(griffin_cache, reserved),   LAYOUT(griffin_experts, compact),
    LAYOUT(griffin_grouped, span),      LAYOUT(griffin_codes, sub_offset), LAYOUT(griffin_gguf_tensor, type),
    LAYOUT(griffin_parts, bytes),
};

const Layout* find(const char* name) {
  for (const Layout& layout : kLayouts)
    if (name && !strcmp(name, layout.name)) return &layout;
  return nullptr;
}

}  // namespace

extern "C" int64_t griffin_sizeof(const char* name) {
  const Layout* const layout = find(name);
  return layout ? layout->size : -1;
}

extern "C" int64_t griffin_last_offset(const char* name) {
  const Layout* const layout = find(name);
  return layout ? layout->last_offset : -1;
}
