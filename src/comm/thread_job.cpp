// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/thread_job_internal.h"

#include <fmt/format.h>

#include <chrono>

#include "capstan/base/trace.h"

namespace capstan::comm {
namespace {

using Clock = std::chrono::steady_clock;

class ThreadWork final : public WorkState {
 public:
  ThreadWork(std::shared_ptr<ThreadJob> job, std::shared_ptr<Meeting> meeting, int rank,
             int64_t flight)
      : job_(std::move(job)), meeting_(std::move(meeting)), rank_(rank), flight_(flight) {}
  ~ThreadWork() override { close(meeting_->is_done()); }

  void wait() override {
    if (!meeting_->is_done()) {
      std::optional<trace::Span> span;
      if (trace::is_on()) span.emplace("comm", "wait " + meeting_->title());
      job_->note_wait(rank_, meeting_);
      block();
      job_->clear_wait(rank_);
    }
    close(true);
  }
  [[nodiscard]] bool is_done() const override { return meeting_->is_done() || job_->is_aborted(); }

 private:
  void block() {
    const double timeout_s = job_->rank_state(rank_)->timeout_s;
    const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                        std::chrono::duration<double>(timeout_s));
    bool helped = false;
    std::unique_lock lock(meeting_->mutex);
    while (!meeting_->is_done()) {
      if (meeting_->is_ready() && !std::exchange(helped, true)) {
        lock.unlock();
        meeting_->help();
        lock.lock();
        continue;
      }
      if (!meeting_->is_ready()) {
        if (job_->is_aborted()) throw job_->aborted_error(meeting_->title());
        if (Clock::now() >= end) {
          lock.unlock();
          give_up();
        }
      }
      // Wakes by itself now and then as well, so that no lost notification can ever hang a rank.
      meeting_->changed.wait_until(lock, std::min(end, Clock::now() + std::chrono::seconds(1)));
    }
  }

  [[noreturn]] void give_up() {
    const ErrorText text = job_->explain(rank_);
    if (job_->is_aborted()) throw job_->aborted_error(meeting_->title());
    job_->abort(rank_, format_error(text));
    throw EnvError(text);
  }

  void close(bool ok) {
    if (flight_ >= 0) job_->rank_state(rank_)->recorder.end(std::exchange(flight_, -1), ok);
  }

  std::shared_ptr<ThreadJob> job_;
  std::shared_ptr<Meeting> meeting_;
  int rank_;
  int64_t flight_;
};

}  // namespace

ThreadJob::ThreadJob(int size, double timeout_s)
    : waits_(static_cast<size_t>(size)),
      notes_(static_cast<size_t>(size)),
      counters_(static_cast<size_t>(size)),
      ended_(static_cast<size_t>(size)) {
  for (int r = 0; r < size; ++r) states_.push_back(std::make_shared<RankState>(r, timeout_s));
}

void ThreadJob::abort(int rank, const std::string& reason) noexcept {
  std::vector<std::shared_ptr<Meeting>> waits;
  std::vector<std::function<void()>> wakes;
  {
    std::lock_guard lock(mutex_);
    if (aborted_.load()) return;
    abort_rank_ = rank;
    reason_ = reason;
    aborted_.store(true, std::memory_order_release);
    waits = waits_;
    for (const auto& notes : notes_)
      for (const auto& [id, note] : notes) wakes.push_back(note.wake);
  }
  for (const auto& meeting : waits)
    if (meeting) meeting->wake();
  for (const auto& wake : wakes) wake();
}

AbortedError ThreadJob::aborted_error(const std::string& where) const {
  std::lock_guard lock(mutex_);
  return AbortedError(
      ErrorText{.module = "comm",
                .what = "waiting in " + where,
                .got = "the end of the job",
                .why = fmt::format("rank {} failed first: {}", abort_rank_, reason_)});
}

void ThreadJob::record_failure(Failure failure) {
  abort(failure.rank, failure.text);
  std::lock_guard lock(mutex_);
  failures_.push_back(std::move(failure));
}

void ThreadJob::record_end(int rank) {
  std::lock_guard lock(mutex_);
  ended_[static_cast<size_t>(rank)] = true;
}

std::optional<ThreadJob::Failure> ThreadJob::first_failure() const {
  std::lock_guard lock(mutex_);
  if (failures_.empty()) return std::nullopt;
  const Failure* best = &failures_.front();
  // A root cause before a consequence, the rank that ended the job before the others, else the
  // first that came.
  const auto weight = [this](const Failure& failure) {
    return (failure.is_consequence ? 0 : 2) + (failure.rank == abort_rank_ ? 1 : 0);
  };
  for (const Failure& failure : failures_)
    if (weight(failure) > weight(*best)) best = &failure;
  return *best;
}

void ThreadJob::note_wait(int rank, std::shared_ptr<Meeting> meeting) {
  std::lock_guard lock(mutex_);
  waits_[static_cast<size_t>(rank)] = std::move(meeting);
}

void ThreadJob::clear_wait(int rank) {
  std::lock_guard lock(mutex_);
  waits_[static_cast<size_t>(rank)] = nullptr;
}

void ThreadJob::count(int rank, const std::string& counter) {
  std::lock_guard lock(mutex_);
  ++counters_[static_cast<size_t>(rank)][counter];
}

int64_t ThreadJob::note_wait(int rank, WaitNote note, std::function<void()> wake) {
  std::lock_guard lock(mutex_);
  notes_[static_cast<size_t>(rank)].emplace(next_note_, Note{std::move(note), std::move(wake)});
  return next_note_++;
}

void ThreadJob::clear_wait(int rank, int64_t id) {
  std::lock_guard lock(mutex_);
  notes_[static_cast<size_t>(rank)].erase(id);
}

