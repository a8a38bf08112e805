// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/run_processes.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <system_error>
#include <utility>

#include "support/temp_dir.h"

extern char** environ;

namespace capstan::test {
namespace {

using Clock = std::chrono::steady_clock;

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

class Descriptor {
 public:
  explicit Descriptor(int value = -1) : value_(value) {}
  Descriptor(Descriptor&& other) noexcept : value_(std::exchange(other.value_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  ~Descriptor() { close(); }
  void close() {
    if (value_ >= 0) ::close(std::exchange(value_, -1));
  }
  [[nodiscard]] int get() const { return value_; }

 private:
  int value_;
};

struct Listener {
  Descriptor descriptor;
  int port = 0;
};

Listener open_listener() {
  Listener listener{Descriptor(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0))};
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  auto* plain = reinterpret_cast<sockaddr*>(&address);
  socklen_t length = sizeof(address);
  if (listener.descriptor.get() < 0 || ::bind(listener.descriptor.get(), plain, length) != 0 ||
      ::listen(listener.descriptor.get(), 128) != 0 ||
      ::getsockname(listener.descriptor.get(), plain, &length) != 0)
    fail("opening a listening socket");
  listener.port = ntohs(address.sin_port);
  return listener;
}

struct Child {
  pid_t pid = -1;
  Descriptor out, err;
  bool is_running = true;
  ProcessResult result;
};

std::vector<std::string> environment_of(int rank, int n, const Listener& listener,
                                        const ProcessOptions& options) {
  std::map<std::string, std::string> env;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    const auto equals = text.find('=');
    env[text.substr(0, equals)] = equals == std::string::npos ? "" : text.substr(equals + 1);
  }
  if (options.set_rank_env) {
    env["RANK"] = env["LOCAL_RANK"] = std::to_string(rank);
    env["WORLD_SIZE"] = env["LOCAL_WORLD_SIZE"] = std::to_string(n);
    env["MASTER_ADDR"] = "127.0.0.1";
    env["MASTER_PORT"] = std::to_string(listener.port);
    if (rank == 0) env["CAPSTAN_STORE_FD"] = std::to_string(listener.descriptor.get());
    env["OMP_NUM_THREADS"] = "1";
  }
  for (const auto& [name, value] : options.env) env[name] = value;
  std::vector<std::string> lines;
  for (const auto& [name, value] : env) lines.push_back(name + "=" + value);
  return lines;
}

std::vector<char*> pointers_of(std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  for (auto& text : texts) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

struct Program {
  std::vector<char*> argv, envp;
  int out, err;
  int kept;  // descriptor that stays open, or -1
  const char* directory;
};

// Runs in the child: only async-signal-safe calls.
[[noreturn]] void become(const Program& program) {
  ::setpgid(0, 0);
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  ::dup2(program.out, STDOUT_FILENO);
  ::dup2(program.err, STDERR_FILENO);
  if (program.kept >= 0) ::fcntl(program.kept, F_SETFD, 0);
  if (::chdir(program.directory) != 0) ::_exit(126);
  ::execvpe(program.argv[0], program.argv.data(), program.envp.data());
  const char* reason = std::strerror(errno);
  (void)!::write(STDERR_FILENO, reason, std::strlen(reason));
  ::_exit(127);
}

std::string replace_rank(std::string text, int rank) {
  for (size_t at = text.find("{rank}"); at != std::string::npos; at = text.find("{rank}", at))
    text.replace(at, 6, std::to_string(rank));
  return text;
}

struct Job {
  std::string program, directory;
  const std::vector<std::string>& args;
  const ProcessOptions& options;
  const Listener& listener;
  int size;
};

Child start(const Job& job, int rank) {
  int out[2], err[2];
  if (::pipe2(out, O_CLOEXEC) != 0 || ::pipe2(err, O_CLOEXEC) != 0) fail("making a pipe");
  Child child;
  child.out = Descriptor(out[0]);
  child.err = Descriptor(err[0]);
  const Descriptor out_end(out[1]), err_end(err[1]);
  std::vector<std::string> args{job.program};
  for (const auto& arg : job.args) args.push_back(replace_rank(arg, rank));
  auto env = environment_of(rank, job.size, job.listener, job.options);
  const bool keeps = rank == 0 && job.options.set_rank_env;
  const Program program{.argv = pointers_of(args),
                        .envp = pointers_of(env),
                        .out = out_end.get(),
                        .err = err_end.get(),
                        .kept = keeps ? job.listener.descriptor.get() : -1,
                        .directory = job.directory.c_str()};
  child.pid = ::fork();
  if (child.pid < 0) fail("starting a process");
  if (child.pid == 0) become(program);
  ::setpgid(child.pid, child.pid);  // on both sides: whoever comes first
  return child;
}

// Appends what there is to read; closes the descriptor at its end.
void drain(Descriptor& from, std::string& to) {
  char buffer[65536];
  const ssize_t got = ::read(from.get(), buffer, sizeof(buffer));
  if (got > 0)
    to.append(buffer, static_cast<size_t>(got));
  else if (got == 0 || errno != EINTR)
    from.close();
}

void read_output(std::vector<Child>& children, int milliseconds) {
  std::vector<pollfd> polls;
  std::vector<std::pair<Descriptor*, std::string*>> targets;
  for (auto& child : children)
    for (auto [from, to] :
         {std::pair(&child.out, &child.result.out), std::pair(&child.err, &child.result.err)})
      if (from->get() >= 0) {
        polls.push_back({.fd = from->get(), .events = POLLIN, .revents = 0});
        targets.emplace_back(from, to);
      }
  if (::poll(polls.data(), polls.size(), milliseconds) <= 0) return;
  for (size_t i = 0; i < polls.size(); ++i)
    if (polls[i].revents != 0) drain(*targets[i].first, *targets[i].second);
}

// True when the child has just ended.
bool reap(Child& child) {
  int status = 0;
  if (!child.is_running || ::waitpid(child.pid, &status, WNOHANG) != child.pid) return false;
  child.is_running = false;
  if (WIFEXITED(status)) child.result.exit_code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) child.result.signal = WTERMSIG(status);
  return true;
}

void signal_running(const std::vector<Child>& children, int signal) {
  for (const auto& child : children)
    if (child.is_running) ::kill(-child.pid, signal);
}

// Children of this process that are left once the ranks have ended: the orphans of the ranks, which
// come to us as their subreaper. They get the seconds that a supervisor's children may take to
// notice its end.
std::vector<pid_t> reap_orphans() {
  const auto end = Clock::now() + std::chrono::seconds(10);
  for (;;) {
    const pid_t ended = ::waitpid(-1, nullptr, WNOHANG);
    if (ended < 0) return {};
    if (ended > 0) continue;
    if (Clock::now() > end) break;
    ::usleep(20000);
  }
  std::vector<pid_t> orphans;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::ifstream children(task.path() / "children");
    for (pid_t pid = 0; children >> pid;) orphans.push_back(pid);
  }
  for (const pid_t pid : orphans) ::kill(pid, SIGKILL);
  for (const pid_t pid : orphans) ::waitpid(pid, nullptr, 0);
  return orphans;
}

}  // namespace

