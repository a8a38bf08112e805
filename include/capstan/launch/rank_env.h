// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The side of a rank: who am I, and what do I tell the launcher.
#pragma once
#include <exception>
#include <optional>
#include <string>

#include "capstan/base/file.h"

namespace capstan::launch {

struct RankEnv {
  bool launched = false;  // false: no launcher, this process is the one rank
  int rank = 0, world_size = 1, local_rank = 0, local_world_size = 1;
  std::string master_addr = "127.0.0.1";
  int master_port = 0;  // 0 without a launcher
  std::optional<int>
      store_fd;  // rank 0: an inherited listening socket for the store; the caller owns it
  std::optional<double> grace_s;  // time from SIGTERM to SIGKILL, if the launcher tells
  std::string source;             // for people: "Open MPI (OMPI_COMM_WORLD_RANK)"
  std::string job;                // of a scheduler: its name for the job, else empty
  std::string first_host;         // of a scheduler: where rank 0 runs, if it tells
};

// The first of these that is set, inner launchers before outer ones:
//   1. CAPSTAN_RANK, CAPSTAN_WORLD_SIZE, ... of capstan's own launcher
//   2. RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE beside TORCHELASTIC_RUN_ID: torchrun
//   3. the same without it: set by hand; refused when they contradict 4 or 5
//   4. OMPI_COMM_WORLD_{RANK,SIZE,LOCAL_RANK,LOCAL_SIZE} of Open MPI's mpirun
//   5. SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, ... of a Slurm step (srun)
// None, or the only task of 4 or 5 = one rank, which may start others. MASTER_ADDR and MASTER_PORT
// are required for 1 to 3; 4 and 5 know the machine and derive the port from the job's name.
// Throws EnvError with the name of the variable that is missing, no number or out of range, or
// with the two that contradict each other.
[[nodiscard]] RankEnv read_rank_env();

// Writes why this rank ends to CAPSTAN_ERROR_FILE (nothing without that variable). To be called
// once, as early as the failure is known: the time in it decides which rank was first. Errors of
// module "comm" are marked as the probable consequence of another rank's failure.
void write_error_file(const std::exception& error, int exit_code) noexcept;

// Tells the launcher that the run has ended by plan, so that this rank may exit with 0 while others
// work on.
void declare_done() noexcept;

struct ErrorFile {
  int rank = -1, exit_code = 0;
  std::string class_name, message;
  int64_t time_ns = 0;  // monotonic
  bool is_cascade = false;
};
// nullopt when the file is missing or not one of ours.
[[nodiscard]] std::optional<ErrorFile> read_error_file(const Path& path);
// The marker declare_done() leaves beside the error file: `done` with {"done":true}.
[[nodiscard]] bool is_declared_done(const Path& error_file);

}  // namespace capstan::launch
