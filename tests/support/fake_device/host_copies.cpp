// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/host_copies.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/clone.h>
#include <fmt/format.h>

#include <cstring>
#include <limits>
#include <list>

#include "support/fake_device/fake_device.h"

namespace capstan::test::fake {
namespace {

struct HostCopy {
  at::Tensor host, value;
  Access copy;
  bool is_arrival;  // else a source
};

std::list<HostCopy>& copies() {
  static auto* const instance = new std::list<HostCopy>;
  return *instance;
}

bool is_same(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor left = a.contiguous(), right = b.contiguous();
  return left.nbytes() == 0 ||
         std::memcmp(left.const_data_ptr(), right.const_data_ptr(), left.nbytes()) == 0;
}

// Nobody but the list has the memory: it cannot change any more.
bool is_abandoned(const HostCopy& c) { return !c.is_arrival && c.host.storage().use_count() == 1; }

bool is_shared(const at::Tensor& a, const at::Tensor& b) {
  if (!a.storage().is_alias_of(b.storage())) return false;
  if (!a.is_contiguous() || !b.is_contiguous()) return true;
  const auto* const first = static_cast<const char*>(a.const_data_ptr());
  const auto* const second = static_cast<const char*>(b.const_data_ptr());
  return first < second + b.nbytes() && second < first + a.nbytes();
}

[[noreturn]] void refuse(const char* what, const Access& earlier, int stream) {
  throw MissingWait(
      fmt::format("missing wait: stream {} {} a copy on stream {} that it is not ordered behind",
                  stream, what, earlier.stream));
}

// Copies that the new one is ordered behind are through with the memory.
void make_way(const at::Tensor& host, const Access& copy) {
  for (auto c = copies().begin(); c != copies().end();) {
    const auto next = std::next(c);
    if (is_shared(c->host, host)) {
      if (!is_ordered(c->copy, copy.stream))
        refuse("writes to pinned memory of", c->copy, copy.stream);
      if (c->is_arrival) c->host.copy_(c->value);
      copies().erase(c);
    }
    c = next;
  }
}

}  // namespace

void arrive_later(const at::Tensor& host, const at::Tensor& value, const Access& copy) {
  std::lock_guard lock(state_mutex());
  make_way(host, copy);
  if (at::isFloatingType(host.scalar_type()))
    host.fill_(std::numeric_limits<double>::quiet_NaN());
  else
    host.fill_(host.scalar_type() == at::kByte ? 255 : -1);
  copies().push_back({host, value, copy, true});
}

void hold_source(const at::Tensor& host, const Access& copy) {
  std::lock_guard lock(state_mutex());
  copies().remove_if(is_abandoned);
  copies().push_back({host, at::clone(host), copy, false});
}

void arrive_for(const at::Tensor& host, int stream) {
  std::lock_guard lock(state_mutex());
  for (auto& c : copies()) {
    if (!c.is_arrival || !is_shared(c.host, host)) continue;
    if (!is_ordered(c.copy, stream)) refuse("reads what arrives by", c.copy, stream);
    c.host.copy_(c.value);
  }
}

void settle_host_copies() {
  std::lock_guard lock(state_mutex());
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  std::list<HostCopy> done;
  for (auto c = copies().begin(); c != copies().end();) {
    const auto next = std::next(c);
    if (is_done(c->copy)) done.splice(done.end(), copies(), c);
    c = next;
  }
  for (auto& c : done)
    if (c.is_arrival) c.host.copy_(c.value);
  for (auto& c : done)
    if (!c.is_arrival && !is_same(c.host, c.value))
      throw MissingWait(fmt::format(
          "missing wait: the pinned source of a copy on stream {} was changed before the copy was "
          "done",
          c.copy.stream));
}

}  // namespace capstan::test::fake
