// The instruction set in use: the best one here, or the one forced by griffin_set_isa.
#include <string.h>

#include <atomic>
#include <string>

#include "griffin_native.h"
#include "kernels.h"

namespace griffin {
namespace {

struct Machine {
  Kernels sets[3];
  const char* names[3];
  std::string labels[3];
  int count = 0;
  std::string all;

  void add(const char* name, Kernels set, std::string label) {
    labels[count] = std::move(label);
    sets[count] = set;
    sets[count].name = labels[count].c_str();
    names[count++] = name;
    all += all.empty() ? name : std::string(" ") + name;
  }
  Machine() {
#if defined(GRIFFIN_X86)
    __builtin_cpu_init();  // its answers include what the operating system saves (XCR0)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      const bool vnni = __builtin_cpu_supports("avx512vnni"), bf16 = __builtin_cpu_supports("avx512bf16");
      Kernels set = kAvx512;
      if (vnni) set.grouped = &kGroupedAvx512Vnni;
      if (bf16) set.dot_bf16 = dot_bf16_avx512;
      add("avx512", set, std::string(set.name) + (vnni ? " vnni" : "") + (bf16 ? " bf16" : ""));
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      add("avx2", kAvx2, "avx2");
#endif
    add("portable", kPortable, "portable");
  }
};

const Machine& machine() {
  static const Machine* const here = new Machine;
  return *here;
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* set = in_use.load(std::memory_order_acquire);
  return set ? *set : machine().sets[0];
}

}  // namespace griffin

extern "C" {

int griffin_set_isa(const char* name) {
  const griffin::Machine& here = griffin::machine();
  for (int i = 0; i < here.count; i++)
    if (!name || !strcmp(name, here.names[i])) {
      griffin::in_use.store(&here.sets[i], std::memory_order_release);
      return GRIFFIN_OK;
    }
  return GRIFFIN_NO_ISA;
}

const char* griffin_isa(void) { return griffin::kernels().name; }

const char* griffin_isas(void) { return griffin::machine().all.c_str(); }

}  // extern "C"
