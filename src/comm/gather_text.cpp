// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/comm/gather_text.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

namespace capstan::comm {

std::vector<std::string> gather_text(const Communicator& group, const std::string& mine) {
  const int64_t n = group.size();
  if (n == 1) return {mine};
  const Tensor lengths = at::empty({n}, at::kLong);
  group.all_gather(lengths, at::full({1}, static_cast<int64_t>(mine.size()), at::kLong)).wait();
  const int64_t longest = std::max<int64_t>(1, lengths.max().item<int64_t>());
  const Tensor padded = at::zeros({longest}, at::kByte);
  std::memcpy(padded.data_ptr(), mine.data(), mine.size());
  const Tensor all = at::empty({n, longest}, at::kByte);
  group.all_gather(all.view({-1}), padded).wait();
  std::vector<std::string> texts;
  for (int64_t r = 0; r < n; ++r)
    texts.emplace_back(static_cast<const char*>(all.data_ptr()) + r * longest,
                       static_cast<size_t>(lengths[r].item<int64_t>()));
  return texts;
}

}  // namespace capstan::comm
