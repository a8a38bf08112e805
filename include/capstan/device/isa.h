// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The instruction-set path of our own kernels.
#pragma once
#include <string_view>

namespace capstan::device {

enum class Isa { kPlain, kAvx2, kAvx512, kAvx512Bf16, kAmx };  // each includes those before it

// "plain", "avx2", "avx512", "avx512bf16", "amx"
[[nodiscard]] std::string_view name_of(Isa isa);
// What the processor has. AMX only if Linux lets this process use it, which this asks for.
[[nodiscard]] Isa detect_isa();
// detect_isa(), or the lower level that CAPSTAN_ISA asks for. Throws EnvError for an unknown name
// and for a level the processor lacks. The environment is read at the first call.
[[nodiscard]] Isa isa_level();

}  // namespace capstan::device
