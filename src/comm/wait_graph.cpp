// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/wait_graph_internal.h"

#include <fmt/format.h>

#include <deque>
#include <set>

namespace capstan::comm {
namespace {

constexpr size_t kShown = 8;  // ranks described one by one

std::string list_of(const std::vector<int>& ranks) {
  if (ranks.size() <= 2 * kShown)
    return fmt::format("{} {}", ranks.size() == 1 ? "rank" : "ranks", fmt::join(ranks, ", "));
  return fmt::format("ranks {}, ... ({} ranks)",
                     fmt::join(ranks.begin(), ranks.begin() + 2 * kShown, ", "), ranks.size());
}

std::string describe_end(int rank, const RankStatus& status) {
  if (!status.answered) return fmt::format("rank {} gives no sign of life", rank);
  return fmt::format("rank {} waits for nobody; its last operation: {}", rank, status.last);
}

std::string join_some(const std::vector<std::string>& parts) {
  const size_t n = std::min(parts.size(), kShown);
  std::string text = fmt::format(
      "{}", fmt::join(parts.begin(), parts.begin() + static_cast<std::ptrdiff_t>(n), "; "));
  if (n < parts.size()) text += fmt::format("; and {} more", parts.size() - n);
  return text;
}

struct Chain {
  std::vector<int> ends;  // wait for nobody, in the order found
  std::vector<std::string> ends_text;
  std::vector<std::string> links;  // "rank 1 waits in ... for rank 2"
};

Chain follow(int rank, const std::map<int, RankStatus>& statuses) {
  Chain chain;
  std::set<int> seen{rank};
  std::deque<int> todo{rank};
  while (!todo.empty()) {
    const int at = todo.front();
    todo.pop_front();
    const auto found = statuses.find(at);
    const RankStatus status =
        found == statuses.end() ? RankStatus{.answered = false} : found->second;
    if (status.waits_in.empty() || !status.answered) {
      chain.ends.push_back(at);
      chain.ends_text.push_back(describe_end(at, status));
      continue;
    }
    chain.links.push_back(
        status.waits_for.empty()
            ? fmt::format("rank {} waits in {}, to which all ranks have come", at, status.waits_in)
            : fmt::format("rank {} waits in {} for {}", at, status.waits_in,
                          list_of(status.waits_for)));
    for (const int next : status.waits_for)
      if (seen.insert(next).second) todo.push_back(next);
  }
  return chain;
}

}  // namespace

ErrorText explain_deadline(int rank, double timeout_s, const std::map<int, RankStatus>& statuses) {
  const Chain chain = follow(rank, statuses);
  const auto own = statuses.find(rank);
  ErrorText text{
      .module = "comm",
      .what = "waiting in " + (own == statuses.end() ? "a collective" : own->second.waits_in),
      .need = "every rank of the group"};
  std::vector<std::string> why = chain.ends_text;
  if (!chain.ends.empty()) {
    text.got = fmt::format("no arrival of {} within {:g} s", list_of(chain.ends), timeout_s);
    text.fix =
        fmt::format("Look at {} first; raise the timeout if it was only slow", list_of(chain.ends));
  } else if (own != statuses.end() && own->second.waits_for.empty()) {
    text.got = fmt::format("all ranks but no end within {:g} s", timeout_s);
    text.fix =
        "Look at the network between the ranks, and whether all of them called the same operation";
  } else {
    text.got = fmt::format("ranks that wait for each other for {:g} s", timeout_s);
    text.fix =
        "Issue the operations in the same order on all ranks, and both directions of an exchange "
        "before waiting";
  }
  why.insert(why.end(), chain.links.begin(), chain.links.end());
  text.why = join_some(why);
  return text;
}

}  // namespace capstan::comm