std::string ProcessResult::text() const {
  const std::string end =
      signal != 0 ? fmt::format("signal {}", signal) : fmt::format("exit code {}", exit_code);
  return fmt::format("{}\n--- out\n{}\n--- err\n{}", end, out, err);
}

bool ProcessResults::all_succeeded() const {
  return !timed_out && survivors.empty() &&
         std::all_of(ranks.begin(), ranks.end(),
                     [](const auto& rank) { return rank.exit_code == 0; });
}

std::string ProcessResults::text() const {
  std::string text = timed_out ? "timed out\n" : "";
  if (!survivors.empty())
    text += fmt::format("{} processes survived their rank\n", survivors.size());
  for (size_t rank = 0; rank < ranks.size(); ++rank)
    text += fmt::format("=== rank {}: {}\n", rank, ranks[rank].text());
  return text;
}

ProcessResults run_processes(int n, const std::vector<std::string>& args,
                             const ProcessOptions& options) {
  const char* default_program = std::getenv("CAPSTAN_RUN");
  const TempDir folder("processes");
  Listener listener = open_listener();
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  const Job job{.program = !options.program.empty()     ? options.program
                           : default_program != nullptr ? default_program
                                                        : "capstan",
                .directory = options.directory.empty() ? folder.path().string() : options.directory,
                .args = args,
                .options = options,
                .listener = listener,
                .size = n};
  std::vector<Child> children;
  for (int rank = 0; rank < n; ++rank) {
    children.push_back(start(job, rank));
    listener.descriptor.close();  // rank 0's alone, so that its end refuses connections
  }
  ProcessResults results;
  const auto end = Clock::now() + std::chrono::duration<double>(options.deadline_s);
  const auto is_running = [](const Child& child) { return child.is_running; };
  while (std::any_of(children.begin(), children.end(), is_running)) {
    read_output(children, 20);
    for (auto& child : children)
      if (reap(child) && child.result.exit_code != 0 && options.one_fails_all_end)
        signal_running(children, SIGTERM);
    if (Clock::now() > end && !std::exchange(results.timed_out, true))
      signal_running(children, SIGKILL);
  }
  results.survivors = reap_orphans();
  for (int rounds = 0; rounds < 50; ++rounds) read_output(children, 0);
  for (auto& child : children) results.ranks.push_back(std::move(child.result));
  return results;
}

}  // namespace capstan::test
