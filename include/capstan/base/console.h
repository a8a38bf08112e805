// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What a program tells its user on stderr. A closed or full stderr never ends anything.
#pragma once
#include <cstdio>
#include <string_view>

namespace capstan {

inline void tell(std::string_view text) noexcept {
  (void)std::fwrite(text.data(), 1, text.size(), stderr);
  (void)std::fflush(stderr);
}

}  // namespace capstan
