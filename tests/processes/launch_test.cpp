// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The launcher with small shell commands as ranks.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <fstream>
#include <set>
#include <thread>

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/launch/local.h"

namespace capstan::launch {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
namespace fs = std::filesystem;

// Waits for something another process does; a deadline, not a pause.
template <class Condition>
bool wait_until(Condition&& condition, double seconds = 60) {
  const int64_t deadline = monotonic_ns() + static_cast<int64_t>(seconds * 1e9);
  while (!condition()) {
    if (monotonic_ns() > deadline) return false;
    ::poll(nullptr, 0, 5);
  }
  return true;
}

// Processes with `marker` in their environment, apart from this one.
std::set<pid_t> processes_with(const std::string& marker) {
  std::set<pid_t> found;
  for (const auto& entry : fs::directory_iterator("/proc")) {
    const std::string name = entry.path().filename();
    if (name.find_first_not_of("0123456789") != std::string::npos) continue;
    std::ifstream file(entry.path() / "environ");
    const std::string text((std::istreambuf_iterator<char>(file)), {});
    const pid_t pid = std::stoi(name);
    if (pid != ::getpid() && text.find(marker) != std::string::npos) found.insert(pid);
  }
  return found;
}

class Launch : public testing::Test {
 protected:
  Launch() {
    std::string name = (fs::temp_directory_path() / "capstan-launch-XXXXXX").native();
    folder_ = ::mkdtemp(name.data());
  }
  ~Launch() override {
    EXPECT_TRUE(wait_until([&] { return processes_with(marker()).empty(); })) << "a rank survived";
    fs::remove_all(folder_);
  }
  [[nodiscard]] std::string marker() const { return "LAUNCH_TEST=" + folder_.native(); }
  [[nodiscard]] LocalLaunch shell(const std::string& script, int nproc) const {
    return {.command = {"/bin/sh", "-c", script},
            .nproc = nproc,
            .log_directory = folder_ / "logs",
            .grace_s = 60,
            .crash_grace_s = 60,
            .tee_rank0 = false,
            .environment = {{"LAUNCH_TEST", folder_.native()}, {"DIR", folder_.native()}},
            .allow_nested = true};
  }
  [[nodiscard]] std::string log(int rank, const char* name) const {
    return read_file(folder_ / "logs" / std::to_string(rank) / name);
  }
  [[nodiscard]] bool exists(const char* name) const { return fs::exists(folder_ / name); }
  // Runs a launcher in a process of its own, in front of `act`, and returns its wait status.
  template <class Action>
  int in_launcher(const LocalLaunch& launch, Action&& act) {
    const pid_t child = ::fork();
    if (child == 0) {
      const LaunchResult result = run_local(launch);
      std::ofstream(folder_ / "report") << describe(result);
      ::_exit(result.exit_code > 125 ? result.exit_code - 128 + 200 : result.exit_code);
    }
    act(child);
    int status = -1;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    return status;
  }
  Path folder_;
};

TEST_F(Launch, Success_GivesZeroAndLogs) {
  const LaunchResult result = run_local(shell("echo out $RANK; echo err $RANK >&2", 3));
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_FALSE(result.failure.has_value());
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(log(rank, "stdout.log"), "out " + std::to_string(rank) + "\n");
    EXPECT_EQ(log(rank, "stderr.log"), "err " + std::to_string(rank) + "\n");
  }
}

TEST_F(Launch, Environment_IsComplete) {
  LocalLaunch launch = shell(
      "echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $CAPSTAN_RANK/$CAPSTAN_WORLD_SIZE "
      "$MASTER_ADDR $OMP_NUM_THREADS $CAPSTAN_GRACE_S $EXTRA; test $MASTER_PORT = "
      "$CAPSTAN_MASTER_PORT && "
      "test $MASTER_PORT -gt 0 && test \"$(basename \"$CAPSTAN_ERROR_FILE\")\" = error.json",
      2);
  launch.environment["OMP_NUM_THREADS"] = "7";
  launch.environment["EXTRA"] = "two words";
  EXPECT_EQ(run_local(launch).exit_code, 0);
  EXPECT_EQ(log(1, "stdout.log"), "1/2 1/2 1/2 127.0.0.1 7 60 two words\n");
}

