// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What the kernel tells about this machine, with the folders as arguments so that tests can make
// their own.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "capstan/base/file.h"

namespace capstan::internal {

struct SystemRoots {
  Path sys = "/sys", proc = "/proc";
};

// Numbers of the logical processors that sched_setaffinity allows this thread.
[[nodiscard]] std::vector<int> affinity_cpus();
// Cores among `cpus` by sysfs topology; processors without an entry count as cores.
[[nodiscard]] int count_physical_cores(const std::vector<int>& cpus, const SystemRoots& roots);
// CPU time quota of the control group and its parents, in processors; nullopt without one.
[[nodiscard]] std::optional<double> cgroup_cpu_quota(const SystemRoots& roots);
// Memory limit of the control group and its parents, v2 and v1; nullopt without one.
[[nodiscard]] std::optional<int64_t> cgroup_memory_limit(const SystemRoots& roots);
// Value of the first line "key : value" of cpuinfo, empty when absent.
[[nodiscard]] std::string cpuinfo_field(const std::string& key, const SystemRoots& roots);

}  // namespace capstan::internal
