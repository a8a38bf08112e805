// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/error.h"

namespace capstan {

namespace {

bool says_failure(const std::string& what) {
  return what.starts_with("cannot ") || what.ends_with(" failed") || what.ends_with(" refused");
}

}  // namespace

std::string format_error(const ErrorText& text) {
  std::string out;
  if (!text.module.empty()) out += "[" + text.module + "] ";
  out += text.what;
  if (!text.what.empty() && !says_failure(text.what)) out += " failed";
  if (!text.got.empty()) out += ": got " + text.got;
  if (!text.need.empty()) out += (text.got.empty() ? ": need " : ", need ") + text.need;
  if (!text.why.empty()) out += " (" + text.why + ")";
  out += ".";
  if (!text.fix.empty()) out += " " + text.fix + ".";
  return out;
}

}  // namespace capstan
