// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/store_internal.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "capstan/base/env.h"

namespace capstan::comm {
namespace {

std::vector<uint8_t> bytes_of(const std::string& text) { return {text.begin(), text.end()}; }
std::string text_of(const std::vector<uint8_t>& bytes) { return {bytes.begin(), bytes.end()}; }

// c10d's messages carry a C++ stack; people need the first line.
std::string first_line(const char* text) {
  const std::string whole = text;
  return whole.substr(0, whole.find('\n'));
}

template <class Call>
auto reach(const char* what, Call&& call) {
  try {
    return call();
  } catch (const std::exception& e) {
    throw EnvError(ErrorText{.module = "comm",
                             .what = fmt::format("{} in the store of rank 0", what),
                             .got = first_line(e.what()),
                             .why = "rank 0 has ended, or the network to it failed"});
  }
}

int bound_port(int descriptor) {
  sockaddr_storage address{};
  socklen_t length = sizeof(address);
  if (::getsockname(descriptor, reinterpret_cast<sockaddr*>(&address), &length) != 0) return -1;
  if (address.ss_family == AF_INET)
    return ntohs(reinterpret_cast<sockaddr_in*>(&address)->sin_port);
  if (address.ss_family == AF_INET6)
    return ntohs(reinterpret_cast<sockaddr_in6*>(&address)->sin6_port);
  return -1;
}

void check_descriptor(int descriptor, int port) {
  const int bound = bound_port(descriptor);
  if (bound == port) {
    ::fcntl(descriptor, F_SETFD, FD_CLOEXEC);  // ours alone from here on
    return;
  }
  throw EnvError(ErrorText{
      .module = "comm",
      .what = "taking over the socket of CAPSTAN_STORE_FD",
      .got = bound < 0 ? fmt::format("descriptor {}, which is no network socket", descriptor)
                       : fmt::format("a socket bound to port {}", bound),
      .need = fmt::format("one that listens on MASTER_PORT {}", port)});
}

c10::intrusive_ptr<c10d::Store> connect(const RankEnv& env, double timeout_s, bool serve) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<std::uint16_t>(env.master_port);
  options.isServer = serve;
  options.waitWorkers = false;
  options.timeout = std::chrono::milliseconds(static_cast<int64_t>(timeout_s * 1000));
  if (serve && env.store_descriptor) {
    check_descriptor(*env.store_descriptor, env.master_port);
    options.masterListenFd = *env.store_descriptor;
  }
  try {
    return c10::make_intrusive<c10d::TCPStore>(env.master_addr, options);
  } catch (const std::exception& e) {
    throw EnvError(ErrorText{
        .module = "comm",
        .what = fmt::format("{} the store at {}:{}", serve ? "opening" : "reaching",
                            env.master_addr, env.master_port),
        .got = first_line(e.what()),
        .need = serve ? "a free port" : "rank 0 listening there",
        .fix = serve ? "Give another MASTER_PORT, or end the program that uses it"
                     : "Check MASTER_ADDR and MASTER_PORT, and whether rank 0 has started"});
  }
}

}  // namespace

struct KeyStore::State {
  c10::intrusive_ptr<c10d::Store> store;
};

KeyStore::KeyStore(std::unique_ptr<State> state) : state_(std::move(state)) {}
KeyStore::~KeyStore() = default;

std::shared_ptr<KeyStore> KeyStore::of_job(const RankEnv& env, double timeout_s) {
  return std::shared_ptr<KeyStore>(
      new KeyStore(std::make_unique<State>(State{connect(env, timeout_s, env.rank == 0)})));
}

std::shared_ptr<KeyStore> KeyStore::client_of(const RankEnv& env, double timeout_s) {
  return std::shared_ptr<KeyStore>(
      new KeyStore(std::make_unique<State>(State{connect(env, timeout_s, false)})));
}

std::shared_ptr<KeyStore> KeyStore::in_process() {
  return std::shared_ptr<KeyStore>(
      new KeyStore(std::make_unique<State>(State{c10::make_intrusive<c10d::HashStore>()})));
}

void KeyStore::set(const std::string& key, const std::string& value) {
  reach("writing", [&] { state_->store->set(key, bytes_of(value)); });
}

std::optional<std::string> KeyStore::try_get(const std::string& key) {
  return reach("reading", [&]() -> std::optional<std::string> {
    if (!state_->store->check({key})) return std::nullopt;
    return text_of(state_->store->get(key));
  });
}

int64_t KeyStore::add(const std::string& key, int64_t value) {
  return reach("counting", [&] { return state_->store->add(key, value); });
}

std::string KeyStore::set_once(const std::string& key, const std::string& value) {
  return reach("writing",
               [&] { return text_of(state_->store->compareSet(key, {}, bytes_of(value))); });
}

c10d::Store& KeyStore::c10d_store() { return *state_->store; }

namespace {

std::string missing_ranks(KeyStore& store, int size) {
  constexpr size_t kShown = 32;
  std::vector<std::string> names;
  for (int r = 0; r < size && names.size() <= kShown; ++r)
    if (!store.try_get(fmt::format("capstan/joined/{}", r))) names.push_back(std::to_string(r));
  if (names.size() > kShown) names.back() = "...";
  return fmt::format("{}", fmt::join(names, ", "));
}

void check_same_job(KeyStore& store, int rank, int size) {
  const std::string mine = std::to_string(size), theirs = store.set_once("capstan/size", mine);
  if (theirs != mine)
    throw EnvError(ErrorText{
        .module = "comm",
        .what = fmt::format("joining the job as rank {}", rank),
        .got = "WORLD_SIZE " + mine,
        .need = theirs + ", as another rank has it",
        .why =
            "two jobs share MASTER_ADDR and MASTER_PORT, or the ranks were started differently"});
  if (store.add(fmt::format("capstan/joined/{}", rank), 1) > 1)
    throw EnvError(ErrorText{
        .module = "comm",
        .what = fmt::format("joining the job as rank {}", rank),
        .got = "a second process of that rank",
        .need = "one process per rank",
        .why = "two jobs share MASTER_ADDR and MASTER_PORT, or a rank was started twice"});
}

}  // namespace

void meet_all_ranks(KeyStore& store, int rank, int size, double timeout_s) {
  check_same_job(store, rank, size);
  // The one who completes the count opens the door, so that waiting costs each rank one key.
  if (store.add("capstan/joined", 1) == size) store.set("capstan/complete", "yes");
  const int64_t end = monotonic_ns() + static_cast<int64_t>(timeout_s * 1e9);
  auto pause = std::chrono::milliseconds(1);
  while (!store.try_get("capstan/complete")) {
    if (monotonic_ns() > end)
      throw EnvError(ErrorText{
          .module = "comm",
          .what = fmt::format("meeting the {} ranks of the job", size),
          .got = "no sign of ranks " + missing_ranks(store, size) +
                 fmt::format(" within {:g} s", timeout_s),
          .need = "every rank",
          .fix =
              "Look at the output of these ranks first; raise the timeout if they were only slow"});
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, std::chrono::milliseconds(100));
  }
}

}  // namespace capstan::comm