TEST_F(Launch, StoreSocket_IsForRankZeroAloneAndListens) {
  const int careless = ::open("/dev/null", O_RDONLY);
  // /proc/net/tcp: state 0A is LISTEN; the port in upper-case hexadecimal.
  const LaunchResult result = run_local(
      shell("if test $RANK = 0; then test -S /proc/self/fd/$CAPSTAN_STORE_FD || exit 4; "
            "grep -q \"$(printf ':%04X 00000000:0000 0A' $MASTER_PORT)\" /proc/net/tcp || exit 5; "
            "else test -z \"$CAPSTAN_STORE_FD\" || exit 6; fi; "
            "readlink /proc/self/fd/0; ls /proc/self/fd | wc -l",
            2));
  EXPECT_EQ(result.exit_code, 0) << describe(result);
  // Nothing else is inherited, whatever this test holds open; ls itself has its folder open.
  EXPECT_EQ(log(0, "stdout.log"), "/dev/null\n5\n");
  EXPECT_EQ(log(1, "stdout.log"), "/dev/null\n4\n");
  ::close(careless);
}

TEST_F(Launch, Ports_OfLaunchesAtOnceDiffer) {
  std::set<std::string> ports;
  constexpr int kLaunches = 12;
  std::vector<pid_t> children;
  for (int i = 0; i < kLaunches; ++i) {
    const pid_t child = ::fork();
    if (child == 0) {
      LocalLaunch launch = shell(
          "echo $MASTER_PORT; : > $DIR/started.$ID; until test -e $DIR/go; do sleep 0.01; done", 1);
      launch.log_directory = folder_ / ("logs" + std::to_string(i));
      launch.environment["ID"] = std::to_string(i);
      ::_exit(run_local(launch).exit_code);
    }
    children.push_back(child);
  }
  EXPECT_TRUE(wait_until([&] {
    int started = 0;
    for (int i = 0; i < kLaunches; ++i) started += exists(("started." + std::to_string(i)).c_str());
    return started == kLaunches;
  }));
  std::ofstream(folder_ / "go") << "";
  for (const pid_t child : children) {
    int status = -1;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
  }
  for (int i = 0; i < kLaunches; ++i) {
    ports.insert(read_file(folder_ / ("logs" + std::to_string(i)) / "0" / "stdout.log"));
  }
  EXPECT_EQ(ports.size(), static_cast<size_t>(kLaunches));
}

TEST_F(Launch, Crash_StopsTheOthersAndIsTheOneReported) {
  const int64_t start = monotonic_ns();
  const LaunchResult result = run_local(shell(
      "if test $RANK = 1; then for i in 1 2 3; do echo line $i >&2; done; exit 7; fi; sleep 600",
      3));
  EXPECT_LT(monotonic_ns() - start, int64_t{15} * 1000000000) << "the grace is 20 s";
  EXPECT_EQ(result.exit_code, 7);
  ASSERT_TRUE(result.failure.has_value());
  EXPECT_EQ(result.failure->rank, 1);
  EXPECT_EQ(result.failure->exit_code, 7);
  EXPECT_THAT(result.failure->last_lines, ElementsAre("line 1", "line 2", "line 3"));
  EXPECT_THAT(describe(result),
              HasSubstr("rank 1 exited with code 7\nits last lines:\n[rank 1] line 1\n"));
  EXPECT_TRUE(result.killed.empty());
}

TEST_F(Launch, KilledRank_IsReportedWithItsSignal) {
  const LaunchResult result =
      run_local(shell("if test $RANK = 2; then kill -KILL $$; fi; sleep 600", 4));
  EXPECT_EQ(result.exit_code, 91);
  ASSERT_TRUE(result.failure.has_value());
  EXPECT_EQ(result.failure->rank, 2);
  EXPECT_EQ(result.failure->signal, SIGKILL);
}

TEST_F(Launch, CascadeSeenFirst_DoesNotHideTheCrash) {
  // Rank 0 reports a lost connection and ends first; rank 1 crashes a moment later.
  const LaunchResult result =
      run_local(shell("if test $RANK = 0; then printf "
                      "'{\"rank\":0,\"class\":\"EnvError\",\"message\":\"lost\",\"exit_code\":91,"
                      "\"monotonic_ns\":1,\"cascade\":true}' > \"$CAPSTAN_ERROR_FILE\"; : > "
                      "$DIR/first; exit 91; fi; "
                      "until test -e $DIR/first; do :; done; kill -SEGV $$",
                      2));
  ASSERT_TRUE(result.failure.has_value());
  EXPECT_EQ(result.failure->rank, 1);
  EXPECT_EQ(result.failure->signal, SIGSEGV);
}

