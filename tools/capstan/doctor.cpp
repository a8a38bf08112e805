// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// `capstan doctor`: what this machine has, line by line, with what to do about what is missing.
#include <fmt/format.h>
#include <unistd.h>

#include <filesystem>

#include "capstan/base/bytes.h"
#include "capstan/base/env.h"
#include "capstan/base/file.h"
#include "capstan/base/gpu.h"
#include "capstan/base/json.h"
#include "program.h"
#include "verbs.h"

namespace capstan::cli {
namespace {

struct Finding {
  std::string name, value, advice;
  bool ok = true;
};

std::string best_instruction_set() {
  if (cpu_has("avx512_bf16") && cpu_has("amx_bf16")) return "AVX-512 with bf16, AMX";
  if (cpu_has("avx512_bf16")) return "AVX-512 with bf16";
  if (cpu_has("avx512f")) return "AVX-512";
  if (cpu_has("avx2")) return "AVX2";
  return "none beyond SSE2";
}

Finding check_bf16() {
  const bool fast = cpu_has("avx512_bf16") || cpu_has("amx_bf16");
  return {"fast bf16", fast ? "yes" : "no",
          fast ? "" : "precision.compute: auto trains in fp32 here; bf16 runs, slowly"};
}

Finding check_driver() {
  const GpuProbe& found = probe_gpus();
  if (found.driver_cuda == 0) return {"NVIDIA driver", found.problem, ""};
  const bool old = found.driver_cuda < kNeededCuda;
  return {"NVIDIA driver", "for CUDA up to " + cuda_version_text(found.driver_cuda),
          old ? "run.device: cuda needs a driver for CUDA 13.0" : ""};
}

std::vector<Finding> check_gpus() {
  const GpuProbe& found = probe_gpus();
  if (found.gpus.empty()) return {{"GPUs", found.problem, ""}};
  std::vector<Finding> findings;
  for (size_t i = 0; i < found.gpus.size(); ++i) {
    const Gpu& gpu = found.gpus[i];
    findings.push_back(
        {fmt::format("GPU {}", i),
         fmt::format("{}, {}, compute capability {}.{}, {} multiprocessors", gpu.name,
                     format_bytes(gpu.memory_bytes), gpu.major, gpu.minor, gpu.multiprocessors),
         has_kernels(gpu) ? "" : "the CUDA plug-in has kernels for 8.x and 9.x"});
  }
  return findings;
}

Finding check_cuda_plugin() {
  const bool present = has_cuda_plugin();
  const bool wanted = !present && !probe_gpus().gpus.empty();
  return {"CUDA plug-in", present ? cuda_plugin_path() : "not built",
          wanted ? "tools/setup.sh --preset cuda builds it; without it runs compute on CPUs" : ""};
}

Finding check_shared_memory() {
  std::error_code error;
  const auto space = std::filesystem::space("/dev/shm", error);
  if (error) return {"/dev/shm", "absent", "", true};
  return {"/dev/shm", format_bytes(static_cast<int64_t>(space.available)) + " free", ""};
}

Finding check_huge_pages() {
  std::error_code ignored;
  const Path path = "/sys/kernel/mm/transparent_hugepage/enabled";
  if (!std::filesystem::exists(path, ignored)) return {"huge pages", "unknown", ""};
  const std::string modes = read_file(path, 4096);
  const size_t begin = modes.find('['), end = modes.find(']');
  const std::string mode = begin == std::string::npos || end == std::string::npos
                               ? "unknown"
                               : modes.substr(begin + 1, end - begin - 1);
  return {"huge pages", mode, mode == "never" ? "training is up to 10 % faster with madvise" : ""};
}

Finding check_run_program() {
  const std::string path = capstan_run_path();
  const bool present = ::access(path.c_str(), X_OK) == 0;
  return {"capstan-run", present ? path : "not at " + path,
          present ? "" : "build or install Capstan anew", present};
}

std::vector<Finding> examine() {
  std::vector<Finding> findings;
  findings.push_back({"version", version_text(), ""});
  findings.push_back({"host", host_name(), ""});
  findings.push_back({"processor", cpu_model(), ""});
  findings.push_back(
      {"cores",
       fmt::format("{} physical, {} logical allowed", allowed_physical_cores(), allowed_cpus()),
       ""});
  findings.push_back({"instruction set", best_instruction_set(), ""});
  findings.push_back(check_bf16());
  findings.push_back({"memory", format_bytes(memory_limit_bytes()), ""});
  findings.push_back(check_huge_pages());
  findings.push_back(check_shared_memory());
  findings.push_back(
      {"disk here", format_bytes(free_disk_bytes(std::filesystem::current_path())) + " free", ""});
  findings.push_back(check_driver());
  for (Finding& finding : check_gpus()) findings.push_back(std::move(finding));
  findings.push_back(check_cuda_plugin());
  findings.push_back(check_run_program());
  return findings;
}

void doctor(bool as_json) {
  const std::vector<Finding> findings = examine();
  json::Json list = json::Json::array();
  bool ok = true;
  for (const Finding& f : findings) {
    ok = ok && f.ok;
    if (as_json)
      list.push_back({{"name", f.name}, {"value", f.value}, {"advice", f.advice}, {"ok", f.ok}});
    else
      fmt::print("{:<4} {:<16} {}{}\n", f.ok ? "ok" : "BAD", f.name, f.value,
                 f.advice.empty() ? "" : " (" + f.advice + ")");
  }
  if (as_json) fmt::print("{}\n", list.dump(1));
  if (!ok) throw Exit{1};
}

}  // namespace

void add_doctor(CLI::App& app) {
  auto as_json = std::make_shared<bool>(false);
  CLI::App* verb = app.add_subcommand("doctor", "what this machine has");
  verb->add_flag("--json", *as_json, "as JSON");
  verb->footer("Example:\n  capstan doctor");
  verb->callback([as_json] { doctor(*as_json); });
}

}  // namespace capstan::cli
