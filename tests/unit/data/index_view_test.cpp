// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include <functional>

#include "capstan/base/philox.h"
#include "data/index_internal.h"
#include "data_fixture.h"

namespace capstan::data {
namespace {

using namespace testing;
using ::testing::HasSubstr;

// Three sequences of 4, 0 and 3 uint16 tokens; documents {0}, {1, 2}.
struct Index {
  std::string magic = std::string("MMIDIDX\0\0", 9);
  uint64_t version = 1;
  uint8_t code = 8;
  uint64_t sequences = 3, documents = 3;
  std::vector<int32_t> lengths = {4, 0, 3};
  std::vector<int64_t> pointers = {0, 8, 8}, starts = {0, 1, 3};
  std::string tail;

  [[nodiscard]] std::string bytes() const {
    std::string out = magic;
    const auto put = [&](const void* data, size_t size) {
      out.append(static_cast<const char*>(data), size);
    };
    put(&version, sizeof version);
    put(&code, sizeof code);
    put(&sequences, sizeof sequences);
    put(&documents, sizeof documents);
    put(lengths.data(), lengths.size() * sizeof lengths[0]);
    put(pointers.data(), pointers.size() * sizeof pointers[0]);
    put(starts.data(), starts.size() * sizeof starts[0]);
    return out + tail;
  }
};

IndexView view_of(const std::string& bytes, int64_t bin_bytes) {
  return IndexView(std::as_bytes(std::span(bytes)), bin_bytes, "x.idx");
}

TEST(IndexView, ReadsAWholeIndex) {
  const std::string bytes = Index().bytes();
  const IndexView view = view_of(bytes, 14);
  EXPECT_EQ(view.type(), TokenType::kUint16);
  EXPECT_EQ(view.sequences(), 3);
  EXPECT_EQ(view.documents(), 2);
  EXPECT_EQ(view.tokens(), 7);
  EXPECT_EQ(view.document(0).first, 0);
  EXPECT_EQ(view.document(0).last, 4);
  EXPECT_EQ(view.document(1).first, 4);
  EXPECT_EQ(view.document(1).last, 7);
}

struct Damage {
  const char* name;
  std::function<void(Index&)> apply;
  const char* field;  // what the message must name
  const char* detail;
  int64_t bin_bytes = 14;
};

TEST(IndexView, EveryDamagedField_IsNamed) {
  constexpr uint64_t kHuge = uint64_t{1} << 63;
  const std::vector<Damage> table = {
      {"magic", [](Index& i) { i.magic[3] = 'X'; }, "field magic", "MMIDIDX"},
      {"version", [](Index& i) { i.version = 2; }, "field version", "got 2, need 1"},
      {"version zero", [](Index& i) { i.version = 0; }, "field version", "got 0, need 1"},
      {"dtype 99", [](Index& i) { i.code = 99; }, "field dtype code", "got 99"},
      {"dtype float", [](Index& i) { i.code = 7; }, "field dtype code", "7 (float32)"},
      {"dtype int64", [](Index& i) { i.code = 5; }, "field dtype code", "5 (int64)"},
      {"sequences huge", [](Index& i) { i.sequences = kHuge; }, "field sequence count",
       "9223372036854775808"},
      {"sequences max", [](Index& i) { i.sequences = ~uint64_t{0}; }, "field sequence count",
       "at most"},
      {"documents huge", [](Index& i) { i.documents = kHuge; }, "field document count",
       "9223372036854775808"},
      {"documents max", [](Index& i) { i.documents = ~uint64_t{0}; }, "field document count",
       "at most"},
      // 12 * s + 8 * d wraps to the real size when it is computed in 64 bits.
      {"sum wraps", [](Index& i) { i.sequences = 3 + (uint64_t{1} << 62); }, "field sequence count",
       "at most"},
      {"one sequence more", [](Index& i) { i.sequences = 4; }, "field file size", "need"},
      {"one document less", [](Index& i) { i.documents = 2; }, "field file size", "need"},
      {"no documents",
       [](Index& i) {
         i.documents = 1;
         i.starts = {0};
       },
       "field document count", "no text"},
      {"no sequences",
       [](Index& i) {
         i.sequences = 0;
         i.lengths.clear();
         i.pointers.clear();
         i.starts = {0, 0, 0};
       },
       "field sequence count", "no text"},
      {"trailing bytes", [](Index& i) { i.tail = "abcd"; }, "field file size", "got"},
      {"sequence modes", [](Index& i) { i.tail = std::string(3, '\0'); }, "sequence modes",
       "multimodal"},
      {"length negative", [](Index& i) { i.lengths[1] = -1; }, "field length[1]", "got -1"},
      {"length too long", [](Index& i) { i.lengths[2] = 4; }, "field length[2]",
       "shorter than its index"},
      {"length max", [](Index& i) { i.lengths[2] = INT32_MAX; }, "field length[2]",
       "shorter than its index"},
      {"length short", [](Index& i) { i.lengths[2] = 2; }, "field lengths",
       "longer than its index"},
      {"pointer negative", [](Index& i) { i.pointers[1] = -8; }, "field pointer[1]", "got -8"},
      {"pointer out of range", [](Index& i) { i.pointers[2] = 16; }, "field pointer[2]",
       "size of the .bin"},
      {"pointer max", [](Index& i) { i.pointers[2] = INT64_MAX; }, "field pointer[2]",
       "size of the .bin"},
      {"pointer backwards", [](Index& i) { i.pointers[2] = 4; }, "field pointer[2]", "backwards"},
      {"pointer gap", [](Index& i) { i.pointers[1] = 10; }, "field pointer[1]", "without a gap"},
      {"first pointer", [](Index& i) { i.pointers[0] = 2; }, "field pointer[0]", "need 0"},
      {"bin short", [](Index&) {}, "field length[2]", "shorter than its index", 12},
      {"bin empty", [](Index&) {}, "field length[0]", "shorter than its index", 0},
      {"bin long", [](Index&) {}, "field lengths", "longer than its index", 16},
      {"first document", [](Index& i) { i.starts[0] = 1; }, "document index[0]",
       "starts at sequence 0"},
      {"document negative", [](Index& i) { i.starts[1] = -1; }, "document index[1]", "got -1"},
      {"document out of range", [](Index& i) { i.starts[1] = 4; }, "document index[1]", "0 to 3"},
      {"last document", [](Index& i) { i.starts[2] = 2; }, "document index[2]", "last document"},
      {"documents backwards",
       [](Index& i) {
         i.documents = 4;
         i.starts = {0, 2, 1, 3};
       },
       "document index[2]", "backwards"},
      {"only empty sequences",
       [](Index& i) {
         i.lengths = {0, 0, 0};
         i.pointers = {0, 0, 0};
       },
       "field lengths", "at least one", 0},
  };
  for (const Damage& damage : table) {
    SCOPED_TRACE(damage.name);
    Index index;
    damage.apply(index);
    const std::string bytes = index.bytes();
    const std::string text = message_of<DataError>([&] { (void)view_of(bytes, damage.bin_bytes); });
    EXPECT_THAT(text, HasSubstr("x.idx"));
    EXPECT_THAT(text, HasSubstr(damage.field));
    EXPECT_THAT(text, HasSubstr(damage.detail));
  }
}

TEST(IndexView, CutAnywhere_IsRefused) {
  const std::string bytes = Index().bytes();
  for (size_t size = 0; size < bytes.size(); ++size) {
    const std::string part = bytes.substr(0, size);
    EXPECT_THROW((void)view_of(part, 14), DataError) << size;
  }
}

// Whatever passes the checks must be safe to use in full.
TEST(IndexView, TenThousandMutations_ReturnOrThrowOurError) {
  const std::string original = Index().bytes();
  int accepted = 0;
  for (uint64_t i = 0; i < 10000; ++i) {
    std::string bytes = original;
    const uint64_t changes = 1 + philox::bits64(7, 0, i) % 4;
    for (uint64_t c = 0; c < changes; ++c) {
      const uint64_t draw = philox::bits64(7, 1 + c, i);
      const size_t at = draw % bytes.size();
      switch (draw >> 40 & 3) {
        case 0:
          bytes[at] = static_cast<char>(draw >> 48);
          break;
        case 1:
          bytes[at] = static_cast<char>(bytes[at] ^ 1 << (draw >> 48 & 7));
          break;
        case 2:
          bytes[at] = static_cast<char>(draw >> 48 & 1 ? 0xff : 0x00);
          break;
        default:
          bytes.resize(std::max<size_t>(at, 1));
          break;
      }
    }
    const auto bin_bytes = static_cast<int64_t>(i % 3 == 0 ? 14 : philox::bits64(7, 9, i) % 32);
    try {
      const IndexView view = view_of(bytes, bin_bytes);
      ++accepted;
      int64_t sum = 0;
      for (int64_t d = 0; d < view.documents(); ++d) {
        const TokenRange range = view.document(d);
        ASSERT_LE(0, range.first);
        ASSERT_LE(range.first, range.last);
        ASSERT_LE(range.last, view.tokens());
        sum += range.size();
      }
      ASSERT_EQ(sum, view.tokens());
      ASSERT_EQ(view.tokens() * size_of(view.type()), bin_bytes);
    } catch (const Error&) {
    }
  }
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, 2000);
}

}  // namespace
}  // namespace capstan::data