std::vector<int> ThreadJob::missing_of(int rank, const WaitNote& note) const {
  std::vector<int> missing;
  for (const auto& [peer, counter] : note.counters) {
    const auto& counters = counters_[static_cast<size_t>(peer)];
    const auto found = counters.find(counter);
    if (peer != rank && (found == counters.end() || found->second <= note.sequence))
      missing.push_back(peer);
  }
  return missing;
}

ErrorText ThreadJob::explain(int rank, const WaitNote* failing) const {
  std::vector<std::shared_ptr<Meeting>> waits;
  std::vector<bool> ended;
  std::map<int, RankStatus> statuses;
  {
    std::lock_guard lock(mutex_);
    waits = waits_;
    ended = ended_;
    for (size_t r = 0; r < notes_.size(); ++r) {
      const auto at = static_cast<int>(r);
      const WaitNote* note = at == rank && failing ? failing : nullptr;
      if (!note && !notes_[r].empty()) note = &notes_[r].begin()->second.note;
      if (note)
        statuses[at] = {.waits_in = note->title, .waits_for = missing_of(at, *note), .last = ""};
    }
    if (failing) waits[static_cast<size_t>(rank)] = nullptr;
  }
  for (size_t r = 0; r < waits.size(); ++r) {
    RankStatus& status = statuses[static_cast<int>(r)];
    status.last = states_[r]->recorder.open_text();
    if (ended[r]) status.last += "; its thread has ended";
    if (!waits[r] || waits[r]->is_done()) continue;  // else what its note says, if it has one
    status.waits_in = waits[r]->title();
    status.waits_for = waits[r]->missing();
  }
  return explain_deadline(rank, states_[static_cast<size_t>(rank)]->timeout_s, statuses);
}

std::exception_ptr ThreadWaitBook::fail(const WaitFailure& failure, const WaitNote& note) {
  const auto cause = [&] { return std::make_exception_ptr(job_->aborted_error(failure.title)); };
  if (job_->is_aborted()) return cause();
  const ErrorText report = job_->explain(rank_, &note);
  const ErrorText text = failure.deadline_passed ? report
                                                 : ErrorText{.module = "comm",
                                                             .what = "waiting in " + failure.title,
                                                             .got = failure.got,
                                                             .why = report.why,
                                                             .fix = failure.fix};
  if (job_->is_aborted()) return cause();
  job_->abort(rank_, format_error(text));
  return std::make_exception_ptr(EnvError(text));
}

std::shared_ptr<Meeting> ThreadGroup::find_or_open(const Key& key,
                                                   const std::vector<int>& world_ranks) {
  std::lock_guard lock(mutex_);
  std::shared_ptr<Meeting>& meeting = meetings_[key];
  if (!meeting) meeting = std::make_shared<Meeting>(world_ranks);
  return meeting;
}

void ThreadGroup::forget(const Key& key) {
  std::lock_guard lock(mutex_);
  meetings_.erase(key);
}

std::shared_ptr<ThreadGroup> ThreadGroup::subgroup(int64_t index, const std::vector<int>& members) {
  std::lock_guard lock(mutex_);
  std::shared_ptr<ThreadGroup>& group = subgroups_[{index, members.front()}];
  if (!group) group = std::make_shared<ThreadGroup>();
  return group;
}

ThreadBackend::ThreadBackend(std::shared_ptr<ThreadJob> job, std::shared_ptr<ThreadGroup> place,
                             const Group& group)
    : Backend(group, job->rank_state(group.world_rank())),
      job_(std::move(job)),
      place_(std::move(place)) {}

std::shared_ptr<WorkState> ThreadBackend::issue(Request request) {
  const bool pair = request.is_point_to_point();
  ThreadGroup::Key key{-1, -1, 0};
  std::vector<int> members = group().ranks;
  int member = group().rank;
  if (pair) {
    const bool sends = request.op == Op::kSend;
    const int from = sends ? group().rank : request.peer, to = sends ? request.peer : group().rank;
    key = {from, to, next_message_[{from, to}]++};
    members = {group().ranks[static_cast<size_t>(from)], group().ranks[static_cast<size_t>(to)]};
    member = sends ? 0 : 1;
  } else {
    std::get<2>(key) = next_collective_++;
  }
  const int rank = group().world_rank();
  const std::string what = describe(request), axis = request.axis + group().text();
  const int64_t sequence = std::get<2>(key);
  const std::string title =
      pair ? fmt::format("message {}->{} #{} on {}", members[0], members[1], sequence, axis)
           : fmt::format("{} #{} on {}", what, sequence, axis);
  if (job_->is_aborted()) throw job_->aborted_error(title);
  const int64_t flight = state().recorder.add({.axis = axis, .sequence = sequence, .what = what});
  const auto meeting = place_->find_or_open(key, members);
  const Meeting::Arrival arrival = meeting->arrive(member, std::move(request), title);
  if (!arrival.mismatch.empty()) {
    const ErrorText text{.module = "comm",
                         .what = fmt::format("operation #{} on {}", sequence, axis),
                         .got = "different calls",
                         .need = "the same on every rank",
                         .why = arrival.mismatch};
    job_->abort(rank, format_error(text));
    throw InternalError(text);
  }
  if (arrival.is_last) {
    place_->forget(key);
    state().recorder.begin(flight);
    meeting->help();
  }
  return std::make_shared<ThreadWork>(job_, meeting, rank, flight);
}

std::shared_ptr<Backend> ThreadBackend::split(const std::string& /*axis*/,
                                              const std::vector<int>& members) {
  auto place = place_->subgroup(next_split_++, members);
  return std::make_shared<ThreadBackend>(job_, std::move(place), subgroup_of(group(), members));
}

}  // namespace capstan::comm
