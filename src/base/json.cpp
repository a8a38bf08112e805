// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/json.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iterator>
#include <vector>

#include "capstan/base/bytes.h"
#include "capstan/base/error.h"
#include "capstan/base/text.h"

namespace capstan::json {

namespace {

[[noreturn]] void throw_bad(std::string_view origin, const std::string& place,
                            const std::string& got, const std::string& need) {
  throw DataError({.module = "json",
                   .what = "reading " + std::string(origin) + place,
                   .got = got,
                   .need = need});
}

// ", line L column C" of a byte offset.
std::string place_of(std::string_view text, size_t offset) {
  const std::string_view before = text.substr(0, offset);
  const auto line = 1 + std::count(before.begin(), before.end(), '\n');
  const size_t start = before.rfind('\n') == std::string_view::npos ? 0 : before.rfind('\n') + 1;
  return fmt::format(", line {} column {}", line, before.size() - start + 1);
}

// Reads the text and tells how far the lexer has come.
struct TrackingIterator {
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  const char* at;
  const char** seen;
  reference operator*() const { return *at; }
  TrackingIterator& operator++() {
    ++at;
    if (seen != nullptr) *seen = at;
    return *this;
  }
  TrackingIterator operator++(int) {
    const TrackingIterator old = *this;
    ++*this;
    return old;
  }
  bool operator==(const TrackingIterator& other) const { return at == other.at; }
  bool operator!=(const TrackingIterator& other) const { return at != other.at; }
};

// Builds the document and refuses what a plain parse lets through.
class Builder : public nlohmann::json_sax<Json> {
 public:
  Builder(std::string_view text, std::string_view origin, int depth)
      : text_(text), origin_(origin), depth_(depth), seen_(text.data()) {}

  const char** seen() { return &seen_; }
  Json take() { return std::move(root_); }

  bool null() override { return put(Json(nullptr)); }
  bool boolean(bool value) override { return put(Json(value)); }
  bool number_integer(number_integer_t value) override { return put(Json(value)); }
  bool number_unsigned(number_unsigned_t value) override { return put(Json(value)); }
  bool number_float(number_float_t value, const string_t& digits) override {
    if (digits.find_first_of(".eE") == std::string::npos) {
      refuse("integer " + quote(digits, 40), "one of 64 bits");
    }
    if (!std::isfinite(value)) refuse("number " + quote(digits, 40), "a finite double");
    return put(Json(value));
  }
  bool string(string_t& value) override { return put(Json(std::move(value))); }
  bool binary(binary_t&) override { return false; }
  bool start_object(std::size_t) override { return open(Json::object()); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    if (stack_.back()->contains(name)) {
      refuse("key " + quote(name) + " twice in one object", "each key once");
    }
    key_ = std::move(name);
    return true;
  }
  bool parse_error(std::size_t position, const std::string& token,
                   const nlohmann::detail::exception& error) override {
    const std::string message = error.what();
    const size_t cause = message.rfind("; ");
    // "[json.exception.parse_error.101] parse error at line 1, column 2: text": keep the text.
    const size_t colon = message.find(": ");
    std::string why = colon == std::string::npos ? message : message.substr(colon + 2);
    if (cause != std::string::npos && cause + 2 < message.size()) why = message.substr(cause + 2);
    const size_t offset = position > 0 ? std::min(position - 1, text_.size()) : 0;
    throw DataError({.module = "json",
                     .what = "reading " + std::string(origin_) + place_of(text_, offset),
                     .got = token.empty() ? "unexpected text" : quote(token, 40),
                     .need = "valid JSON",
                     .why = why});
  }

