// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/data/prepare.h"

#include <gmock/gmock.h>
#include <sys/wait.h>

#include <map>

#include "capstan/data/inspect.h"
#include "capstan/data/provenance.h"
#include "data_fixture.h"

namespace capstan::data {
namespace {

using namespace testing;
using ::testing::HasSubstr;

class PrepareTest : public ::testing::Test {
 protected:
  PrepareTest() {
    for (int i = 0; i < 90; ++i) {
      const std::string name =
          "in/part" + std::to_string(i % 7) + "/file" + std::to_string(i) + ".txt";
      spill(folder_ / name, text_of(i));
      texts_["part" + std::to_string(i % 7) + "/file" + std::to_string(i) + ".txt"] = text_of(i);
    }
  }
  static std::string text_of(int i) {
    std::string text = "file " + std::to_string(i) + "\n";
    for (int k = 0; k < i * 37 % 400; ++k) text += static_cast<char>('a' + (i + k * k) % 26);
    return text;
  }
  [[nodiscard]] PrepareOptions options() const {
    PrepareOptions o;
    o.inputs = {(folder_ / "in").string()};
    o.output = (folder_ / "out/train").string();
    o.validation_output = (folder_ / "out/validation").string();
    o.validation_fraction = 0.1;
    o.workers = 2;
    return o;
  }
  [[nodiscard]] std::string output_bytes() const {
    std::string all;
    for (const char* name : {"train", "validation"}) {
      for (const char* ending : {".bin", ".idx", ".json"}) {
        all += slurp(folder_ / (std::string("out/") + name + ending)) + "|";
      }
    }
    return all;
  }
  static std::vector<std::string> decode(const Path& prefix) {
    const TokenFile file(prefix);
    std::vector<std::string> texts;
    for (int64_t d = 0; d < file.documents(); ++d) {
      const TokenRange range = file.document(d);
      std::vector<int64_t> ids(static_cast<size_t>(range.size()));
      file.read(range.first, ids);
      EXPECT_EQ(ids.back(), 256);
      texts.emplace_back(ids.begin(), ids.end() - 1);
    }
    return texts;
  }
  TempFolder folder_;
  std::map<std::string, std::string> texts_;  // by relative path
};

TEST_F(PrepareTest, SplitsByHashOfThePath_AndKeepsEveryDocument) {
  const PrepareReport report = prepare_with(options(), byte_encoder());
  EXPECT_FALSE(report.up_to_date);
  std::vector<std::string> train, validation;
  int64_t bytes = 0;
  for (const auto& [path, text] : texts_) {  // a map is sorted by path, as the sources are
    const bool is_held_out = xxh3_64(path) < static_cast<uint64_t>(0.1 * 18446744073709551616.0);
    (is_held_out ? validation : train).push_back(text);
    EXPECT_EQ(is_validation_document(path, 0.1), is_held_out);
    bytes += std::ssize(text);
  }
  EXPECT_EQ(decode(folder_ / "out/train"), train);
  EXPECT_EQ(decode(folder_ / "out/validation"), validation);
  EXPECT_GT(validation.size(), 2u);
  EXPECT_LT(validation.size(), 20u);
  ASSERT_TRUE(report.validation.has_value());
  EXPECT_EQ(report.train.text_bytes + report.validation->text_bytes, bytes);
  EXPECT_EQ(report.train.pair.tokens, report.train.text_bytes + report.train.pair.documents);
  EXPECT_EQ(report.train.source_files, 90);
  EXPECT_EQ(report.train.split, "train");
  EXPECT_EQ(report.validation->split, "validation");
}

TEST_F(PrepareTest, AnyWorkerCount_SameBytes) {
  for (int i = 0; i < 12; ++i) {  // several chunks of documents that differ in cost
    const std::string name = "in/large/" + std::to_string(i) + ".txt";
    spill(folder_ / name,
          std::string(static_cast<size_t>(i % 3 == 0 ? 400000 : 3000), static_cast<char>('a' + i)));
  }
  PrepareOptions o = options();
  std::string expected;
  for (const int workers : {1, 2, 4}) {
    o.workers = workers;
    o.output = (folder_ / ("out" + std::to_string(workers) + "/train")).string();
    o.validation_output = (folder_ / ("out" + std::to_string(workers) + "/validation")).string();
    (void)prepare_with(o, byte_encoder());
    std::string all;
    for (const std::string& prefix : {o.output, *o.validation_output}) {
      for (const char* ending : {".bin", ".idx", ".json"}) all += slurp(prefix + ending);
    }
    if (expected.empty()) expected = all;
    EXPECT_TRUE(all == expected) << workers;
  }
}

TEST_F(PrepareTest, SmallChunksAndTightMemory_SameDocuments) {
  const PrepareOptions o = options();
  PipelineOptions pipeline{.encode = byte_encoder().encode, .eos_id = 256};
  pipeline.sources = text::list_sources({.inputs = {o.inputs[0]}});
  std::vector<std::string> expected;
  for (const auto& [path, text] : texts_) expected.push_back(path + "=" + text);
  const std::vector<std::pair<int64_t, int64_t>> limits = {
      {1, 1}, {1, 1 << 20}, {500, 2000}, {1 << 20, 1 << 20}};
  for (const int workers : {1, 4}) {
    for (const auto& [chunk_bytes, in_flight_bytes] : limits) {
      pipeline.workers = workers;
      pipeline.chunk_bytes = chunk_bytes;
      pipeline.in_flight_bytes = in_flight_bytes;
      std::vector<std::string> got;
      const text::DocumentCounts counts = run_pipeline(pipeline, [&](EncodedDocument&& document) {
        got.push_back(document.key + "=" +
                      std::string(document.tokens.begin(), document.tokens.end() - 1));
      });
      EXPECT_EQ(got, expected);
      EXPECT_EQ(counts.documents, 90);
    }
  }
}

TEST_F(PrepareTest, SecondRun_IsUpToDateAndWritesNothing) {
  (void)prepare_with(options(), byte_encoder());
  const auto stamp = fs::last_write_time(folder_ / "out/train.bin");
  const PrepareReport report = prepare_with(options(), byte_encoder());
  EXPECT_TRUE(report.up_to_date);
  EXPECT_EQ(fs::last_write_time(folder_ / "out/train.bin"), stamp);
  EXPECT_GT(report.train.pair.tokens, 0);
  ASSERT_TRUE(report.validation.has_value());
  EXPECT_GT(report.validation->pair.tokens, 0);
  EXPECT_FALSE(fs::exists(folder_ / "out/train.lock"));
}

TEST_F(PrepareTest, OtherContentOrOptions_NeedForce) {
  (void)prepare_with(options(), byte_encoder());
  const std::string before = output_bytes();
  const auto expect_refused = [&](const PrepareOptions& o, const Encoder& encoder) {
    EXPECT_THAT(message_of<ConfigError>([&] { (void)prepare_with(o, encoder); }),
                HasSubstr("--force"));
    EXPECT_EQ(output_bytes(), before);
  };
  PrepareOptions o = options();
  o.validation_fraction = 0.4;
  expect_refused(o, byte_encoder());
  Encoder other = byte_encoder();
  other.fingerprint = "other";
  expect_refused(options(), other);
  spill(folder_ / "in/part0/file0.txt", "changed");
  expect_refused(options(), byte_encoder());
  o = options();
  o.force = true;
  EXPECT_FALSE(prepare_with(o, byte_encoder()).up_to_date);
  EXPECT_NE(output_bytes(), before);
  EXPECT_TRUE(prepare_with(options(), byte_encoder()).up_to_date);
}

TEST_F(PrepareTest, DamagedOutput_IsNotUpToDate) {
  (void)prepare_with(options(), byte_encoder());
  std::string bin = slurp(folder_ / "out/train.bin");
  bin[60] = static_cast<char>(bin[60] ^ 1);
  spill(folder_ / "out/train.bin", bin);
  EXPECT_THAT(message_of<DataError>([&] { (void)inspect(TokenFile(folder_ / "out/train")); }),
              HasSubstr("train.bin"));
  EXPECT_THAT(message_of<ConfigError>([&] { (void)prepare_with(options(), byte_encoder()); }),
              HasSubstr("damaged"));
  PrepareOptions o = options();
  o.force = true;
  EXPECT_FALSE(prepare_with(o, byte_encoder()).up_to_date);
  EXPECT_NO_THROW((void)inspect(TokenFile(folder_ / "out/train")));
}

TEST_F(PrepareTest, ForeignFiles_AreNotTouched) {
  spill(folder_ / "out/train.json", R"({"text": "my own corpus"})");
  PrepareOptions o = options();
  EXPECT_THAT(message_of<ConfigError>([&] { (void)prepare_with(o, byte_encoder()); }),
              HasSubstr("not of this program"));
  o.force = true;
  EXPECT_THAT(message_of<ConfigError>([&] { (void)prepare_with(o, byte_encoder()); }),
              HasSubstr("not of this program"));
  EXPECT_EQ(slurp(folder_ / "out/train.json"), R"({"text": "my own corpus"})");
  fs::remove(folder_ / "out/train.json");
  spill(folder_ / "out/train.bin", "precious");
  o.force = false;
  EXPECT_THAT(message_of<ConfigError>([&] { (void)prepare_with(o, byte_encoder()); }),
              HasSubstr("without an .idx"));
  EXPECT_EQ(slurp(folder_ / "out/train.bin"), "precious");
}

TEST_F(PrepareTest, OutputInsideTheInput_StaysOutOfTheCorpus) {
  PrepareOptions o = options();
  o.output = (folder_ / "in/train").string();
  o.validation_output = (folder_ / "in/validation").string();
  EXPECT_FALSE(prepare_with(o, byte_encoder()).up_to_date);
  const PrepareReport again = prepare_with(o, byte_encoder());
  EXPECT_TRUE(again.up_to_date);
  EXPECT_EQ(again.train.source_files, 90);
}

TEST_F(PrepareTest, Jsonl_IsSplitByLine) {
  std::string lines;
  for (int i = 0; i < 300; ++i)
    lines += "{\"id\": 1, \"body\": \"record " + std::to_string(i) + "\"}\n";
  spill(folder_ / "lines/data.jsonl", lines);
  PrepareOptions o = options();
  o.inputs = {(folder_ / "lines").string()};
  o.field = "body";
  (void)prepare_with(o, byte_encoder());
  std::vector<std::string> train, validation;
  for (int i = 0; i < 300; ++i) {
    const std::string key = "data.jsonl:" + std::to_string(i + 1);
    (is_validation_document(key, 0.1) ? validation : train)
        .push_back("record " + std::to_string(i));
  }
  EXPECT_EQ(decode(folder_ / "out/train"), train);
  EXPECT_EQ(decode(folder_ / "out/validation"), validation);
}

TEST_F(PrepareTest, BadLine_StopsWithItsNumber_OrIsCounted) {
  spill(folder_ / "lines/data.jsonl",
        "{\"text\": \"one\"}\n{\"text\": 5}\n{\"text\": \"three\"}\n");
  PrepareOptions o = options();
  o.inputs = {(folder_ / "lines").string()};
  o.validation_output.reset();
  o.validation_fraction = 0;
  EXPECT_THAT(message_of<DataError>([&] { (void)prepare_with(o, byte_encoder()); }),
              HasSubstr("data.jsonl:2"));
  EXPECT_FALSE(fs::exists(folder_ / "out/train.idx"));
  EXPECT_FALSE(fs::exists(folder_ / "out/train.bin.partial"));
  o.skip_bad_lines = true;
  const PrepareReport report = prepare_with(o, byte_encoder());
  EXPECT_EQ(report.train.bad_line_count, 1);
  EXPECT_EQ(report.train.split, "all");
  EXPECT_THAT(report.first_bad_line, HasSubstr("data.jsonl:2"));
  EXPECT_EQ(decode(folder_ / "out/train"), (std::vector<std::string>{"one", "three"}));
}

TEST_F(PrepareTest, EncoderFailure_NamesTheDocument_FirstInOrder) {
  Encoder encoder = byte_encoder();
  encoder.encode = [](std::string_view text) -> std::vector<int32_t> {
    if (text.find("file 11") != std::string_view::npos) {
      throw DataError(ErrorText{.module = "text", .what = "encoding", .got = "a byte"});
    }
    return {1};
  };
  PrepareOptions o = options();
  std::string expected;
  for (const auto& [path, text] : texts_) {
    if (expected.empty() && text.starts_with("file 11")) expected = path;
  }
  for (const int workers : {1, 4}) {
    o.workers = workers;
    EXPECT_THAT(message_of<DataError>([&] { (void)prepare_with(o, encoder); }),
                HasSubstr(expected + ": encoding"));
  }
  EXPECT_FALSE(fs::exists(folder_ / "out/train.idx"));
}

TEST_F(PrepareTest, UnusableText_IsNamed) {
  PrepareOptions o = options();
  o.inputs = {(folder_ / "nowhere").string()};
  EXPECT_THAT(message_of<ConfigError>([&] { (void)prepare_with(o, byte_encoder()); }),
              HasSubstr("nowhere"));
  fs::create_directories(folder_ / "hollow");
  o.inputs = {(folder_ / "hollow").string()};
  EXPECT_THROW((void)prepare_with(o, byte_encoder()), Error);
  spill(folder_ / "empty.txt", "");
  o.inputs = {(folder_ / "empty.txt").string()};
  EXPECT_THAT(message_of<DataError>([&] { (void)prepare_with(o, byte_encoder()); }),
              HasSubstr("empty.txt"));
}

TEST_F(PrepareTest, OneDocument_CannotBeSplit) {
  spill(folder_ / "one.txt", "only one");
  PrepareOptions o = options();
  o.inputs = {(folder_ / "one.txt").string()};
  EXPECT_THAT(message_of<ConfigError>([&] { (void)prepare_with(o, byte_encoder()); }),
              HasSubstr("at least one on each side"));
  EXPECT_FALSE(fs::exists(folder_ / "out/train.idx"));
}

TEST_F(PrepareTest, BadOptions_AreNamed) {
  const auto text_of_options = [&](const std::function<void(PrepareOptions&)>& change) {
    PrepareOptions o = options();
    change(o);
    return message_of<ConfigError>([&] { (void)prepare_with(o, byte_encoder()); });
  };
  EXPECT_THAT(text_of_options([](auto& o) { o.validation_fraction = 1; }),
              HasSubstr("--validation-fraction"));
  EXPECT_THAT(text_of_options([](auto& o) { o.validation_fraction = -0.1; }),
              HasSubstr("--validation-fraction"));
  EXPECT_THAT(text_of_options([](auto& o) { o.validation_output.reset(); }),
              HasSubstr("--validation-output"));
  EXPECT_THAT(text_of_options([](auto& o) { o.validation_output = o.output; }),
              HasSubstr("another prefix"));
  EXPECT_THAT(text_of_options([](auto& o) { o.output += ".bin"; }), HasSubstr("without an ending"));
  EXPECT_THAT(text_of_options([](auto& o) { o.output += "/"; }), HasSubstr("--output"));
  EXPECT_THAT(text_of_options([](auto& o) { o.inputs.clear(); }), HasSubstr("--input"));
}

TEST_F(PrepareTest, SecondWriterOfAPrefix_IsRefused) {
  fs::create_directories(folder_ / "out");
  std::string holder;
  const auto lock = LockFile::try_acquire(folder_ / "out/train.lock", "somebody else\n", &holder);
  ASSERT_TRUE(lock);
  EXPECT_THAT(message_of<EnvError>([&] { (void)prepare_with(options(), byte_encoder()); }),
              HasSubstr("somebody else"));
}

TEST(IsValidationDocument, SharesFollowTheFraction_AndGrowMonotonically) {
  int at_2 = 0, at_10 = 0;
  for (int i = 0; i < 20000; ++i) {
    const std::string key = "some/path/" + std::to_string(i) + ".h";
    const bool low = is_validation_document(key, 0.02), high = is_validation_document(key, 0.1);
    EXPECT_TRUE(!low || high);
    at_2 += low ? 1 : 0;
    at_10 += high ? 1 : 0;
    EXPECT_FALSE(is_validation_document(key, 0));
  }
  EXPECT_NEAR(at_2, 400, 80);  // four deviations
  EXPECT_NEAR(at_10, 2000, 170);
}

// Runs `prepare_with` in a child that dies without any clean-up at stage `k`; false when it came to
// its end.
bool die_at_stage(const PrepareOptions& options, int k) {
  const pid_t child = ::fork();
  if (child == 0) {
    int seen = 0;
    int code = 0;
    try {
      (void)prepare_with(options, byte_encoder(), [&](std::string_view) {
        if (seen++ == k) ::_exit(77);
      });
    } catch (...) {
      code = 1;
    }
    ::_exit(code);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_NE(WEXITSTATUS(status), 1);
  return WEXITSTATUS(status) == 77;
}

// Whatever can be opened must be whole.
void expect_no_half_pair(const PrepareOptions& options) {
  for (const std::string& prefix : {options.output, *options.validation_output}) {
    try {
      const TokenFile file(prefix);
      EXPECT_TRUE(inspect(file).provenance.has_value());
    } catch (const ConfigError&) {
      EXPECT_FALSE(fs::exists(prefix + ".idx") && fs::exists(prefix + ".bin"));
    }
  }
}

TEST_F(PrepareTest, KilledAtAnyStage_NoHalfPair_AndTheNextRunFinishes) {
  (void)prepare_with(options(), byte_encoder());
  const std::string expected = output_bytes();
  int stages = 0;
  for (int k = 0;; ++k) {
    fs::remove_all(folder_ / "out");
    if (!die_at_stage(options(), k)) break;
    ++stages;
    SCOPED_TRACE(k);
    expect_no_half_pair(options());
    EXPECT_FALSE(prepare_with(options(), byte_encoder()).up_to_date);
    EXPECT_EQ(output_bytes(), expected);
    for (const auto& entry : fs::directory_iterator(folder_ / "out")) {
      EXPECT_NE(entry.path().extension(), ".partial") << entry.path();
    }
  }
  EXPECT_EQ(stages, 10);  // finish, remove, .json, .bin and .idx of two pairs
}

TEST_F(PrepareTest, KilledWhileReplacing_NoMixedPair) {
  PrepareOptions old = options();
  old.validation_fraction = 0.3;
  PrepareOptions replacing = options();
  replacing.force = true;
  for (int k = 0;; ++k) {
    fs::remove_all(folder_ / "out");
    (void)prepare_with(old, byte_encoder());
    if (!die_at_stage(replacing, k)) break;
    SCOPED_TRACE(k);
    expect_no_half_pair(options());
    (void)prepare_with(replacing, byte_encoder());
    expect_no_half_pair(options());
    EXPECT_TRUE(prepare_with(options(), byte_encoder()).up_to_date);
  }
}

TEST_F(PrepareTest, KilledWhileReading_LeavesNoPair) {
  const pid_t child = ::fork();
  if (child == 0) {
    Encoder encoder = byte_encoder();
    encoder.encode = [](std::string_view text) -> std::vector<int32_t> {
      if (text.starts_with("file 60\n")) ::_exit(77);
      return {1, 2};
    };
    (void)prepare_with(options(), encoder);
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  ASSERT_EQ(WEXITSTATUS(status), 77);
  EXPECT_TRUE(fs::exists(folder_ / "out/train.bin.partial"));
  expect_no_half_pair(options());
  EXPECT_FALSE(prepare_with(options(), byte_encoder()).up_to_date);
  EXPECT_FALSE(fs::exists(folder_ / "out/train.bin.partial"));
}

TEST_F(PrepareTest, Provenance_RoundTrips_AndNamesDamage) {
  const PrepareReport report = prepare_with(options(), byte_encoder());
  const auto read = read_provenance(folder_ / "out/train");
  ASSERT_TRUE(read.has_value());
  EXPECT_EQ(to_json(*read), to_json(report.train));
  EXPECT_TRUE(is_same_source(*read, report.train));
  EXPECT_FALSE(is_same_source(*read, *report.validation));
  EXPECT_FALSE(read_provenance(folder_ / "out/nothing").has_value());

  const std::string json = slurp(folder_ / "out/train.json");
  const auto damage = [&](const std::string& from, const std::string& to) {
    std::string changed = json;
    const size_t at = changed.find(from);
    EXPECT_NE(at, std::string::npos);
    changed.replace(at, from.size(), to);
    spill(folder_ / "out/train.json", changed);
    return message_of<DataError>([&] { (void)read_provenance(TokenFile(folder_ / "out/train")); });
  };
  EXPECT_THAT(damage("\"version\": 1", "\"version\": 2"), HasSubstr("version"));
  EXPECT_THAT(damage("\"eos_id\": 256", "\"eos_id\": 257"), HasSubstr("eos_id"));
  EXPECT_THAT(damage("\"include\": []", "\"include\": [5]"), HasSubstr("include"));
  EXPECT_THAT(damage("\"documents\": ", "\"documents\": 1"), HasSubstr("not made together"));
  EXPECT_THAT(damage("\"text_bytes\"", "\"text_byte\""), HasSubstr("text_bytes"));
}

}  // namespace
}  // namespace capstan::data
