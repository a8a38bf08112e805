// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/device/isa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <string>
#include <vector>

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "device/isa_internal.h"

namespace capstan::device {
namespace {
constexpr std::array kLevels = {Isa::kPlain, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};

// Linux saves tile registers only for processes that ask (Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
#if defined(__x86_64__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return ::syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
}  // namespace

std::string_view name_of(Isa isa) {
  switch (isa) {
    case Isa::kPlain:
      return "plain";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512bf16";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kPlain;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
  const bool has_tiles = cpu_has("amx_tile") && cpu_has("amx_bf16");
  return has_tiles && may_use_tiles() ? Isa::kAmx : Isa::kAvx512Bf16;
#else
  return Isa::kPlain;
#endif
}

Isa choose_isa(Isa detected, const std::optional<std::string>& asked) {
  if (!asked) return detected;
  std::vector<std::string> names;
  for (const Isa level : kLevels) {
    if (name_of(level) == *asked) {
      if (level <= detected) return level;
      throw EnvError(ErrorText{.module = "device",
                               .what = "honouring CAPSTAN_ISA",
                               .got = *asked,
                               .need = std::string(name_of(detected)) + " or lower",
                               .why = "the processor " + cpu_model() + " has no more",
                               .fix = "Unset CAPSTAN_ISA"});
    }
    names.emplace_back(name_of(level));
  }
  throw EnvError(ErrorText{.module = "device",
                           .what = "honouring CAPSTAN_ISA",
                           .got = quote(*asked),
                           .need = "one of " + join(names, ", "),
                           .fix = "Unset CAPSTAN_ISA or give one of these"});
}

Isa isa_level() {
  static const Isa level = choose_isa(detect_isa(), read_env("CAPSTAN_ISA"));
  return level;
}

}  // namespace capstan::device
