// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/text/sources.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <optional>
#include <set>
#include <unordered_map>
#include <unordered_set>

#include "capstan/base/bytes.h"
#include "capstan/base/error.h"
#include "capstan/base/hash.h"
#include "capstan/base/text.h"
#include "capstan/text/documents.h"
#include "text/unicode.h"

namespace capstan::text {
namespace {

namespace fs = std::filesystem;

constexpr size_t kLookBytes = 64 * 1024;
constexpr int64_t kMaxExpansion = 1000;

[[noreturn]] void refuse_input(const Path& path, const std::string& got, const std::string& need,
                               const std::string& fix) {
  throw ConfigError({.module = "text",
                     .what = "reading the input " + path.string(),
                     .got = got,
                     .need = need,
                     .fix = fix});
}

[[noreturn]] void fail_system(const Path& path, const std::error_code& error) {
  throw EnvError({.module = "text", .what = "looking at " + path.string(), .got = error.message()});
}

enum class Content { kText, kBinary, kNotUtf8, kEmpty };

Content look_inside(const Path& path) {
  ByteStream stream(path, kMaxExpansion);
  std::string head(kLookBytes, '\0');
  size_t size = 0;
  while (size < head.size()) {
    const size_t count = stream.read(head.data() + size, head.size() - size);
    if (count == 0) break;
    size += count;
  }
  const bool whole = size < head.size();
  head.resize(size);
  if (head.empty()) return Content::kEmpty;
  if (head.find('\0') != std::string::npos) return Content::kBinary;
  const size_t valid = valid_prefix(head);
  // The last character may be cut by the end of what was read.
  const bool ok = valid == size || (!whole && size - valid < 4);
  return ok ? Content::kText : Content::kNotUtf8;
}

std::string hash_of(const Path& path) {
  ByteStream stream(path, kMaxExpansion);
  Hasher hasher;
  std::string block(kLookBytes * 4, '\0');
  while (const size_t count = stream.read(block.data(), block.size())) {
    hasher.update(std::string_view(block).substr(0, count));
  }
  return hasher.hex();
}

// Does a pattern match the path or one of the folders above it?
bool matches(const std::vector<std::string>& patterns, const std::string& relative) {
  const auto matches_one = [&](std::string pattern) {
    while (pattern.size() > 1 && pattern.back() == '/') pattern.pop_back();
    for (size_t end = relative.find('/'); end != std::string::npos;
         end = relative.find('/', end + 1)) {
      if (glob_match(pattern, std::string_view(relative).substr(0, end))) return true;
    }
    return glob_match(pattern, relative);
  };
  return std::any_of(patterns.begin(), patterns.end(), matches_one);
}

class Lister {
 public:
  Lister(const SourceOptions& options, SourceCounts& counts) : options_(options), counts_(counts) {}

  void add_input(const Path& input) {
    std::error_code error;
    const fs::file_status status = fs::status(input, error);
    if (!fs::exists(status)) {
      refuse_input(input, "no such file or folder", "an existing path", "Check --input");
    }
    const Path absolute = fs::absolute(input).lexically_normal();
    if (fs::is_directory(status)) {
      const size_t before = found_.size() + static_cast<size_t>(counts_.not_selected);
      walk(absolute);
      if (found_.size() + static_cast<size_t>(counts_.not_selected) == before) {
        refuse_input(input, "a folder without text", "at least one text file",
                     "Hidden, binary and empty files are left out");
      }
    } else if (fs::is_regular_file(status)) {
      add_named_file(absolute);
    } else {
      refuse_input(input, "neither a file nor a folder", "one of them", "");
    }
  }

  std::vector<Source> take() {
    std::stable_sort(found_.begin(), found_.end(),
                     [](const Source& a, const Source& b) { return a.relative < b.relative; });
    drop_repeated_paths();
    if (options_.deduplicate) drop_duplicates();
    return std::move(found_);
  }

 private:
  void add_named_file(const Path& path) {
    const std::string relative = path.filename().generic_string();
    if (!is_selected(relative)) return void(++counts_.not_selected);
    const auto refuse = [&](const std::string& got) {
      throw DataError({.module = "text",
                       .what = "reading the input " + path.string(),
                       .got = got,
                       .need = "text in UTF-8"});
    };
    switch (look_inside(path)) {
      case Content::kBinary:
        refuse("a binary file (it has NUL bytes)");
        break;
      case Content::kEmpty:
        refuse("an empty file");
        break;
      case Content::kNotUtf8:
        refuse("text in another encoding");
        break;
      case Content::kText:
        add(path, relative);
        break;
    }
  }

  void add(const Path& path, const std::string& relative) {
    std::error_code error;
    const auto size = fs::file_size(path, error);
    if (error) fail_system(path, error);
    found_.push_back({path, relative, static_cast<int64_t>(size)});
  }

  [[nodiscard]] bool is_selected(const std::string& relative) const {
    if (!options_.include.empty() && !matches(options_.include, relative)) return false;
    return !matches(options_.exclude, relative);
  }

  // A folder is entered once, by device and inode, so loops of links end.
  void walk(const Path& root) {
    std::set<std::pair<dev_t, ino_t>> entered;
    std::vector<Path> pending = {root};
    while (!pending.empty()) {
      const Path folder = std::move(pending.back());
      pending.pop_back();
      struct stat status {};
      if (::stat(folder.c_str(), &status) != 0) {
        fail_system(folder, std::error_code(errno, std::generic_category()));
      }
      if (!entered.emplace(status.st_dev, status.st_ino).second) continue;
      std::error_code error;
      for (fs::directory_iterator it(folder, error), end; !error && it != end;
           it.increment(error)) {
        visit(root, it->path(), pending);
      }
      if (error) fail_system(folder, error);
    }
  }

