// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A trained model opened for use: weights of a run directory or step folder, its tokenizer, one
// rank, no optimizer. It computes where this process does: on the GPU that device::start_cuda
// opened before the session, else on the CPU.
#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "capstan/base/file.h"
#include "capstan/engine/engine.h"
#include "capstan/infer/sampling.h"
#include "capstan/text/tokenizer.h"

namespace capstan::infer {

struct SessionOptions {
  Path model;                          // runs/NAME or a step folder
  std::optional<int64_t> threads;      // default: all physical cores allowed
  std::vector<std::string> overrides;  // "batch.micro_samples=8", on top of the model's own recipe
};

class Session {
 public:
  explicit Session(const SessionOptions& options);
  ~Session();
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;

  [[nodiscard]] engine::Engine& engine();
  [[nodiscard]] const plan::Plan& plan() const;
  [[nodiscard]] bool has_tokenizer() const;
  [[nodiscard]] const text::Tokenizer& tokenizer() const;  // throws ConfigError without one
  [[nodiscard]] int64_t step() const;
  [[nodiscard]] const Path& step_folder() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

struct GenerateOptions {
  SamplingOptions sampling;
  int64_t max_tokens = 100;
  bool stop_at_end = true;  // at the tokenizer's end-of-text token
  uint64_t sequence = 0;    // number of the prompt, for the seed
};
struct Generated {
  std::vector<int32_t> tokens;  // new ones
  std::string text;             // of the new ones
  std::string stopped_by;       // "end of text", "max tokens", "context is full"
};
// Continues a prompt with a KV cache. `stream` receives the text piece by piece, cut at whole UTF-8
// characters.
[[nodiscard]] Generated generate(Session& session, std::string_view prompt,
                                 const GenerateOptions& options,
                                 const std::function<void(std::string_view piece)>& stream = {});

}  // namespace capstan::infer