TEST_F(Launch, ErrorFile_GivesClassAndMessage) {
  const LaunchResult result = run_local(shell(
      "if test $RANK = 1; then printf '{\"rank\":1,\"class\":\"DataError\",\"message\":\"bad "
      "shard\",\"exit_code\":94,"
      "\"monotonic_ns\":1,\"cascade\":false}' > \"$CAPSTAN_ERROR_FILE\"; exit 94; fi; sleep 600",
      2));
  EXPECT_EQ(result.exit_code, 94);
  ASSERT_TRUE(result.failure.has_value());
  EXPECT_EQ(result.failure->class_name, "DataError");
  EXPECT_THAT(describe(result), HasSubstr("rank 1 exited with code 94: bad shard"));
}

TEST_F(Launch, IgnoredStop_IsKilledAfterTheGraceWithItsChildren) {
  LocalLaunch launch = shell(
      "if test $RANK = 0; then until test -e $DIR/ready; do sleep 0.01; done; exit 3; fi; "
      "trap '' TERM; sleep 600 & sleep 600 & : > $DIR/ready; wait; wait; sleep 600",
      2);
  launch.crash_grace_s = 0.3;
  const LaunchResult result = run_local(launch);
  EXPECT_EQ(result.exit_code, 3);
  EXPECT_EQ(result.failure->rank, 0) << "the killed rank is not the cause";
  EXPECT_THAT(result.killed, ElementsAre(1));
}

TEST_F(Launch, EarlyZero_IsAFailureUnlessDeclared) {
  const std::string script =
      "if test $RANK = 1; then $DECLARE; exit 0; fi; until test -e $DIR/go; do sleep 0.01; done";
  LocalLaunch launch = shell(script, 2);
  launch.grace_s = 0.2;
  launch.environment["DECLARE"] = "true";
  const LaunchResult result = run_local(launch);
  EXPECT_EQ(result.exit_code, 91);
  ASSERT_TRUE(result.failure.has_value());
  EXPECT_EQ(result.failure->rank, 1);
  EXPECT_THAT(result.failure->reason, HasSubstr("before the run had ended"));

  launch = shell(
      "if test $RANK = 1; then printf '{\"done\":true}' > \"$(dirname "
      "\"$CAPSTAN_ERROR_FILE\")/done\"; exit 0; fi; "
      "sleep 1",
      2);
  launch.grace_s = 0.05;
  EXPECT_EQ(run_local(launch).exit_code, 0);
}

TEST_F(Launch, Signal_IsPassedOnOnceAndPreemptionIsTheResult) {
  const LocalLaunch launch = shell(
      "trap 'echo saved; exit 90' TERM; : > $DIR/ready.$RANK; while :; do sleep 0.01; done", 2);
  const int status = in_launcher(launch, [&](pid_t launcher) {
    ASSERT_TRUE(wait_until([&] { return exists("ready.0") && exists("ready.1"); }));
    ::kill(launcher, SIGTERM);
  });
  EXPECT_EQ(WEXITSTATUS(status), 90);
  EXPECT_EQ(log(0, "stdout.log"), "saved\n");
  EXPECT_EQ(log(1, "stdout.log"), "saved\n");
  EXPECT_EQ(read_file(folder_ / "report"), "");
}

TEST_F(Launch, UserSignals_ArePassedOnWithoutStopping) {
  const LocalLaunch launch = shell(
      "trap ': > $DIR/usr1.$RANK' USR1; trap 'exit 0' USR2; : > $DIR/ready.$RANK; while :; do "
      "sleep 0.01; done",
      2);
  const int status = in_launcher(launch, [&](pid_t launcher) {
    ASSERT_TRUE(wait_until([&] { return exists("ready.0") && exists("ready.1"); }));
    ::kill(launcher, SIGUSR1);
    EXPECT_TRUE(wait_until([&] { return exists("usr1.0") && exists("usr1.1"); }));
    ::kill(launcher, SIGUSR2);
  });
  EXPECT_EQ(status, 0);
}

