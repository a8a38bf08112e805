// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "base/machine_internal.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <fstream>
#include <set>
#include <sstream>

namespace capstan::internal {

namespace {

// Kernel files are small and may be absent: absence is an answer, not an error.
std::string read_kernel_file(const Path& path) {
  std::ifstream file(path);
  std::stringstream content;
  if (file) content << file.rdbuf();
  std::string text = content.str();
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
  return text;
}

std::optional<int64_t> to_int(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// The folders of one controller from this process's group up to the mount point.
std::vector<Path> group_folders(const Path& mount, const std::string& group) {
  std::vector<Path> folders;
  Path relative = Path(group).relative_path().lexically_normal();
  while (!relative.empty() && relative != "." && *relative.begin() != "..") {
    folders.push_back(mount / relative);
    relative = relative.parent_path();
  }
  folders.push_back(mount);
  return folders;
}

struct Groups {
  std::vector<Path> unified, memory, cpu;
};

// /proc/self/cgroup: "0::/path" is v2, "4:memory:/path" is v1. A container may show a path that its
// own mount does not have; the mount point itself then holds the limit and is always in the list.
Groups find_groups(const SystemRoots& roots) {
  Groups groups;
  const Path mount = roots.sys / "fs/cgroup";
  std::istringstream lines(read_kernel_file(roots.proc / "self/cgroup"));
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string group = line.substr(second + 1);
    if (controllers == ",,") groups.unified = group_folders(mount, group);
    if (controllers.find(",memory,") != std::string::npos) {
      groups.memory = group_folders(mount / "memory", group);
    }
    if (controllers.find(",cpu,") != std::string::npos) {
      groups.cpu = group_folders(mount / "cpu", group);
    }
  }
  return groups;
}

template <class T>
void keep_least(std::optional<T>& least, T value) {
  if (!least || value < *least) least = value;
}

}  // namespace

std::vector<int> affinity_cpus() {
  // The kernel refuses sets smaller than its own number of processors, so grow until it accepts.
  for (int capacity = 1024; capacity <= 1 << 20; capacity *= 2) {
    cpu_set_t* set = CPU_ALLOC(static_cast<size_t>(capacity));
    if (set == nullptr) break;
    const size_t size = CPU_ALLOC_SIZE(static_cast<size_t>(capacity));
    CPU_ZERO_S(size, set);
    const int code = ::sched_getaffinity(0, size, set) == 0 ? 0 : errno;
    std::vector<int> cpus;
    for (int cpu = 0; code == 0 && cpu < capacity; ++cpu) {
      if (CPU_ISSET_S(static_cast<size_t>(cpu), size, set)) cpus.push_back(cpu);
    }
    CPU_FREE(set);
    if (code == 0) return cpus;
    if (code != EINVAL) break;
  }
  return {0};
}

int count_physical_cores(const std::vector<int>& cpus, const SystemRoots& roots) {
  std::set<std::string> cores;
  for (const int cpu : cpus) {
    const Path topology =
        roots.sys / "devices/system/cpu" / ("cpu" + std::to_string(cpu)) / "topology";
    std::string siblings = read_kernel_file(topology / "core_cpus_list");
    if (siblings.empty()) siblings = read_kernel_file(topology / "thread_siblings_list");
    cores.insert(siblings.empty() ? "cpu" + std::to_string(cpu) : siblings);
  }
  return std::max(1, static_cast<int>(cores.size()));
}

std::optional<double> cgroup_cpu_quota(const SystemRoots& roots) {
  std::optional<double> least;
  const Groups groups = find_groups(roots);
  const auto consider = [&](std::optional<int64_t> quota, std::optional<int64_t> period) {
    if (quota && period && *quota > 0 && *period > 0) {
      keep_least(least, static_cast<double>(*quota) / static_cast<double>(*period));
    }
  };
  for (const Path& folder : groups.unified) {
    const std::string text =
        read_kernel_file(folder / "cpu.max");  // "max 100000" or "200000 100000"
    const size_t space = text.find(' ');
    if (space == std::string::npos) continue;
    consider(to_int(text.substr(0, space)), to_int(text.substr(space + 1)));
  }
  for (const Path& folder : groups.cpu) {
    consider(to_int(read_kernel_file(folder / "cpu.cfs_quota_us")),
             to_int(read_kernel_file(folder / "cpu.cfs_period_us")));
  }
  return least;
}

std::optional<int64_t> cgroup_memory_limit(const SystemRoots& roots) {
  std::optional<int64_t> least;
  const Groups groups = find_groups(roots);
  for (const Path& folder : groups.unified) {
    if (const auto limit = to_int(read_kernel_file(folder / "memory.max")))
      keep_least(least, *limit);
  }
  for (const Path& folder : groups.memory) {
    const auto limit = to_int(read_kernel_file(folder / "memory.limit_in_bytes"));
    if (limit) keep_least(least, *limit);
  }
  return least;
}

std::string cpuinfo_field(const std::string& key, const SystemRoots& roots) {
  std::ifstream file(roots.proc / "cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos || !line.starts_with(key)) continue;
    if (line.find_first_not_of(" \t", key.size()) != colon) continue;
    const size_t start = line.find_first_not_of(" \t", colon + 1);
    return start == std::string::npos ? "" : line.substr(start);
  }
  return "";
}

}  // namespace capstan::internal
