// SPDX-License-Identifier: Apache-2.0
#include "cpu/features.h"

#ifdef OSORA_X86_64
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>
#endif

namespace osora::cpu {
namespace {

#ifdef OSORA_X86_64
// Linux keeps a process from tile registers until it has asked for them once (Documentation/arch/x86/xstate.rst).
bool tiles_granted() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

bool has_amx_bfloat16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBfloat16) && (d & kTiles);
}

Features ask() {
  Features found;
  const char* const limit = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view allowed = limit ? limit : "";
  if (allowed == "default") return found;
  found.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (allowed == "avx2") return found;
  found.avx512 = found.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512bw");
  found.amx = found.avx512 && has_amx_bfloat16() && tiles_granted();
  return found;
}
#else
Features ask() { return {}; }
#endif

}  // namespace

const Features& features() {
  static const Features found = ask();
  return found;
}

}  // namespace osora::cpu
