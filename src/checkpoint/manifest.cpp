// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/checkpoint/manifest.h"

#include <fmt/format.h>

#include <set>

#include "capstan/base/error.h"
#include "capstan/base/hash.h"
#include "capstan/base/json.h"
#include "capstan/base/text.h"

namespace capstan::checkpoint {
namespace {

constexpr std::string_view kTrailer = "#xxh3:";

[[noreturn]] void refuse(const std::string& origin, const std::string& got,
                         const std::string& need) {
  throw DataError({.module = "checkpoint",
                   .what = "reading " + origin,
                   .got = got,
                   .need = need,
                   .fix = "Use another step"});
}

json::Json to_json(const StoredTensor& t) {
  return {{"model", t.model},
          {"kind", t.kind},
          {"name", t.name},
          {"stored_as", t.stored_as},
          {"file", t.file},
          {"dtype", safetensors_name_of(t.dtype)},
          {"global_shape", t.global_shape},
          {"begin", t.box.begin},
          {"extent", t.box.extent}};
}

std::vector<int64_t> get_sizes(const json::Json& entry, const char* key,
                               const std::string& origin) {
  const json::Json& list = json::field(entry, key, origin);
  if (!list.is_array()) refuse(origin, fmt::format("{} that is no list", key), "a list of sizes");
  std::vector<int64_t> sizes;
  for (const json::Json& value : list) {
    if (!value.is_number_unsigned() || value.get<uint64_t>() > uint64_t{1} << 62)
      refuse(origin, fmt::format("{} with something that is no size", key), "whole numbers from 0");
    sizes.push_back(value.get<int64_t>());
  }
  return sizes;
}

// A plain name: no folder, no step out of the folder, nothing hidden.
bool is_safe_file_name(const std::string& name) {
  return !name.empty() && name.size() < 200 && name.front() != '.' &&
         name.find('/') == std::string::npos && name.find('\\') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

StoredFile parse_file(const json::Json& entry, const std::string& origin) {
  StoredFile file{json::get_string(entry, "name", origin),
                  json::get_int(entry, "bytes", 0, int64_t{1} << 62, origin),
                  json::get_string(entry, "xxh3", origin)};
  if (!is_safe_file_name(file.name))
    refuse(origin, "the file name " + quote(file.name), "a plain name inside the step folder");
  if (file.xxh3.size() != 32)
    refuse(origin, "the hash " + quote(file.xxh3) + " of " + file.name, "32 hexadecimal digits");
  return file;
}

void check_box(const StoredTensor& t, const std::string& origin) {
  const size_t rank = t.global_shape.size();
  bool ok = t.box.begin.size() == rank && t.box.extent.size() == rank;
  for (size_t d = 0; ok && d < rank; ++d)
    ok = t.box.begin[d] <= t.global_shape[d] &&
         t.box.extent[d] <= t.global_shape[d] - t.box.begin[d];
  if (!ok)
    refuse(origin, "a box of " + quote(t.name) + " outside its tensor",
           "begin + extent within global_shape");
}

StoredTensor parse_tensor(const json::Json& entry, const std::set<std::string>& files,
                          const std::string& origin) {
  StoredTensor t;
  t.model = json::get_string(entry, "model", origin);
  t.kind = json::get_string(entry, "kind", origin);
  t.name = json::get_string(entry, "name", origin);
  t.stored_as = json::get_string(entry, "stored_as", origin);
  t.file = json::get_string(entry, "file", origin);
  if (files.count(t.file) == 0)
    refuse(origin, quote(t.name) + " in " + quote(t.file), "a file that the manifest lists");
  const std::string dtype = json::get_string(entry, "dtype", origin);
  const auto known = dtype_from_safetensors(dtype);
  if (!known) refuse(origin, "dtype " + quote(dtype), "a dtype of safetensors");
  t.dtype = *known;
  t.global_shape = get_sizes(entry, "global_shape", origin);
  t.box = {get_sizes(entry, "begin", origin), get_sizes(entry, "extent", origin)};
  check_box(t, origin);
  return t;
}

const json::Json& get_list(const json::Json& root, const char* key, const std::string& origin) {
  const json::Json& list = json::field(root, key, origin);
  if (!list.is_array()) refuse(origin, fmt::format("'{}' that is no list", key), "a list");
  return list;
}

std::string checked_body(const std::string& text, const std::string& origin) {
  const size_t at = text.rfind(kTrailer);
  if (at == std::string::npos) refuse(origin, "no hash line at its end", "the whole file");
  std::string body = text.substr(0, at);
  const std::string hash = text.substr(at + kTrailer.size());
  const std::string actual = xxh3_128_hex(body);
  if (hash != actual + "\n")
    refuse(origin, "content with hash " + actual, "the hash in its last line");
  return body;
}

}  // namespace

std::string to_text(const Manifest& manifest) {
  json::Json root = {{"version", manifest.version},
                     {"step", manifest.step},
                     {"program", manifest.program},
                     {"created", manifest.created},
                     {"recipe_identity", manifest.recipe_identity},
                     {"layout", manifest.layout}};
  root["files"] = json::Json::array();
  for (const StoredFile& f : manifest.files)
    root["files"].push_back({{"name", f.name}, {"bytes", f.bytes}, {"xxh3", f.xxh3}});
  root["tensors"] = json::Json::array();
  for (const StoredTensor& t : manifest.tensors) root["tensors"].push_back(to_json(t));
  const std::string body = root.dump(1) + "\n";
  return fmt::format("{}{}{}\n", body, kTrailer, xxh3_128_hex(body));
}

Manifest parse_manifest(const std::string& text, const std::string& origin) {
  const json::Json root = json::parse(checked_body(text, origin), origin, {.depth = 8});
  Manifest m;
  m.version = static_cast<int>(json::get_int(root, "version", 0, 1'000'000, origin));
  if (m.version != kManifestVersion)
    refuse(origin, fmt::format("version {}", m.version),
           fmt::format("version {}, the one this build reads", kManifestVersion));
  m.step = json::get_int(root, "step", 0, int64_t{1} << 62, origin);
  m.program = json::get_string(root, "program", origin);
  m.created = json::get_string(root, "created", origin);
  m.recipe_identity = json::get_string(root, "recipe_identity", origin);
  const json::Json& layout = json::field(root, "layout", origin);
  if (!layout.is_object()) refuse(origin, "'layout' that is no map", "a map of strings");
  for (const auto& [key, value] : layout.items())
    m.layout[key] = value.is_string() ? value.get<std::string>() : value.dump();
  std::set<std::string> names;
  for (const json::Json& entry : get_list(root, "files", origin)) {
    m.files.push_back(parse_file(entry, origin));
    if (!names.insert(m.files.back().name).second)
      refuse(origin, "file " + quote(m.files.back().name) + " twice", "each file once");
  }
  std::set<std::pair<std::string, std::string>> stored;
  for (const json::Json& entry : get_list(root, "tensors", origin)) {
    m.tensors.push_back(parse_tensor(entry, names, origin));
    const StoredTensor& t = m.tensors.back();
    if (!stored.insert({t.file, t.stored_as}).second)
      refuse(origin, quote(t.stored_as) + " twice in " + t.file, "each tensor once");
  }
  return m;
}

}  // namespace capstan::checkpoint
