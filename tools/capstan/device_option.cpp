// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "device_option.h"

#include "capstan/base/error.h"
#include "capstan/base/gpu.h"
#include "capstan/base/log.h"
#include "capstan/device/cuda.h"
#include "capstan/plan/plan.h"

namespace capstan::cli {

void add_device_option(CLI::App& verb, std::string& device) {
  verb.add_option("--device", device,
                  "where to compute, whatever the model was trained on; auto = the first GPU of "
                  "CUDA_VISIBLE_DEVICES where this build can use one, else cpu")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->type_name("auto|cpu|cuda");
}

void start_device(const std::string& device) {
  if (device == "cpu") return;
  if (plan::local_topology(1, 1, device).device == "cuda") return device::start_cuda(0);
  const std::string missing = gpu_obstacle(1);
  if (device == "cuda")
    throw ConfigError({.module = "cli",
                       .what = "--device cuda",
                       .got = missing,
                       .need = "cpu or auto",
                       .why = "no GPU can be used here; capstan doctor says why",
                       .fix = "Leave --device out"});
  if (!probe_gpus().gpus.empty())
    log::warning("cli", "computing on the CPU although there is a GPU: {}", missing);
}

}  // namespace capstan::cli
