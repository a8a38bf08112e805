// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/gloo_job_internal.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "capstan/base/env.h"
#include "capstan/base/log.h"

namespace capstan::comm {
namespace {

using Json = nlohmann::json;

constexpr const char* kFailureKey = "capstan/failure";
constexpr const char* kAskedKey = "capstan/asked";
constexpr double kReportSeconds = 2;  // time that ranks get to answer

std::string status_key(int64_t question, int rank) {
  return fmt::format("capstan/status/{}/{}", question, rank);
}

std::string dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// Reads what another rank published; an unreadable answer counts as none.
std::optional<Json> read_status(const std::optional<std::string>& text) {
  if (!text) return std::nullopt;
  Json json = Json::parse(*text, nullptr, false);
  if (!json.is_object() || !json.contains("last") || !json.contains("counters"))
    return std::nullopt;
  return json;
}

// Turns the published counters into who waits for whom.
std::map<int, RankStatus> statuses_of(const std::map<int, Json>& answers, int size) {
  std::map<int, RankStatus> statuses;
  for (int rank = 0; rank < size; ++rank) {
    const auto found = answers.find(rank);
    RankStatus& status = statuses[rank];
    status.answered = found != answers.end();
    if (!status.answered) continue;
    status.last = found->second.value("last", "none");
    if (!found->second.contains("waits")) continue;
    const Json& wait = found->second["waits"];
    status.waits_in = wait.value("title", "an operation");
    const auto sequence = wait.value("sequence", int64_t{0});
    for (const auto& [peer_text, counter] : wait.at("counters").items()) {
      const int peer = std::stoi(peer_text);
      const auto answer = answers.find(peer);
      const bool came =
          answer != answers.end() &&
          answer->second.at("counters").value(counter.get<std::string>(), int64_t{0}) > sequence;
      if (!came && peer != rank) status.waits_for.push_back(peer);
    }
    std::sort(status.waits_for.begin(), status.waits_for.end());
  }
  return statuses;
}

}  // namespace

GlooJob::GlooJob(Stores stores, NetworkDevice device, std::shared_ptr<RankState> state, int size)
    : stores_(std::move(stores)),
      device_(std::move(device)),
      state_(std::move(state)),
      size_(size) {
  watcher_ = std::thread([this] { watch(); });
}

GlooJob::~GlooJob() { stop_watching(); }

void GlooJob::stop_watching() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  stop_changed_.notify_all();
  if (watcher_.joinable()) watcher_.join();
}

void GlooJob::watch() {
  log::set_thread_rank(state_->rank);
  // Four questions a second per rank at a thousand ranks are what one store serves with ease.
  const auto period = std::chrono::milliseconds(std::max(100, size_ / 4));
  int64_t answered = 0;
  std::unique_lock lock(mutex_);
  while (!stop_changed_.wait_for(lock, period, [this] { return stop_; })) {
    lock.unlock();
    try {
      if (const auto failure = stores_.watcher->try_get(kFailureKey)) abort_here(*failure);
      answer_questions(answered);
    } catch (const std::exception& e) {
      abort_here(fmt::format("the store of rank 0 is gone: {}", e.what()));
      return;
    }
    lock.lock();
  }
}

void GlooJob::answer_questions(int64_t& answered) {
  const auto asked_text = stores_.watcher->try_get(kAskedKey);
  const int64_t asked = asked_text ? std::stoll(*asked_text) : 0;
  for (; answered < asked; ++answered)
    stores_.watcher->set(status_key(answered + 1, state_->rank), own_status());
}

std::string GlooJob::own_status() const {
  Json json;
  json["last"] = state_->recorder.open_text();
  std::lock_guard lock(mutex_);
  json["counters"] = counters_;
  if (!waits_.empty()) {
    const WaitNote& note = waits_.begin()->second.note;  // the oldest one is what holds the rank up
    Json counters = Json::object();
    for (const auto& [rank, counter] : note.counters) counters[std::to_string(rank)] = counter;
    json["waits"] = {
        {"title", note.title}, {"sequence", note.sequence}, {"counters", std::move(counters)}};
  }
  return dump(json);
}

