// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/gloo_backend_internal.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <numeric>

#include "capstan/base/env.h"
#include "capstan/base/log.h"
#include "capstan/base/trace.h"

namespace capstan::comm {
namespace {

using Clock = std::chrono::steady_clock;

std::string first_line(const std::exception& e) {
  const std::string whole = e.what();
  return whole.substr(0, whole.find('\n'));
}

Milliseconds milliseconds_of(double seconds) {
  return Milliseconds(std::max<int64_t>(1, static_cast<int64_t>(seconds * 1000)));
}

}  // namespace

class GlooWork final : public WorkState, public std::enable_shared_from_this<GlooWork> {
 public:
  GlooWork(std::shared_ptr<GlooJob> job, Request what)
      : request(std::move(what)), job_(std::move(job)) {}

  void wait() override {
    std::unique_lock lock(mutex_);
    if (!done_) {
      std::optional<trace::Span> span;
      if (trace::is_on()) span.emplace("comm", "wait " + note.title);
      lock.unlock();
      const auto id = job_->note_wait(note, [self = shared_from_this()] { self->wake(); });
      lock.lock();
      // An abort ends the wait at once, whatever gloo does; the operation that failed first still
      // says why.
      changed_.wait(lock, [this] { return done_ || (job_->is_aborted() && !failing_); });
      lock.unlock();
      job_->clear_wait(id);
      lock.lock();
      if (!done_) throw job_->aborted_error(note.title);
    }
    if (failure_) std::rethrow_exception(failure_);
  }

  [[nodiscard]] bool is_done() const override {
    std::lock_guard lock(mutex_);
    return done_ || (job_->is_aborted() && !failing_);
  }

  // Runs `call`; whatever it throws is explained and becomes the failure that the waiter sees.
  // `is_closing`: the communicator is gone, nobody waits and nothing has to be explained.
  void run(const std::atomic<bool>& is_closing,
           const std::function<void(Clock::time_point deadline)>& call) {
    FlightRecorder& recorder = job_->rank_state()->recorder;
    recorder.begin(flight);
    const auto begin = Clock::now();
    const double timeout_s = job_->rank_state()->timeout_s;
    std::exception_ptr failure;
    try {
      if (job_->is_aborted()) throw job_->aborted_error(note.title);
      call(begin + milliseconds_of(timeout_s));
    } catch (const AbortedError&) {
      failure = std::current_exception();
    } catch (const std::exception& e) {
      const double waited_s = std::chrono::duration<double>(Clock::now() - begin).count();
      failure = is_closing ? std::make_exception_ptr(closed_error())
                           : explain({.title = note.title,
                                      .got = fmt::format("a broken connection after {:.1f} s ({})",
                                                         waited_s, first_line(e)),
                                      .fix = "Look at the ranks without a sign of life first",
                                      .deadline_passed = waited_s >= 0.95 * timeout_s});
    }
    recorder.end(flight, failure == nullptr);
    finish(std::move(failure));
  }

  Request request;
  WaitNote note;
  int64_t flight = -1;

 private:
  void wake() {
    std::lock_guard lock(mutex_);
    changed_.notify_all();
  }

  [[nodiscard]] std::exception_ptr explain(const WaitFailure& failure) {
    {
      std::lock_guard lock(mutex_);
      failing_ = true;
    }
    return job_->fail(failure, note);
  }

  [[nodiscard]] AbortedError closed_error() const {
    return AbortedError(ErrorText{.module = "comm",
                                  .what = "waiting in " + note.title,
                                  .got = "the end of its communicator before its own"});
  }

  void finish(std::exception_ptr failure) {
    Request finished;  // the tensors go back to their owners even while somebody keeps the Work
    {
      std::lock_guard lock(mutex_);
      failure_ = std::move(failure);
      std::swap(finished, request);
      done_ = true;
    }
    changed_.notify_all();
  }