TEST_F(Launch, SignalWithoutHandler_EndsByThatSignal) {
  // Not SIGINT: a shell catches it and may lose it while it starts a command.
  const LocalLaunch launch = shell(": > $DIR/ready.$RANK; sleep 600", 2);
  const int status = in_launcher(launch, [&](pid_t launcher) {
    ASSERT_TRUE(wait_until([&] { return exists("ready.0") && exists("ready.1"); }));
    ::kill(launcher, SIGTERM);
  });
  EXPECT_EQ(WEXITSTATUS(status), 200 + SIGTERM)
      << "128 + signal, moved into an exit status of the test";
}

TEST_F(Launch, SecondSignal_StopsAtOnce) {
  LocalLaunch launch = shell(
      "trap ': > $DIR/told.$RANK' INT; : > $DIR/ready.$RANK; while :; do sleep 0.01; done", 2);
  launch.grace_s = 600;
  const int status = in_launcher(launch, [&](pid_t launcher) {
    ASSERT_TRUE(wait_until([&] { return exists("ready.0") && exists("ready.1"); }));
    ::kill(launcher, SIGINT);
    EXPECT_TRUE(wait_until([&] { return exists("told.0") && exists("told.1"); }));
    ::kill(launcher, SIGINT);
  });
  EXPECT_EQ(WEXITSTATUS(status), 200 + SIGINT);
  EXPECT_EQ(read_file(folder_ / "report"), "");
}

TEST_F(Launch, IgnoredSignal_IsKilledAfterTheGraceAndReported) {
  LocalLaunch launch = shell("trap '' TERM; : > $DIR/ready.$RANK; while :; do sleep 0.01; done", 2);
  launch.grace_s = 0.3;
  const int status = in_launcher(launch, [&](pid_t launcher) {
    ASSERT_TRUE(wait_until([&] { return exists("ready.0") && exists("ready.1"); }));
    ::kill(launcher, SIGTERM);
  });
  EXPECT_EQ(WEXITSTATUS(status), 91);
  EXPECT_THAT(read_file(folder_ / "report"), HasSubstr("did not stop within the grace"));
}

TEST_F(Launch, StoppedRank_CanStillBeEnded) {
  const LaunchResult result =
      run_local(shell("if test $RANK = 0; then until test \"$(cut -d' ' -f3 /proc/$(cat "
                      "$DIR/pid)/stat 2>/dev/null)\" = T; do :; done; "
                      "exit 5; fi; echo $$ > $DIR/pid; kill -STOP $$; sleep 600",
                      2));
  EXPECT_EQ(result.exit_code, 5);
  EXPECT_TRUE(result.killed.empty()) << "SIGCONT lets the stop signal through";
}

TEST_F(Launch, LauncherKilled_LeavesNoOrphan) {
  // The ranks have children of their own, one of them in the background with its signals ignored.
  const LocalLaunch launch =
      shell("trap '' TERM HUP; sleep 600 & : > $DIR/ready.$RANK; sleep 600; true", 3);
  const int status = in_launcher(launch, [&](pid_t launcher) {
    ASSERT_TRUE(
        wait_until([&] { return exists("ready.0") && exists("ready.1") && exists("ready.2"); }));
    EXPECT_TRUE(wait_until([&] { return processes_with(marker()).size() >= 9; }));
    ::kill(launcher, SIGKILL);
    EXPECT_TRUE(wait_until([&] { return processes_with(marker()).empty(); }));
  });
  EXPECT_EQ(WTERMSIG(status), SIGKILL);
}

TEST_F(Launch, ChildrenOfARank_EndWithIt) {
  const LaunchResult result = run_local(shell("sleep 600 & setsid sleep 0; exit 0", 2));
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_TRUE(processes_with(marker()).empty());
}

TEST_F(Launch, Tee_CopiesRankZeroWhole) {
  int out[2];
  ASSERT_EQ(::pipe2(out, O_CLOEXEC), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    ::dup2(out[1], STDOUT_FILENO);
    LocalLaunch launch =
        shell("i=0; while test $i -lt 5000; do echo rank $RANK line $i; i=$((i+1)); done", 2);
    launch.tee_rank0 = true;
    ::_exit(run_local(launch).exit_code);
  }
  ::close(out[1]);
  std::string seen;
  std::array<char, 4096> buffer;
  ssize_t got = 0;
  while ((got = ::read(out[0], buffer.data(), buffer.size())) > 0)
    seen.append(buffer.data(), static_cast<size_t>(got));
  ::close(out[0]);
  int status = -1;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(seen, log(0, "stdout.log"));
  EXPECT_THAT(seen, HasSubstr("rank 0 line 4999\n"));
  EXPECT_THAT(seen, testing::Not(HasSubstr("rank 1")));
  EXPECT_THAT(log(1, "stdout.log"), HasSubstr("rank 1 line 4999\n"));
}