std::map<int, RankStatus> GlooJob::ask_all_ranks() {
  std::map<int, Json> answers;
  answers[state_->rank] = Json::parse(own_status());
  const int64_t question = store().add(kAskedKey, 1);
  const int64_t end = monotonic_ns() + static_cast<int64_t>(kReportSeconds * 1e9);
  while (static_cast<int>(answers.size()) < size_ && monotonic_ns() < end) {
    for (int rank = 0; rank < size_; ++rank) {
      if (answers.count(rank) != 0) continue;
      if (auto status = read_status(store().try_get(status_key(question, rank))))
        answers[rank] = std::move(*status);
    }
    if (static_cast<int>(answers.size()) < size_)
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return statuses_of(answers, size_);
}

std::optional<std::string> GlooJob::failure_elsewhere(double patience_s) {
  const int64_t end = monotonic_ns() + static_cast<int64_t>(patience_s * 1e9);
  for (;;) {
    {
      std::lock_guard lock(mutex_);
      if (aborted_) return reason_;
    }
    if (auto failure = store().try_get(kFailureKey)) return failure;
    if (monotonic_ns() >= end) return std::nullopt;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

std::exception_ptr GlooJob::fail(const WaitFailure& failure, const WaitNote& note) {
  const auto elsewhere = [&](const std::string& reason) {
    abort_here(reason);
    return std::make_exception_ptr(aborted_error(failure.title));
  };
  ErrorText text{.module = "comm", .what = "waiting in " + failure.title, .got = failure.got};
  try {
    // A rank that fails says so before it closes its connections; one that dies cannot.
    if (const auto reason = failure_elsewhere(failure.deadline_passed ? 0 : 0.5))
      return elsewhere(*reason);
    auto statuses = ask_all_ranks();
    if (const auto reason = failure_elsewhere(0)) return elsewhere(*reason);
    RankStatus& own = statuses[state_->rank];
    if (own.waits_in !=
        note.title) {  // nobody waits for the operation yet, but it is the one that failed
      own.waits_in = note.title;
      own.waits_for.clear();
      for (const auto& [rank, counter] : note.counters)
        if (rank != state_->rank && !statuses[rank].answered) own.waits_for.push_back(rank);
    }
    const ErrorText report = explain_deadline(state_->rank, state_->timeout_s, statuses);
    if (failure.deadline_passed) {
      text = report;
    } else {
      text.why = report.why;
      text.fix = failure.fix;
    }
  } catch (const std::exception& e) {
    text.why = e.what();
  }
  abort(format_error(text));
  return std::make_exception_ptr(EnvError(text));
}

void GlooJob::abort(const std::string& reason) noexcept {
  std::string first = fmt::format("rank {} failed first: {}", state_->rank, reason);
  try {
    if (!aborted_) first = store().set_once(kFailureKey, first);
  } catch (const std::exception& e) {
    log::debug("comm", "telling the other ranks of the failure: {}", e.what());
  }
  abort_here(first);
}

void GlooJob::abort_here(const std::string& reason) noexcept {
  std::vector<std::weak_ptr<GlooTransport>> transports;
  {
    std::lock_guard lock(mutex_);
    if (aborted_) return;
    reason_ = reason;
    aborted_ = true;
    transports = transports_;
    // Called in place: a copy that outlives its waiter would end this job in its own watcher
    // thread.
    for (const auto& [id, wait] : waits_) wait.wake();
  }
  for (const auto& weak : transports)
    if (const auto transport = weak.lock()) transport->close_connections();
}

AbortedError GlooJob::aborted_error(const std::string& where) const {
  std::lock_guard lock(mutex_);
  return AbortedError(ErrorText{.module = "comm",
                                .what = "waiting in " + where,
                                .got = "the end of the job",
                                .why = reason_});
}

void GlooJob::count(const std::string& counter) {
  std::lock_guard lock(mutex_);
  ++counters_[counter];
}

int64_t GlooJob::note_wait(WaitNote note, std::function<void()> wake) {
  std::lock_guard lock(mutex_);
  waits_.emplace(next_wait_, Wait{std::move(note), std::move(wake)});
  return next_wait_++;
}

void GlooJob::clear_wait(int64_t id) {
  std::lock_guard lock(mutex_);
  waits_.erase(id);
}

void GlooJob::add_transport(const std::shared_ptr<GlooTransport>& transport) {
  std::lock_guard lock(mutex_);
  std::erase_if(transports_, [](const auto& weak) { return weak.expired(); });
  transports_.push_back(transport);
}

}  // namespace capstan::comm
