// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Environment variables as untrusted text: numbers are range-checked and refused with the
// variable's name.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

namespace capstan {

[[nodiscard]] std::optional<std::string> read_env(
    const char* name);  // nullopt when unset; empty when empty
// Throws EnvError naming the variable when it is set and not an integer in [low, high].
[[nodiscard]] std::optional<int64_t> read_env_int(const char* name, int64_t low, int64_t high);

[[nodiscard]] std::string host_name();
[[nodiscard]] std::string utc_now();  // ISO 8601 with milliseconds, "2026-01-31T12:30:01.123Z"
[[nodiscard]] int64_t monotonic_ns();
[[nodiscard]] int allowed_cpus();            // logical processors this process may run on
[[nodiscard]] int allowed_physical_cores();  // cores without their hyperthread siblings, at least 1
[[nodiscard]] int64_t
memory_limit_bytes();                    // physical memory or the cgroup's limit, whichever is less
[[nodiscard]] int64_t resident_bytes();  // resident set of this process
[[nodiscard]] std::string cpu_model();
[[nodiscard]] bool cpu_has(
    const char* flag);  // a flag of /proc/cpuinfo: "avx512_bf16", "avx512f", "avx2"

}  // namespace capstan
