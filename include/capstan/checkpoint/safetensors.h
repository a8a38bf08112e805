// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// safetensors files: u64 little-endian header length, JSON header, data. Files are untrusted: the
// reader checks every rule of the format before it hands out a byte. No torch.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "capstan/base/dtype.h"
#include "capstan/base/file.h"

namespace capstan::checkpoint {

inline constexpr int64_t kMaxSafetensorsHeader = 100'000'000;

struct TensorView {
  std::string name;
  DType dtype = DType::kFp32;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;
};

// What a header says: offsets are relative to the start of the data.
struct TensorInfo {
  DType dtype = DType::kFp32;
  std::vector<int64_t> shape;
  int64_t begin = 0, end = 0;
};
struct SafetensorsHeader {
  std::map<std::string, TensorInfo> tensors;
  std::map<std::string, std::string> metadata;
  int64_t data_begin = 0;  // offset of the data in the file
};
// Checks the length field, JSON, names, dtypes, shapes with overflow, contiguity without holes or
// overlap, and the end against `file`. `origin` names the file in errors. Throws DataError.
[[nodiscard]] SafetensorsHeader parse_safetensors_header(std::span<const std::byte> file,
                                                         const std::string& origin);

// A mapped file.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const Path& path);
  [[nodiscard]] const SafetensorsHeader& header() const { return header_; }
  [[nodiscard]] bool has(const std::string& name) const { return header_.tensors.count(name) != 0; }
  [[nodiscard]] TensorView tensor(const std::string& name) const;  // throws DataError when absent
  [[nodiscard]] const Path& path() const { return file_.path(); }

 private:
  MappedFile file_;
  SafetensorsHeader header_;
};

struct WrittenFile {
  int64_t bytes = 0;
  std::string xxh3;  // XXH3-128 of the whole file
};
// Writes in the format's own order (alignment descending, then name), durably. The path must not
// exist.
WrittenFile write_safetensors(const Path& path, std::vector<TensorView> tensors,
                              const std::map<std::string, std::string>& metadata);

}  // namespace capstan::checkpoint
