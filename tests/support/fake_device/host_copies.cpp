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

}  // namespace

void arrive_later(const at::Tensor& host, const at::Tensor& value, const Access& copy) {
  std::lock_guard lock(state_mutex());
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
  for (auto& c : copies())
    if (c.is_arrival && c.host.storage().is_alias_of(host.storage()) && is_ordered(c.copy, stream))
      c.host.copy_(c.value);
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
