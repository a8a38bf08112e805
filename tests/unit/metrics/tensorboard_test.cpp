// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/metrics/tensorboard.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <map>
#include <protozero/pbf_reader.hpp>
#include <string>

#include "unit/metrics/temporary_folder.h"

namespace capstan::metrics {
namespace {

using protozero::pbf_reader;

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

uint64_t number_at(std::string_view text, size_t at, int bytes) {
  uint64_t value = 0;
  for (int i = bytes - 1; i >= 0; --i) {
    value = value << 8 | static_cast<uint8_t>(text[at + static_cast<size_t>(i)]);
  }
  return value;
}

// Payloads of a TFRecord file; fails the test on a wrong length or checksum.
std::vector<std::string> read_records(const std::string& text) {
  std::vector<std::string> records;
  size_t at = 0;
  while (at < text.size()) {
    if (at + 12 > text.size()) {
      ADD_FAILURE() << "torn header";
      break;
    }
    const uint64_t length = number_at(text, at, 8);
    EXPECT_EQ(number_at(text, at + 8, 4), masked_crc32c(bytes_of(text.substr(at, 8))));
    if (at + 16 + length > text.size()) {
      ADD_FAILURE() << "torn record";
      break;
    }
    records.push_back(text.substr(at + 12, length));
    EXPECT_EQ(number_at(text, at + 12 + length, 4), masked_crc32c(bytes_of(records.back())));
    at += 16 + length;
  }
  return records;
}

struct Decoded {
  double wall_time = 0;
  int64_t step = 0;
  std::string version, tag, text, plugin;
  float scalar = std::numeric_limits<float>::quiet_NaN();
  std::map<int, double> histogram;
  std::vector<double> limits, counts;
};

void decode_histogram(pbf_reader message, Decoded& out) {
  while (message.next()) {
    if (message.tag() <= 5) {
      const int field = static_cast<int>(message.tag());
      out.histogram[field] = message.get_double();
    } else {
      auto& target = message.tag() == 6 ? out.limits : out.counts;
      for (const double value : message.get_packed_double()) target.push_back(value);
    }
  }
}

void decode_value(pbf_reader message, Decoded& out) {
  while (message.next()) {
    switch (message.tag()) {
      case 1:
        out.tag = message.get_string();
        break;
      case 2:
        out.scalar = message.get_float();
        break;
      case 5:
        decode_histogram(message.get_message(), out);
        break;
      case 8: {
        pbf_reader tensor = message.get_message();
        while (tensor.next()) {
          if (tensor.tag() == 8) {
            out.text = tensor.get_string();
          } else if (tensor.tag() == 1) {
            EXPECT_EQ(tensor.get_int32(), 7);
          } else {
            tensor.skip();
          }
        }
        break;
      }
      case 9: {
        pbf_reader metadata = message.get_message();
        if (metadata.next(1)) {
          pbf_reader plugin = metadata.get_message();
          if (plugin.next(1)) out.plugin = plugin.get_string();
        }
        break;
      }
      default:
        message.skip();
    }
  }
}

Decoded decode(const std::string& payload) {
  Decoded out;
  pbf_reader message(payload);
  while (message.next()) {
    switch (message.tag()) {
      case 1:
        out.wall_time = message.get_double();
        break;
      case 2:
        out.step = message.get_int64();
        break;
      case 3:
        out.version = message.get_string();
        break;
      case 5: {
        pbf_reader summary = message.get_message();
        while (summary.next(1)) decode_value(summary.get_message(), out);
        break;
      }
      default:
        message.skip();
    }
  }
  return out;
}

// RFC 3720, appendix B.4.
TEST(Crc32c, KnownAnswers) {
  EXPECT_EQ(crc32c({}), 0u);
  EXPECT_EQ(crc32c(bytes_of("123456789")), 0xE3069283u);
  EXPECT_EQ(crc32c(bytes_of(std::string(32, '\0'))), 0x8A9136AAu);
  EXPECT_EQ(crc32c(bytes_of(std::string(32, '\xff'))), 0x62A8AB43u);
  EXPECT_EQ(masked_crc32c({}), 0xA282EAD8u);
}

using Tensorboard = TemporaryFolder;

TEST_F(Tensorboard, Events_DecodeToWhatWasAdded) {
  Path path;
  {
    TensorboardWriter writer(folder_ / "tensorboard");
    path = writer.path();
    EXPECT_THAT(path.filename().native(), testing::StartsWith("events.out.tfevents."));
    writer.add_scalar("train/loss", 5.25, 120);
    writer.add_scalar("train/loss", std::nan(""), int64_t{1} << 40);
    writer.add_text("run/start", "**hello**", 0);
    writer.add_histogram("grad", make_histogram(std::vector<float>{-1.0f, 0.0f, 2.0f, 2.0f}), 7);
    EXPECT_EQ(writer.dropped(), 0);
    EXPECT_NE(TensorboardWriter(folder_ / "tensorboard").path(), path);
  }
  const std::vector<std::string> records = read_records(read_file(path));
  ASSERT_EQ(records.size(), 5u);
  EXPECT_EQ(decode(records[0]).version, "brain.Event:2");
  EXPECT_GT(decode(records[0]).wall_time, 1.6e9);
  const Decoded scalar = decode(records[1]);
  EXPECT_EQ(scalar.tag, "train/loss");
  EXPECT_EQ(scalar.step, 120);
  EXPECT_EQ(scalar.scalar, 5.25f);
  EXPECT_EQ(decode(records[2]).step, int64_t{1} << 40);
  EXPECT_TRUE(std::isnan(decode(records[2]).scalar));
  const Decoded text = decode(records[3]);
  EXPECT_EQ(text.text, "**hello**");
  EXPECT_EQ(text.plugin, "text");
  const Decoded histogram = decode(records[4]);
  EXPECT_EQ(histogram.histogram,
            (std::map<int, double>{{1, -1.0}, {2, 2.0}, {3, 4.0}, {4, 3.0}, {5, 9.0}}));
  EXPECT_EQ(histogram.limits.size(), histogram.counts.size());
}

TEST_F(Tensorboard, BrokenByte_IsSeenByTheReader) {
  Path path;
  {
    TensorboardWriter writer(folder_);
    path = writer.path();
  }
  std::string text = read_file(path);
  const auto check = [&] { return masked_crc32c(bytes_of(text.substr(12, text.size() - 16))); };
  const uint32_t good = check();
  text[20] = static_cast<char>(text[20] ^ 1);
  EXPECT_NE(check(), good);
}

TEST(Histogram, Buckets_HoldTheirValues) {
  std::vector<float> values;
  for (int i = -500; i <= 500; ++i) values.push_back(static_cast<float>(i) * 0.01f);
  values.push_back(std::numeric_limits<float>::infinity());
  values.push_back(std::nanf(""));
  const Histogram histogram = make_histogram(values);
  EXPECT_EQ(histogram.count, 1001);
  ASSERT_EQ(histogram.limits.size(), histogram.counts.size());
  double total = 0;
  for (size_t i = 0; i < histogram.counts.size(); ++i) {
    total += histogram.counts[i];
    if (i > 0) {
      EXPECT_LT(histogram.limits[i - 1], histogram.limits[i]);
    }
    double inside = 0;
    const double low = i > 0 ? histogram.limits[i - 1] : -std::numeric_limits<double>::infinity();
    for (const float value : values) {
      if (std::isfinite(value) && value >= low && value < histogram.limits[i]) ++inside;
    }
    EXPECT_EQ(histogram.counts[i], inside) << i;
  }
  EXPECT_EQ(total, 1001);
  EXPECT_LT(histogram.limits.front(), -4.99);
  EXPECT_GT(histogram.limits.back(), 5.0);
}

TEST(Histogram, Extremes) {
  const Histogram empty = make_histogram({});
  EXPECT_EQ(empty.count, 0);
  EXPECT_EQ(empty.limits.size(), empty.counts.size());
  const float most = std::numeric_limits<float>::max();
  const Histogram wide = make_histogram(std::vector<float>{-most, most});
  EXPECT_EQ(wide.count, 2);
  double total = 0;
  for (const double count : wide.counts) total += count;
  EXPECT_EQ(total, 2);
}

}  // namespace
}  // namespace capstan::metrics