 private:
  [[noreturn]] void refuse(const std::string& got, const std::string& need) const {
    throw_bad(origin_, place_of(text_, static_cast<size_t>(seen_ - text_.data())), got, need);
  }
  Json* attach(Json&& value) {
    if (stack_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    Json& parent = *stack_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    return &(parent[key_] = std::move(value));
  }
  bool put(Json&& value) {
    attach(std::move(value));
    return true;
  }
  bool open(Json&& value) {
    if (static_cast<int>(stack_.size()) >= depth_) {
      refuse(fmt::format("more than {} nested levels", depth_), "at most that");
    }
    // The pointer stays valid: a container changes only while it is the innermost one.
    stack_.push_back(attach(std::move(value)));
    return true;
  }
  bool close() {
    stack_.pop_back();
    return true;
  }

  std::string_view text_, origin_;
  int depth_;
  const char* seen_;
  Json root_;
  std::vector<Json*> stack_;
  std::string key_;
};

const char* type_name(const Json& value) {
  if (value.is_null()) return "null";
  if (value.is_boolean()) return "a boolean";
  if (value.is_number_integer()) return "an integer";
  if (value.is_number()) return "a number";
  if (value.is_string()) return "text";
  return value.is_array() ? "an array" : "an object";
}

std::string at_key(const char* key) { return std::string(", key '") + key + "'"; }

}  // namespace

Json parse(std::string_view text, std::string_view origin, const Limits& limits) {
  if (static_cast<int64_t>(text.size()) > limits.bytes) {
    throw_bad(origin, "", format_bytes(static_cast<int64_t>(text.size())),
              "at most " + format_bytes(limits.bytes));
  }
  if (const auto bad = find_invalid_utf8(text)) {
    throw_bad(origin, place_of(text, *bad), "a byte that is not UTF-8", "UTF-8 text");
  }
  if (const size_t nul = text.find('\0'); nul != std::string_view::npos) {
    throw_bad(origin, place_of(text, nul), "a NUL byte", "text");
  }
  Builder builder(text, origin, limits.depth);
  const TrackingIterator first{text.data(), builder.seen()};
  const TrackingIterator last{text.data() + text.size(), nullptr};
  if (!Json::sax_parse(first, last, &builder)) throw_bad(origin, "", "broken JSON", "valid JSON");
  return builder.take();
}

const Json& field(const Json& object, const char* key, std::string_view origin) {
  if (!object.is_object()) throw_bad(origin, at_key(key), type_name(object), "an object around it");
  const auto found = object.find(key);
  if (found == object.end()) throw_bad(origin, at_key(key), "nothing", "a value");
  return *found;
}

int64_t get_int(const Json& object, const char* key, int64_t low, int64_t high,
                std::string_view origin) {
  const Json& value = field(object, key, origin);
  const std::string need = fmt::format("an integer from {} to {}", low, high);
  if (!value.is_number_integer()) throw_bad(origin, at_key(key), type_name(value), need);
  const bool too_large = value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{INT64_MAX};
  if (too_large || value.get<int64_t>() < low || value.get<int64_t>() > high) {
    throw_bad(origin, at_key(key), value.dump(), need);
  }
  return value.get<int64_t>();
}

double get_double(const Json& object, const char* key, std::string_view origin) {
  const Json& value = field(object, key, origin);
  if (!value.is_number()) throw_bad(origin, at_key(key), type_name(value), "a number");
  return value.get<double>();
}

bool get_bool(const Json& object, const char* key, std::string_view origin) {
  const Json& value = field(object, key, origin);
  if (!value.is_boolean()) throw_bad(origin, at_key(key), type_name(value), "true or false");
  return value.get<bool>();
}

std::string get_string(const Json& object, const char* key, std::string_view origin) {
  const Json& value = field(object, key, origin);
  if (!value.is_string()) throw_bad(origin, at_key(key), type_name(value), "text");
  return value.get<std::string>();
}

std::string number(double value) {
  if (!std::isfinite(value)) return "null";
  char digits[64];
  const auto [end, error] = std::to_chars(std::begin(digits), std::end(digits), value);
  return error == std::errc() ? std::string(digits, end) : fmt::format("{:.17g}", value);
}

}  // namespace capstan::json
