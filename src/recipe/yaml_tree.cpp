// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "recipe/yaml_tree_internal.h"

#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <sstream>
#include <unordered_set>

#include "capstan/base/bytes.h"
#include "capstan/base/text.h"
#include "recipe/encoding_internal.h"

namespace capstan::recipe {
namespace {

[[noreturn]] void stop(Problem problem) { throw RecipeError({std::move(problem)}); }

class TreeBuilder final : public YAML::EventHandler {
 public:
  TreeBuilder(const Source& source, Reading& reading, std::string root_path)
      : source_(source), reading_(reading), root_path_(std::move(root_path)) {}

  [[nodiscard]] bool has_root() const { return has_root_; }
  [[nodiscard]] Node take_root() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (documents_++ > 0) {
      stop({origin(mark), "", "a second document", "one document per file", "",
            "Remove the line '---' and what follows it"});
    }
  }
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    Node node = make_node(Node::Kind::kBroken, null_place(mark));
    refuse_key_position(node.origin, "an empty key");
    refuse_anchor(node.origin, anchor);
    report(node.origin, "nothing (YAML null)", "a value", "", "Write one, or leave the key out");
    attach(std::move(node));
  }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    Node node = make_node(Node::Kind::kBroken, origin(mark));
    refuse_key_position(node.origin, "an alias as key");
    report(node.origin, "an alias", "the value itself",
           "anchors and aliases are not used in recipes", "Write the value out, or use include");
    attach(std::move(node));
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& text) override {
    Node node = make_node(Node::Kind::kScalar, origin(mark));
    node.plain = tag == "?";
    refuse_anchor(node.origin, anchor);
    if (refuse_tag(node.origin, tag)) node.kind = Node::Kind::kBroken;
    if (wants_key()) {
      take_key(text, node.origin);
      return;
    }
    node.text = text;
    attach(std::move(node));
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value style) override {
    open(Node::Kind::kList, mark, tag, anchor, style);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value style) override {
    open(Node::Kind::kMap, mark, tag, anchor, style);
  }
  void OnMapEnd() override { close(); }

 private:
  struct Frame {
    Node node;
    bool has_key = false, duplicate = false;
    std::string key;
    Origin key_origin;
    std::unordered_set<std::string> seen;
  };

  [[nodiscard]] Origin origin(const YAML::Mark& mark) const {
    if (source_.fixed || mark.is_null()) return source_.start;
    return {source_.start.file, mark.line + 1, mark.column + 1};
  }

  // The parser places a missing value at the token that follows it; the key is where people look.
  [[nodiscard]] Origin null_place(const YAML::Mark& mark) const {
    const Origin place = origin(mark);
    if (frames_.empty() || !frames_.back().has_key) return place;
    const Origin& key = frames_.back().key_origin;
    return place.line == key.line ? place : key;
  }

  Node make_node(Node::Kind kind, const Origin& place) {
    if (--reading_.nodes_left < 0) {
      stop({place, here(), fmt::format("more than {} values", format_count(kMaxNodes)),
            "a smaller recipe", "the size is bounded while reading", ""});
    }
    Node node;
    node.kind = kind;
    node.origin = place;
    return node;
  }

  [[nodiscard]] bool wants_key() const {
    return !frames_.empty() && frames_.back().node.kind == Node::Kind::kMap &&
           !frames_.back().has_key;
  }

  // Key path of what is being read.
  [[nodiscard]] std::string here() const {
    std::string path = root_path_;
    for (const Frame& frame : frames_) {
      if (frame.node.kind == Node::Kind::kList) {
        path += fmt::format("[{}]", frame.node.items.size());
      } else if (frame.has_key) {
        path = join_path(path, frame.key);
      }
    }
    return path;
  }

  void report(const Origin& place, std::string got, std::string need, std::string why,
              std::string fix) {
    reading_.problems.push_back(
        {place, here(), std::move(got), std::move(need), std::move(why), std::move(fix)});
  }

  void refuse_key_position(const Origin& place, const char* got) {
    if (wants_key()) stop({place, here(), got, "a key name", "", "Check that brackets are closed"});
  }
  void refuse_anchor(const Origin& place, YAML::anchor_t anchor) {
    if (anchor == YAML::NullAnchor) return;
    report(place, "an anchor", "a plain value", "anchors and aliases are not used in recipes",
           "Remove the word that starts with '&'");
  }
  // "?" and "!" are the parser's own marks for plain and quoted scalars.
  bool refuse_tag(const Origin& place, const std::string& tag) {
    if (tag.empty() || tag == "?" || tag == "!") return false;
    report(place, "the tag " + quote(tag), "a plain value", "tags are not used in recipes",
           "Remove the word that starts with '!'");
    return true;
  }

  void take_key(const std::string& key, const Origin& place) {
    Frame& frame = frames_.back();
    frame.has_key = true;
    frame.key = key;
    frame.key_origin = place;
    frame.duplicate = !frame.seen.insert(key).second;
    if (key == "<<") {
      frame.duplicate = true;  // the entry is dropped in the same way
      report(place, "a merge key", "a key name", "merge keys are not used in recipes",
             "Write the values out, or use include");
    } else if (frame.duplicate) {
      const Entry* first = frame.node.find_entry(key);
      report(place, "the key twice", "it once",
             first == nullptr ? "" : fmt::format("it is also in line {}", first->origin.line),
             "Remove one of them");
    }
  }

  void open(Node::Kind kind, const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
            YAML::EmitterStyle::value style) {
    Frame frame;
    frame.node = make_node(kind, origin(mark));
    frame.node.block = style == YAML::EmitterStyle::Block;
    refuse_key_position(frame.node.origin, "a map or list as key");
    refuse_anchor(frame.node.origin, anchor);
    if (refuse_tag(frame.node.origin, tag)) broken_after_close_.insert(frames_.size());
    if (frames_.size() >= static_cast<size_t>(kMaxDepth)) {
      stop({frame.node.origin, "", fmt::format("more than {} levels", kMaxDepth),
            "a flatter recipe", "the depth is bounded while reading", ""});
    }
    frames_.push_back(std::move(frame));
  }

  void close() {
    Node node = std::move(frames_.back().node);
    frames_.pop_back();
    if (broken_after_close_.erase(frames_.size()) > 0) node.kind = Node::Kind::kBroken;
    attach(std::move(node));
  }

  void attach(Node node) {
    if (frames_.empty()) {
      root_ = std::move(node);
      has_root_ = true;
      return;
    }
    Frame& frame = frames_.back();
    if (frame.node.kind == Node::Kind::kList) {
      frame.node.items.push_back(std::move(node));
      return;
    }
    if (!frame.duplicate) {
      frame.node.entries.push_back({std::move(frame.key), frame.key_origin, std::move(node)});
    }
    frame.has_key = frame.duplicate = false;
    frame.key.clear();
  }

  const Source& source_;
  Reading& reading_;
  std::string root_path_;
  std::vector<Frame> frames_;
  std::unordered_set<size_t> broken_after_close_;  // depth of collections with a tag
  Node root_;
  bool has_root_ = false;
  int documents_ = 0;
};