TEST_F(Launch, Logs_StayBelowTheirLimit) {
  LocalLaunch launch = shell(
      "i=0; while test $i -lt 20000; do echo rank $RANK line $i; i=$((i+1)); done; exit 7", 2);
  launch.log_limit_bytes = 32 << 10;
  const LaunchResult result = run_local(launch);
  EXPECT_EQ(result.exit_code, 7);
  ASSERT_TRUE(result.failure.has_value());
  ASSERT_EQ(result.failure->last_lines.size(), 20U);
  for (int rank = 0; rank < 2; ++rank) {
    if (rank != result.failure->rank) continue;  // the other may have been stopped at any line
    const std::string name = "rank " + std::to_string(rank) + " line ";
    EXPECT_EQ(result.failure->last_lines.back(), name + "19999");
    EXPECT_THAT(log(rank, "stdout.log"), testing::StartsWith(name + "0\n"));
    EXPECT_THAT(log(rank, "stdout.newest.log"), testing::EndsWith(name + "19999\n"));
    const std::string all =
        log(rank, "stdout.log") + log(rank, "stdout.newest.log") + log(rank, "stdout.newest.log.1");
    EXPECT_LE(all.size(), (32U << 10) + 64);
  }
  launch.log_limit_bytes = 100;
  EXPECT_THROW((void)run_local(launch), ConfigError);
}

TEST_F(Launch, ClosedConsole_StopsNobody) {
  int out[2];
  ASSERT_EQ(::pipe2(out, O_CLOEXEC), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    ::dup2(out[1], STDOUT_FILENO);
    ::close(out[0]);
    ::close(out[1]);
    LocalLaunch launch = shell("i=0; while test $i -lt 3000; do echo line $i; i=$((i+1)); done", 1);
    launch.tee_rank0 = true;
    ::_exit(run_local(launch).exit_code);
  }
  ::close(out[0]);
  ::close(out[1]);
  int status = -1;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_THAT(log(0, "stdout.log"), HasSubstr("line 2999\n"));
}

TEST_F(Launch, BadLaunches_AreRefused) {
  LocalLaunch launch = shell("true", 1);
  launch.command = {};
  EXPECT_THROW((void)run_local(launch), ConfigError);
  EXPECT_THROW((void)run_local(shell("true", 0)), ConfigError);
  launch = shell("true", 1);
  launch.master_addr = "no.such.name";
  EXPECT_THROW((void)run_local(launch), ConfigError);
  launch = shell("true", 2);
  launch.command = {"capstan-no-such-program"};
  try {
    (void)run_local(launch);
    FAIL();
  } catch (const EnvError& error) {
    EXPECT_THAT(
        error.what(),
        HasSubstr("starting rank 0 with 'capstan-no-such-program' failed: got No such file"));
  }
  ::setenv("CAPSTAN_RANK", "1", 1);
  launch = shell("true", 1);
  launch.allow_nested = false;
  EXPECT_THROW((void)run_local(launch), ConfigError);
  ::unsetenv("CAPSTAN_RANK");
}

TEST_F(Launch, Handlers_AreGivenBack) {
  ::signal(SIGHUP, SIG_IGN);
  struct sigaction before = {}, during = {}, after = {};
  ::sigaction(SIGTERM, nullptr, &before);
  EXPECT_EQ(run_local(shell("grep -q '^SigIgn:.*1$' /proc/self/status", 1)).exit_code, 0)
      << "nohup reaches the ranks";
  ::sigaction(SIGTERM, nullptr, &after);
  ::sigaction(SIGHUP, nullptr, &during);
  EXPECT_EQ(before.sa_handler, after.sa_handler);
  EXPECT_EQ(during.sa_handler, SIG_IGN);
  ::signal(SIGHUP, SIG_DFL);
  int subreaper = 1;
  ::prctl(PR_GET_CHILD_SUBREAPER, &subreaper);
  EXPECT_EQ(subreaper, 0);
}

}  // namespace
}  // namespace capstan::launch
