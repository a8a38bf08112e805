// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A small legal recipe and ways to look at what is wrong with a changed one.
#pragma once
#include <string>
#include <vector>

#include "capstan/recipe/load.h"

namespace capstan::recipe {

inline const std::string kSmall =
    "version: 1\n"                                                         // line 1
    "run: {name: small, steps: 10}\n"                                      // 2
    "model:\n"                                                             // 3
    "  vocab_size: 64\n"                                                   // 4
    "  hidden_size: 32\n"                                                  // 5
    "  intermediate_size: 64\n"                                            // 6
    "  num_hidden_layers: 1\n"                                             // 7
    "  num_attention_heads: 4\n"                                           // 8
    "data:\n"                                                              // 9
    "  tokenizer: none\n"                                                  // 10
    "  train:\n"                                                           // 11
    "    - {path: corpus/train}\n"                                         // 12
    "  validation: [{name: heldout, path: corpus/validation}]\n"           // 13
    "batch: {global_samples: 4, micro_samples: 2, sequence_length: 16}\n"  // 14
    "optimizer:\n"                                                         // 15
    "  lr: 0.001\n";                                                       // 16

// The file name lies in a folder that does not exist, so that nothing is included by accident.
inline const std::string kFile = "no-such-folder/test.yaml";

using Overrides = std::vector<std::string>;

inline Resolved parse(const std::string& text, const Overrides& overrides = {}) {
  return parse_recipe(text, kFile, overrides);
}

inline std::vector<Problem> problems_of(const std::string& text, const Overrides& overrides = {}) {
  try {
    (void)parse(text, overrides);
  } catch (const RecipeError& error) {
    return error.problems();
  }
  return {};
}

// All problems as one text, without the file's name.
inline std::string complaint_of(const std::string& text, const Overrides& overrides = {}) {
  std::string result;
  for (const Problem& problem : problems_of(text, overrides)) {
    std::string line = problem.text();
    if (line.starts_with(kFile + ":")) line.erase(0, kFile.size() + 1);
    result += line + "\n";
  }
  return result;
}

inline std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  return at == std::string::npos ? "test text lacks " + from : text.replace(at, from.size(), to);
}

}  // namespace capstan::recipe