  std::shared_ptr<GlooJob> job_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false, failing_ = false;
  std::exception_ptr failure_;
};

struct Sequence::State {
  int rank = 0;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> jobs;
  bool busy = false, stop = false;
};

Sequence::Sequence(int rank) : state_(std::make_shared<State>()) { state_->rank = rank; }

Sequence::~Sequence() {
  {
    std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->changed.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Sequence::push(std::function<void()> job) {
  {
    std::lock_guard lock(state_->mutex);
    state_->jobs.push_back(std::move(job));
  }
  if (!thread_.joinable()) thread_ = std::thread([state = state_] { run(state); });
  state_->changed.notify_all();
}

bool Sequence::is_idle() const {
  std::lock_guard lock(state_->mutex);
  return state_->jobs.empty() && !state_->busy;
}

void Sequence::abandon() {
  std::deque<std::function<void()>> forgotten;
  {
    std::lock_guard lock(state_->mutex);
    state_->stop = true;
    forgotten.swap(state_->jobs);
  }
  state_->changed.notify_all();
  if (thread_.joinable()) thread_.detach();
}

void Sequence::run(const std::shared_ptr<State>& state) {
  log::set_thread_rank(state->rank);
  const at::NoGradGuard no_grad;
  std::unique_lock lock(state->mutex);
  for (;;) {
    state->changed.wait(lock, [&] { return state->stop || !state->jobs.empty(); });
    if (state->jobs.empty()) return;
    auto job = std::move(state->jobs.front());
    state->jobs.pop_front();
    state->busy = true;
    lock.unlock();
    job();
    job = nullptr;
    lock.lock();
    state->busy = false;
  }
}

GlooBackend::GlooBackend(std::shared_ptr<GlooJob> job, Group group, std::string id)
    : Backend(std::move(group), job->rank_state()),
      core_(std::make_shared<Core>()),
      id_(std::move(id)),
      collectives_(state().rank),
      sends_(state().rank),
      receives_(state().rank) {
  core_->job = std::move(job);
  core_->group = this->group();
  const GlooTransport::Place place{
      .group = id_, .rank = core_->group.rank, .size = core_->group.size()};
  try {
    core_->transport = std::make_shared<GlooTransport>(core_->job->store(), core_->job->device(),
                                                       place, milliseconds_of(state().timeout_s));
  } catch (const std::exception& e) {
    throw EnvError(ErrorText{
        .module = "comm",
        .what = "connecting the ranks " + core_->group.text(),
        .got = first_line(e),
        .need = "every rank to connect to every other one",
        .fix = "If the machine has several network interfaces, name one in GLOO_SOCKET_IFNAME"});
  }
  core_->job->add_transport(core_->transport);
}

GlooBackend::~GlooBackend() {
  if (collectives_.is_idle() && sends_.is_idle() && receives_.is_idle()) return;
  // Operations that nobody can wait for any more would hold the destructor until their deadline.
  core_->is_closing = true;
  if (core_->transport) core_->transport->close_connections();
  for (Sequence* sequence : {&collectives_, &sends_, &receives_}) sequence->abandon();
}

std::shared_ptr<GlooWork> GlooBackend::make_work(Request request) {
  auto work = std::make_shared<GlooWork>(core_->job, std::move(request));
  work->request.is_point_to_point() ? note_message(*work) : note_collective(*work);
  if (is_aborted()) throw core_->job->aborted_error(work->note.title);
  work->flight = state().recorder.add({.axis = work->request.axis + group().text(),
                                       .sequence = work->note.sequence,
                                       .what = describe(work->request)});
  return work;
}

void GlooBackend::note_collective(GlooWork& work) {
  const int64_t sequence = next_collective_++;
  work.note = {.title = fmt::format("{} #{} on {}{}", describe(work.request), sequence,
                                    work.request.axis, group().text()),
               .sequence = sequence};
  for (const int rank : group().ranks) work.note.counters[rank] = id_;
  core_->job->count(id_);
}

void GlooBackend::note_message(GlooWork& work) {
  const Request& request = work.request;
  const bool sends = request.op == Op::kSend;
  const int from = sends ? group().rank : request.peer, to = sends ? request.peer : group().rank;
  const int64_t sequence = next_message_[{from, to}]++;
  const int peer = group().ranks[static_cast<size_t>(request.peer)];
  const auto counter = [&](bool sender) {
    return fmt::format("{}:{}>{}:{}", id_, from, to, sender ? "send" : "recv");
  };
  work.note = {
      .title = fmt::format("{} {} rank {} #{} on {}{}", describe(request), sends ? "to" : "from",
                           peer, sequence, request.axis, group().text()),
      .sequence = sequence,
      .counters = {{peer, counter(!sends)}}};
  core_->job->count(counter(sends));
}

std::shared_ptr<WorkState> GlooBackend::issue(Request request) {
  auto work = make_work(std::move(request));
  if (work->request.is_point_to_point()) {
    issue_message(work);
    return work;
  }
  collectives_.push([core = core_, work] {
    work->run(core->is_closing, [&](Clock::time_point deadline) {
      std::optional<trace::Span> span;
      if (trace::is_on()) span.emplace("comm", work->note.title);
      run_on_transport(*core->transport, work->request, core->group, deadline);
    });
  });
  return work;
}

// Gloo takes messages in the calling thread without blocking; only their end has to be waited for.
void GlooBackend::issue_message(const std::shared_ptr<GlooWork>& work) {
  const Request& request = work->request;
  const bool sends = request.op == Op::kSend;
  Sequence& sequence = sends ? sends_ : receives_;
  GlooTransport::Pending pending;
  if (request.payload().nbytes() > 0) {
    const Tensor bytes = request.payload().view(-1).view(at::kByte);
    const auto tag = static_cast<int>(work->note.sequence & 0x3fffffff);
    try {
      pending = sends ? core_->transport->send(bytes, request.peer, tag)
                      : core_->transport->recv(bytes, request.peer, tag);
    } catch (const std::exception& e) {
      pending = [text = first_line(e)](Milliseconds) { throw std::runtime_error(text); };
    }
  }
  sequence.push([core = core_, work, pending = std::move(pending)]() mutable {
    work->run(core->is_closing, [&](Clock::time_point deadline) {
      if (pending)
        pending(std::max(Milliseconds(1),
                         std::chrono::duration_cast<Milliseconds>(deadline - Clock::now())));
      pending = nullptr;
    });
  });
}

std::shared_ptr<Backend> GlooBackend::split(const std::string& axis,
                                            const std::vector<int>& members) {
  const int64_t index = next_split_++;
  if (members.size() == 1) return nullptr;
  return std::make_shared<GlooBackend>(
      core_->job, subgroup_of(group(), members),
      fmt::format("{}/{}.{}.{}", id_, axis, index, members.front()));
}

Communicator make_gloo_world(const std::shared_ptr<GlooJob>& job, int size) {
  Group group{.ranks = std::vector<int>(static_cast<size_t>(size)),
              .rank = job->rank_state()->rank};
  std::iota(group.ranks.begin(), group.ranks.end(), 0);
  return {std::make_shared<GlooBackend>(job, std::move(group), "world"), "world"};
}

Communicator join_local_gloo(const std::shared_ptr<KeyStore>& store, int rank, int size,
                             double timeout_s) {
  meet_all_ranks(*store, rank, size, timeout_s);
  const auto job =
      std::make_shared<GlooJob>(GlooJob::Stores{store, store}, open_network_device(true),
                                std::make_shared<RankState>(rank, timeout_s), size);
  return make_gloo_world(job, size);
}

}  // namespace capstan::comm
