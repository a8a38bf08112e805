// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Errors. Everything Capstan throws on purpose derives from Error; the class decides the exit code.
// Text form: `[module] WHAT failed: got A, need B (WHY). FIX.`; parts left empty are left out.
// Inside a run the program prefixes `rank R:`. Recipe problems have their own form
// (recipe/problem.h).
#pragma once
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace capstan {

// What happened, in the words of the user. All fields are plain sentences without a final full
// stop.
struct ErrorText {
  std::string module;  // "data", "comm", ...
  // What failed, naming the key, rank, tensor or path: "reading corpus.bin". The word "failed" is
  // added, unless the text starts with "cannot " or ends with " failed" or " refused".
  std::string what;
  std::string got;  // may be empty, as may the next three
  std::string need;
  std::string why;
  std::string fix;
};
[[nodiscard]] std::string format_error(const ErrorText& text);

class Error : public std::runtime_error {
 public:
  explicit Error(ErrorText text) : std::runtime_error(format_error(text)), text_(std::move(text)) {}
  // A template, so that a braced ErrorText of two fields is not taken for a string.
  template <class Text>
  requires std::is_convertible_v<const Text&, std::string>
  explicit Error(const Text& whole) : std::runtime_error(std::string(whole)) {}
  [[nodiscard]] const ErrorText& text() const { return text_; }
  // Exit code of a verb outside a run, and inside one (docs/troubleshooting.md lists all codes).
  [[nodiscard]] virtual int exit_code() const { return 1; }
  [[nodiscard]] virtual int run_exit_code() const { return 91; }
  [[nodiscard]] virtual const char* class_name() const { return "Error"; }

 private:
  ErrorText text_;
};

// A recipe, flag or plan that cannot be honoured; a named input that is missing.
class ConfigError : public Error {
 public:
  using Error::Error;
  int exit_code() const override { return 2; }
  int run_exit_code() const override { return 2; }
  const char* class_name() const override { return "ConfigError"; }
};

// Machine, file system, network, device.
class EnvError : public Error {
 public:
  using Error::Error;
  const char* class_name() const override { return "EnvError"; }
};

// Content that is damaged or not what it claims to be: checkpoints, corpora, tokenizers.
class DataError : public Error {
 public:
  using Error::Error;
  int exit_code() const override { return 94; }
  int run_exit_code() const override { return 94; }
  const char* class_name() const override { return "DataError"; }
};

// The numbers went wrong: too many non-finite steps.
class DivergenceError : public Error {
 public:
  using Error::Error;
  int exit_code() const override { return 93; }
  int run_exit_code() const override { return 93; }
  const char* class_name() const override { return "DivergenceError"; }
};

// Our own bug.
class InternalError : public Error {
 public:
  using Error::Error;
  const char* class_name() const override { return "InternalError"; }
};

// Exit codes of a run (reliability contract, docs/troubleshooting.md).
namespace exit_codes {
inline constexpr int kDone = 0, kFailure = 1, kUsage = 2, kPreempted = 90, kWorkerFailure = 91,
                     kHang = 92, kDoNotRequeue = 93, kIntegrity = 94, kHardware = 95;
}  // namespace exit_codes

}  // namespace capstan
