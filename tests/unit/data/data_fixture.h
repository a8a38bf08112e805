// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A temporary folder, small token files and byte access to them.
#pragma once
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "capstan/base/error.h"
#include "capstan/data/token_writer.h"
#include "data/prepare_internal.h"

namespace capstan::data::testing {

namespace fs = std::filesystem;

class TempFolder {
 public:
  TempFolder() {
    static std::atomic<int> counter{0};
    path_ =
        root() / ("capstan-data-" + std::to_string(::getpid()) + "-" + std::to_string(counter++));
    fs::create_directories(path_);
  }
  ~TempFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  [[nodiscard]] Path operator/(const std::string& name) const { return path_ / name; }
  [[nodiscard]] const Path& path() const { return path_; }

 private:
  // Memory where there is some: these tests sync thousands of times, which a busy disk turns into
  // minutes.
  static Path root() {
    const bool has_memory = ::getenv("TMPDIR") == nullptr && ::access("/dev/shm", W_OK | X_OK) == 0;
    return has_memory ? Path("/dev/shm") : fs::temp_directory_path();
  }
  Path path_;
};

inline std::string slurp(const Path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

inline void spill(const Path& path, const std::string& content) {
  fs::create_directories(path.parent_path());
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << content;
}

using Document = std::vector<int32_t>;

inline PairSummary write_pair(const Path& prefix, const std::vector<Document>& documents,
                              TokenType type = TokenType::kUint16) {
  TokenWriter writer(prefix, type);
  for (const Document& document : documents) writer.add_document(document);
  const PairSummary summary = writer.finish();
  TokenWriter* const pointer = &writer;
  commit_pairs(std::span(&pointer, 1));
  return summary;
}

// One document 0, 1, 2, ... of `tokens` tokens.
inline void write_ramp(const Path& prefix, int32_t tokens) {
  Document document(static_cast<size_t>(tokens));
  std::iota(document.begin(), document.end(), 0);
  write_pair(prefix, {document}, TokenType::kInt32);
}

// Bytes as tokens; 256 ends a document.
inline Encoder byte_encoder() {
  return {.encode =
              [](std::string_view text) {
                std::vector<int32_t> ids;
                for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
                return ids;
              },
          .vocab_size = 257,
          .eos_id = 256,
          .fingerprint = "bytes"};
}

template <class E, class F>
std::string message_of(F&& call) {
  try {
    call();
  } catch (const E& error) {
    return error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another class of error: " << error.what();
    return {};
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

}  // namespace capstan::data::testing