void check_bytes(const std::string& text, const Source& source) {
  if (static_cast<int64_t>(text.size()) > kMaxFileBytes) {
    stop({source.start, "", format_bytes(static_cast<int64_t>(text.size())),
          "at most " + format_bytes(kMaxFileBytes), "the size is bounded while reading", ""});
  }
  const auto fault = find_encoding_fault(text);
  if (!fault) return;
  Origin place = source.start;
  if (!source.fixed) {
    const Place at = place_of(text, fault->offset);
    place.line = at.line;
    place.column = at.column;
  }
  stop({place, "", fault->got, "UTF-8 text without tabs", fault->why, fault->fix});
}

// A recipe without content is thrown, an override without value is one problem among others.
Node empty_text(const Source& source, Reading& reading, const std::string& root_path) {
  if (root_path.empty()) stop({source.start, "", "nothing", "a recipe", "it is empty", ""});
  reading.problems.push_back({source.start, root_path, "nothing", "a value", "it is empty", ""});
  Node node;
  node.kind = Node::Kind::kBroken;
  return node;
}

}  // namespace

Node* Node::find(const std::string& key) {
  for (Entry& entry : entries) {
    if (entry.key == key) return &entry.value;
  }
  return nullptr;
}

const Entry* Node::find_entry(const std::string& key) const {
  for (const Entry& entry : entries) {
    if (entry.key == key) return &entry;
  }
  return nullptr;
}

std::string shown_key(std::string_view key) {
  std::string quoted = quote(key);
  return quoted == fmt::format("'{}'", key) && !key.empty() ? std::string(key) : quoted;
}

std::string join_path(std::string_view section, std::string_view key) {
  return section.empty() ? shown_key(key) : fmt::format("{}.{}", section, shown_key(key));
}

Node parse_yaml(const std::string& text, const Source& source, Reading& reading,
                const std::string& root_path) {
  check_bytes(text, source);
  TreeBuilder builder(source, reading, root_path);
  std::istringstream stream(text);
  try {
    YAML::Parser parser(stream);
    while (parser.HandleNextDocument(builder)) {
    }
  } catch (const YAML::Exception& error) {
    Origin place = source.start;
    if (!source.fixed && !error.mark.is_null()) {
      place.line = error.mark.line + 1;
      place.column = error.mark.column + 1;
    }
    stop({place, root_path, "text that is not YAML", "", error.msg,
          "Check indentation, colons and quotes"});
  }
  if (!builder.has_root()) return empty_text(source, reading, root_path);
  return builder.take_root();
}

}  // namespace capstan::recipe
