// The library against plain double loops, made for the sanitizer build: every buffer is exactly as long as promised and
// on the heap, so that a read or write beyond it is caught. Random shapes, all formats and instruction sets; exits 1 on
// a miss.
#include <sstream>

#include "check_decode.h"
#include "check_products.h"
#include "check_refusals.h"
#include "check_weights.h"

int main() {
  std::istringstream names(griffin_isas());
  int cases = 0;
  const std::vector<Kind> kinds = all_kinds();
  const std::vector<Kind> types(kinds.begin(), kinds.begin() + 13);  // floats and GGUF
  const auto any = [&] { return kinds[between(0, static_cast<int>(kinds.size()) - 1)]; };
  const int tiny[] = {1, 2, 31, 33, 63, 64, 65, 255, 257};
  for (std::string isa; names >> isa;) {
    griffin_set_isa(isa.c_str());
    for (const Kind& kind : kinds) {
      const bool type = kind.format != GRIFFIN_GROUPED || kind.gguf >= 0;
      for (int i = 0; i < (type ? 6 : 2); i++, cases++) {
        const int wanted = i == 0 ? tiny[between(0, 8)] : between(1, i % 2 ? 200 : 1100);
        const int d = size_of_kind(kind, wanted),
                  d_ff = size_of_kind(kind, i == 0 ? tiny[between(0, 3)] : between(1, 40));
        check_ff(kind, kind, kind, random_case(d, d_ff, between(1, 16)));
        const bool grouped = kind.format == GRIFFIN_GROUPED;
        const int rows = i % 2 && grouped ? between(17, 130) : between(1, 16),
                  short_d = size_of_kind(kind, between(1, 300));
        check_matvec(kind, random_case(rows > 16 ? short_d : d, between(1, 40), rows), false);
        if (grouped) check_matvec(kind, random_case(size_of_kind(kind, between(1, 80)), wanted, between(1, 20)), true);
      }
      check_unpack(kind, between(1, 600), size_of_kind(kind, between(1, 600)));
      if (kind.gguf >= 0) check_layouts(kind, between(1, 300), size_of_kind(kind, between(1, 600)));
      check_not_finite(kind, NAN), check_not_finite(kind, -INFINITY);
      if (kind.block == 1 && (kind.format != GRIFFIN_GROUPED || between(0, 9) == 0)) check_decode(kind);
      check_refusals(kind);
    }
    for (int i = 0; i < 80; i++, cases++) {  // every matrix in a format of its own
      const Kind gate = i % 2 ? any() : types[between(0, 12)], up = any(), down = i % 2 ? any() : types[between(0, 12)];
      const int d = size_of_kind(gate.block > up.block ? gate : up, between(1, 400));
      check_ff(gate, up, down, random_case(d, size_of_kind(down, between(1, 70)), between(1, 16)));
    }
    for (const int bits : {2, 3, 4, 5, 6, 8})
      for (const bool supers : {false, true})
        for (const int d_in : {1, 31, between(1, 600), 512})
          if (bits > 2 || supers) check_quantise(bits, supers, between(1, 6), d_in);
  }
  griffin_grouped wrong{4, 32, GRIFFIN_SCALE_F32, GRIFFIN_OFFSET_NONE, 8, 32};
  const float weight[32] = {};
  uint8_t room[256];
  const griffin_codes out{room, room, room, room, room};
  expect(griffin_quantise(&wrong, weight, 1, 32, nullptr, &out, 1) == GRIFFIN_BAD_ARGUMENT,
         "quantise to float32 scales");
  wrong.scale = GRIFFIN_SCALE_F16;
  expect(griffin_quantise(&wrong, weight, 1, 32, nullptr, &out, 1) == GRIFFIN_OK, "quantise of zeros");
  expect(griffin_quantise(&wrong, nullptr, 1, 32, nullptr, &out, 1) == GRIFFIN_BAD_ARGUMENT, "quantise of nothing");
  expect(griffin_quantise(&wrong, weight, 1, 0, nullptr, &out, 1) == GRIFFIN_BAD_ARGUMENT, "quantise of no columns");
  expect(griffin_ff(nullptr, nullptr, 1) == GRIFFIN_BAD_ARGUMENT && griffin_set_isa("mmx") == GRIFFIN_NO_ISA,
         "nothing");
  printf("%d cases on %s (%s), %d failed\n", cases, griffin_isas(), griffin_threading(), failures);
  return failures != 0;
}
