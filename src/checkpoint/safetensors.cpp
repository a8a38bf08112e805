// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/checkpoint/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "capstan/base/bytes.h"
#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/base/json.h"
#include "capstan/base/text.h"

namespace capstan::checkpoint {
namespace {

[[noreturn]] void refuse(const std::string& origin, const std::string& got,
                         const std::string& need) {
  throw DataError({.module = "checkpoint",
                   .what = "reading " + origin + " as safetensors",
                   .got = got,
                   .need = need,
                   .fix = "Use another copy of the file"});
}

uint64_t read_u64(std::span<const std::byte> bytes) {
  uint64_t value = 0;
  std::memcpy(&value, bytes.data(), sizeof value);
  return value;
}

std::vector<int64_t> parse_shape(const json::Json& entry, const std::string& name,
                                 const std::string& origin) {
  const json::Json& dims = json::field(entry, "shape", origin);
  if (!dims.is_array())
    refuse(origin, "a shape of " + quote(name) + " that is no list", "a list of sizes");
  std::vector<int64_t> shape;
  for (const json::Json& dim : dims) {
    const bool ok = dim.is_number_unsigned() && dim.get<uint64_t>() <= uint64_t{1} << 62;
    if (!ok)
      refuse(origin, "a size in the shape of " + quote(name) + " that is no whole number",
             "sizes from 0");
    shape.push_back(dim.get<int64_t>());
  }
  return shape;
}

TensorInfo parse_tensor(const json::Json& entry, const std::string& name,
                        const std::string& origin) {
  if (!entry.is_object())
    refuse(origin, "an entry " + quote(name) + " that is no map", "dtype, shape, data_offsets");
  for (const auto& [key, value] : entry.items()) {
    if (key != "dtype" && key != "shape" && key != "data_offsets")
      refuse(origin, "the unknown key " + quote(key) + " in " + quote(name),
             "dtype, shape, data_offsets");
  }
  TensorInfo info;
  const std::string dtype = json::get_string(entry, "dtype", origin);
  const auto known = dtype_from_safetensors(dtype);
  if (!known)
    refuse(origin, "dtype " + quote(dtype) + " of " + quote(name),
           "F64, F32, BF16, F16 or an integer type");
  info.dtype = *known;
  info.shape = parse_shape(entry, name, origin);
  const json::Json& offsets = json::field(entry, "data_offsets", origin);
  const bool pair = offsets.is_array() && offsets.size() == 2 && offsets[0].is_number_unsigned() &&
                    offsets[1].is_number_unsigned() &&
                    offsets[0].get<uint64_t>() <= offsets[1].get<uint64_t>() &&
                    offsets[1].get<uint64_t>() <= uint64_t{1} << 62;
  if (!pair)
    refuse(origin, "data_offsets of " + quote(name) + " that are no range",
           "[begin, end] with begin <= end");
  info.begin = offsets[0].get<int64_t>();
  info.end = offsets[1].get<int64_t>();
  return info;
}

void check_length(const TensorInfo& info, const std::string& name, const std::string& origin) {
  std::optional<int64_t> bytes = static_cast<int64_t>(size_of(info.dtype));
  for (const int64_t dim : info.shape) {
    bytes = checked_multiply(*bytes, dim);
    if (!bytes)
      refuse(origin, "a shape of " + quote(name) + " whose product overflows",
             "a shape that fits the file");
  }
  if (*bytes != info.end - info.begin)
    refuse(origin, fmt::format("{} bytes for {}", info.end - info.begin, quote(name)),
           fmt::format("{} for its shape and dtype", *bytes));
}

// Sorted by offset the tensors must follow one another from 0 to the end of the data.
void check_tiling(const SafetensorsHeader& header, int64_t data_size, const std::string& origin) {
  std::vector<std::pair<int64_t, std::string>> order;
  for (const auto& [name, info] : header.tensors) order.emplace_back(info.begin, name);
  std::sort(order.begin(), order.end(), [&](const auto& a, const auto& b) {
    return std::pair(a.first, header.tensors.at(a.second).end) <
           std::pair(b.first, header.tensors.at(b.second).end);
  });
  int64_t at = 0;
  for (const auto& [begin, name] : order) {
    if (begin != at)
      refuse(origin, fmt::format("{} at byte {}", quote(name), begin),
             fmt::format("byte {}: no hole and no overlap", at));
    at = header.tensors.at(name).end;
  }
  if (at != data_size)
    refuse(origin, fmt::format("{} bytes of data", data_size),
           fmt::format("{}, the end of the last tensor", at));
}

void parse_metadata(const json::Json& entry, SafetensorsHeader& header, const std::string& origin) {
  if (!entry.is_object()) refuse(origin, "__metadata__ that is no map", "a map of strings");
  for (const auto& [key, value] : entry.items()) {
    if (!value.is_string())
      refuse(origin, "__metadata__." + quote(key) + " that is no string", "a map of strings");
    header.metadata[key] = value.get<std::string>();
  }
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::span<const std::byte> file,
                                           const std::string& origin) {
  if (file.size() < 8)
    refuse(origin, fmt::format("{} bytes", file.size()),
           "at least the 8 bytes of the header length");
  const uint64_t length = read_u64(file);
  if (length > static_cast<uint64_t>(kMaxSafetensorsHeader))
    refuse(origin, fmt::format("a header of {} bytes", length), "at most 100,000,000");
  if (length > file.size() - 8)
    refuse(origin, fmt::format("a header of {} bytes in a file of {}", length, file.size()),
           "a header within the file");
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + 8, length);
  if (text.empty() || text.front() != '{')
    refuse(origin, "a header that does not start with '{'", "a JSON map");
  const json::Json root = json::parse(text, origin, {.depth = 8, .bytes = kMaxSafetensorsHeader});
  if (!root.is_object()) refuse(origin, "a header that is no map", "a JSON map");
  SafetensorsHeader header;
  header.data_begin = static_cast<int64_t>(8 + length);
  for (const auto& [name, entry] : root.items()) {
    if (name == "__metadata__") {
      parse_metadata(entry, header, origin);
      continue;
    }
    TensorInfo info = parse_tensor(entry, name, origin);
    check_length(info, name, origin);
    header.tensors.emplace(name, std::move(info));
  }
  check_tiling(header, static_cast<int64_t>(file.size()) - header.data_begin, origin);
  return header;
}

SafetensorsFile::SafetensorsFile(const Path& path)
    : file_(path), header_(parse_safetensors_header(file_.bytes(), path.string())) {}

TensorView SafetensorsFile::tensor(const std::string& name) const {
  const auto found = header_.tensors.find(name);
  if (found == header_.tensors.end())
    refuse(path().string(), "no tensor " + quote(name), "that tensor");
  const TensorInfo& info = found->second;
  return {name, info.dtype, info.shape,
          file_.bytes().subspan(header_.data_begin + info.begin, info.end - info.begin)};
}

WrittenFile write_safetensors(const Path& path, std::vector<TensorView> tensors,
                              const std::map<std::string, std::string>& metadata) {
  std::sort(tensors.begin(), tensors.end(), [](const TensorView& a, const TensorView& b) {
    const size_t x = size_of(a.dtype), y = size_of(b.dtype);
    return x != y ? x > y : a.name < b.name;
  });
  json::Json root = json::Json::object();
  if (!metadata.empty()) root["__metadata__"] = metadata;
  int64_t at = 0;
  for (const TensorView& t : tensors) {
    CAPSTAN_CHECK(!root.contains(t.name), "tensor {} twice in {}", t.name, path.string());
    const auto bytes = static_cast<int64_t>(t.bytes.size());
    root[t.name] = {{"dtype", safetensors_name_of(t.dtype)},
                    {"shape", t.shape},
                    {"data_offsets", {at, at + bytes}}};
    at += bytes;
  }
  std::string header = root.dump();
  header.resize(static_cast<size_t>(round_up(static_cast<int64_t>(header.size()), 8)), ' ');
  const uint64_t length = header.size();
  FileWriter writer(path);
  writer.write(std::as_bytes(std::span(&length, 1)));
  writer.write(header);
  for (const TensorView& t : tensors) writer.write(t.bytes);
  WrittenFile written{.bytes = writer.size()};
  written.xxh3 = writer.close();
  return written;
}

}  // namespace capstan::checkpoint
