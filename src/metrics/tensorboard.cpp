// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/metrics/tensorboard.h"

#include <fmt/format.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <functional>
#include <protozero/pbf_writer.hpp>
#include <string>
#include <system_error>

#include "capstan/base/env.h"
#include "metrics/append_file_internal.h"

namespace capstan::metrics {

namespace {

using protozero::pbf_writer;

// Field numbers of tensorflow/core/util/event.proto,
// framework/{summary,tensor,tensor_shape,types}.proto.
namespace event {
constexpr int kWallTime = 1, kStep = 2, kFileVersion = 3, kSummary = 5;
}
namespace value {
constexpr int kTag = 1, kSimpleValue = 2, kHistogram = 5, kTensor = 8, kMetadata = 9;
}
constexpr int kSummaryValue = 1, kDataTypeString = 7, kDataClassTensor = 2;

double wall_time() {
  timespec now = {};
  ::clock_gettime(CLOCK_REALTIME, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

std::string little_endian(uint64_t number, int bytes) {
  std::string out;
  for (int i = 0; i < bytes; ++i) out += static_cast<char>(number >> (8 * i) & 0xFF);
  return out;
}

uint32_t checksum(const std::string& text) {
  return masked_crc32c(std::as_bytes(std::span(text.data(), text.size())));
}

std::string frame(const std::string& payload) {
  const std::string length = little_endian(payload.size(), 8);
  return length + little_endian(checksum(length), 4) + payload +
         little_endian(checksum(payload), 4);
}

std::string file_name() {
  static std::atomic<int> number{0};
  return fmt::format("events.out.tfevents.{}.{}.{}.{}", static_cast<int64_t>(wall_time()),
                     host_name(), ::getpid(), number.fetch_add(1));
}

void put_text(pbf_writer& out, std::string_view markdown) {
  {
    pbf_writer tensor(out, value::kTensor);
    tensor.add_int32(1, kDataTypeString);
    {
      pbf_writer shape(tensor, 2);
      pbf_writer dimension(shape, 2);
      dimension.add_int64(1, 1);
    }
    tensor.add_bytes(8, markdown.data(), markdown.size());
  }
  pbf_writer metadata(out, value::kMetadata);
  {
    pbf_writer plugin(metadata, 1);
    plugin.add_string(1, "text");
  }
  metadata.add_enum(4, kDataClassTensor);
}

void put_histogram(pbf_writer& out, const Histogram& histogram) {
  pbf_writer proto(out, value::kHistogram);
  proto.add_double(1, histogram.min);
  proto.add_double(2, histogram.max);
  proto.add_double(3, histogram.count);
  proto.add_double(4, histogram.sum);
  proto.add_double(5, histogram.sum_squares);
  proto.add_packed_double(6, histogram.limits.begin(), histogram.limits.end());
  proto.add_packed_double(7, histogram.counts.begin(), histogram.counts.end());
}

}  // namespace

struct TensorboardWriter::State {
  explicit State(const Path& directory) : file(directory / file_name(), "TensorBoard") {
    std::string payload;
    pbf_writer message(payload);
    message.add_double(event::kWallTime, wall_time());
    message.add_string(event::kFileVersion, "brain.Event:2");
    file.append(frame(payload));
  }

  void put(std::string_view tag, int64_t step, const std::function<void(pbf_writer&)>& fill) {
    std::string payload;
    {
      pbf_writer message(payload);
      message.add_double(event::kWallTime, wall_time());
      message.add_int64(event::kStep, step);
      pbf_writer summary(message, event::kSummary);
      pbf_writer entry(summary, kSummaryValue);
      entry.add_string(value::kTag, tag.data(), tag.size());
      fill(entry);
    }
    file.append(frame(payload));
  }

  internal::AppendFile file;
};

TensorboardWriter::TensorboardWriter(const Path& directory)
    : state_(std::make_unique<State>(directory)) {}
TensorboardWriter::~TensorboardWriter() = default;

void TensorboardWriter::add_scalar(std::string_view tag, double number, int64_t step) {
  state_->put(tag, step, [&](pbf_writer& out) {
    out.add_float(value::kSimpleValue, static_cast<float>(number));
  });
}

void TensorboardWriter::add_text(std::string_view tag, std::string_view markdown, int64_t step) {
  state_->put(tag, step, [&](pbf_writer& out) { put_text(out, markdown); });
}

void TensorboardWriter::add_histogram(std::string_view tag, const Histogram& histogram,
                                      int64_t step) {
  state_->put(tag, step, [&](pbf_writer& out) { put_histogram(out, histogram); });
}

const Path& TensorboardWriter::path() const { return state_->file.path(); }
int64_t TensorboardWriter::dropped() const { return state_->file.dropped(); }

}  // namespace capstan::metrics