  void visit(const Path& root, const Path& path, std::vector<Path>& pending) {
    if (path.filename().native().starts_with('.')) return;
    const std::string relative = path.lexically_relative(root).generic_string();
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (status.type() == fs::file_type::not_found || error) {
      if (fs::is_symlink(fs::symlink_status(path))) return void(++counts_.broken_links);
      fail_system(path, error ? error : std::make_error_code(std::errc::no_such_file_or_directory));
    }
    if (fs::is_directory(status)) {
      if (!matches(options_.exclude, relative)) pending.push_back(path);
    } else if (fs::is_regular_file(status)) {
      add_walked_file(path, relative);
    }
  }

  void add_walked_file(const Path& path, const std::string& relative) {
    if (!is_selected(relative)) return void(++counts_.not_selected);
    std::error_code error;
    const auto size = static_cast<int64_t>(fs::file_size(path, error));
    if (error) fail_system(path, error);
    if (size == 0) return void(++counts_.empty);
    if (options_.max_file_bytes > 0 && size > options_.max_file_bytes) {
      return void(++counts_.too_large);
    }
    switch (look_inside(path)) {
      case Content::kBinary:
        ++counts_.binary;
        break;
      case Content::kEmpty:
        ++counts_.empty;
        break;
      case Content::kNotUtf8:
        ++counts_.not_utf8;
        break;
      case Content::kText:
        found_.push_back({path, relative, size});
        break;
    }
  }

  // The same path under two inputs is one source.
  void drop_repeated_paths() {
    std::unordered_set<std::string> seen;
    std::erase_if(found_, [&](const Source& s) { return !seen.insert(s.path.native()).second; });
  }

  // Only files of equal decompressed content can be equal; without compression equal size comes
  // first.
  void drop_duplicates() {
    std::unordered_map<int64_t, int> of_size;
    bool compressed = false;
    const auto is_compressed = [](const Source& source) {
      return source.path.extension() == ".gz" || source.path.extension() == ".zst";
    };
    for (const Source& source : found_) {
      ++of_size[source.size];
      compressed |= is_compressed(source);
    }
    std::unordered_set<std::string> seen;
    counts_.duplicates += static_cast<int64_t>(std::erase_if(found_, [&](const Source& source) {
      const bool could_be = compressed || of_size[source.size] > 1;
      return could_be && !seen.insert(hash_of(source.path)).second;
    }));
  }

  const SourceOptions& options_;
  SourceCounts& counts_;
  std::vector<Source> found_;
};

}  // namespace

std::string SourceCounts::summary() const {
  std::vector<std::string> parts;
  const auto add = [&parts](int64_t count, const char* name) {
    if (count > 0) parts.push_back(fmt::format("{} {}", format_count(count), name));
  };
  add(not_selected, "by pattern");
  add(too_large, "too large");
  add(binary, "binary");
  add(not_utf8, "not UTF-8");
  add(empty, "empty");
  add(duplicates, "duplicates");
  add(broken_links, "broken links");
  return parts.empty() ? std::string() : "left out: " + join(parts, ", ");
}

std::vector<Source> list_sources(const SourceOptions& options, SourceCounts* counts) {
  SourceCounts own;
  SourceCounts& tally = counts ? *counts : own;
  tally = {};
  if (options.inputs.empty()) {
    throw ConfigError({.module = "text", .what = "choosing the corpus", .got = "no input"});
  }
  Lister lister(options, tally);
  for (const Path& input : options.inputs) lister.add_input(input);
  std::vector<Source> sources = lister.take();
  if (sources.empty()) {
    throw ConfigError({.module = "text",
                       .what = "choosing the corpus",
                       .got = "no file (" + tally.summary() + ")",
                       .need = "at least one text file",
                       .fix = "Check --include, --exclude and --max-file-size"});
  }
  for (const Source& source : sources) tally.kept_bytes += source.size;
  return sources;
}

std::string content_digest(const std::vector<Source>& sources) {
  Hasher hasher;
  for (const Source& source : sources) {
    hasher.update(
        fmt::format("{}:{}{} ", source.relative.size(), source.relative, hash_of(source.path)));
  }
  return hasher.hex();
}

int64_t parse_byte_size(std::string_view text, std::string_view flag) {
  static const std::map<std::string_view, double> kUnits = {
      {"", 1},       {"B", 1},        {"KB", 1e3},     {"MB", 1e6},
      {"GB", 1e9},   {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30},
      {"K", 0x1p10}, {"M", 0x1p20},   {"G", 0x1p30},   {"TiB", 0x1p40}};
  const size_t split = std::min(text.find_first_not_of("0123456789."), text.size());
  double number = -1;
  const char* const number_end = text.data() + split;
  const auto [end, code] =
      std::from_chars(text.data(), number_end, number, std::chars_format::fixed);
  std::string_view unit = text.substr(split);
  while (unit.starts_with(' ')) unit.remove_prefix(1);
  const auto factor = kUnits.find(unit);
  const bool ok = code == std::errc() && end == number_end && factor != kUnits.end() &&
                  number >= 0 && number * factor->second < 0x1p62;
  if (ok) return static_cast<int64_t>(std::llround(number * factor->second));
  throw ConfigError({.module = "text",
                     .what = "reading " + std::string(flag),
                     .got = quote(text),
                     .need = "a size like 4096, 512KiB or 1.5GiB"});
}

}  // namespace capstan::text
