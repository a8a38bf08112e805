// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "capstan/base/error.h"
#include "capstan/text/documents.h"

namespace capstan::text {
namespace {

constexpr size_t kInputBlock = 256 * 1024;
constexpr int64_t kExpansionFloor = int64_t{64} << 20;

[[noreturn]] void damaged(const Path& path, const std::string& got, const std::string& need) {
  throw DataError({.module = "text",
                   .what = "decompressing " + path.string(),
                   .got = got,
                   .need = need,
                   .fix = "Fetch or make the file again"});
}

class RawFile {
 public:
  explicit RawFile(Path path) : path_(std::move(path)) {
    descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor_ < 0) fail("opening");
    ::posix_fadvise(descriptor_, 0, 0, POSIX_FADV_SEQUENTIAL);
  }
  ~RawFile() { ::close(descriptor_); }
  RawFile(const RawFile&) = delete;
  RawFile& operator=(const RawFile&) = delete;

  size_t read(char* data, size_t size) {
    for (;;) {
      const ssize_t count = ::read(descriptor_, data, size);
      if (count >= 0) return static_cast<size_t>(count);
      if (errno != EINTR) fail("reading");
    }
  }
  [[nodiscard]] const Path& path() const { return path_; }

 private:
  [[noreturn]] void fail(const char* action) const {
    throw EnvError({.module = "text",
                    .what = fmt::format("{} {}", action, path_.string()),
                    .got = std::strerror(errno)});
  }
  Path path_;
  int descriptor_ = -1;
};

}  // namespace

class ByteStream::Decoder {
 public:
  virtual ~Decoder() = default;
  virtual size_t read(char* data, size_t size) = 0;
};

namespace {

class PlainDecoder final : public ByteStream::Decoder {
 public:
  explicit PlainDecoder(const Path& path) : file_(path) {}
  size_t read(char* data, size_t size) override { return file_.read(data, size); }

 private:
  RawFile file_;
};

// What gzip and zstd share: blocks of input and the limit on expansion.
class CompressedInput {
 public:
  CompressedInput(const Path& path, int64_t max_expansion)
      : file_(path), max_expansion_(max_expansion), block_(kInputBlock) {}
  // False at the end of the file.
  bool refill() {
    size_ = file_.read(block_.data(), block_.size());
    total_ += static_cast<int64_t>(size_);
    return size_ > 0;
  }
  [[nodiscard]] char* data() { return block_.data(); }
  [[nodiscard]] size_t size() const { return size_; }
  [[nodiscard]] const Path& path() const { return file_.path(); }
  void count_output(size_t bytes) {
    output_ += static_cast<int64_t>(bytes);
    if (output_ <= kExpansionFloor || output_ / max_expansion_ <= total_) return;
    damaged(path(), fmt::format("{} bytes out of {}", output_, total_),
            fmt::format("at most {} bytes per compressed byte", max_expansion_));
  }

 private:
  RawFile file_;
  int64_t max_expansion_, total_ = 0, output_ = 0;
  std::vector<char> block_;
  size_t size_ = 0;
};

class GzipDecoder final : public ByteStream::Decoder {
 public:
  GzipDecoder(const Path& path, int64_t max_expansion) : input_(path, max_expansion) {
    if (inflateInit2(&stream_, 15 + 16) != Z_OK) throw std::bad_alloc();
  }
  ~GzipDecoder() override { inflateEnd(&stream_); }
  GzipDecoder(const GzipDecoder&) = delete;
  GzipDecoder& operator=(const GzipDecoder&) = delete;

  size_t read(char* data, size_t size) override {
    stream_.next_out = reinterpret_cast<Bytef*>(data);
    stream_.avail_out = static_cast<uInt>(std::min<size_t>(size, 1u << 30));
    const uInt wanted = stream_.avail_out;
    while (stream_.avail_out == wanted && !done_) step();
    const size_t count = wanted - stream_.avail_out;
    input_.count_output(count);
    return count;
  }

 private:
  void step() {
    if (stream_.avail_in == 0) {
      const bool more = input_.refill();
      if (!more && between_members_) return void(done_ = true);
      if (!more) damaged(input_.path(), "the end of the file", "the end of the gzip stream");
      stream_.next_in = reinterpret_cast<Bytef*>(input_.data());
      stream_.avail_in = static_cast<uInt>(input_.size());
    }
    if (between_members_ && started_) {
      if (*stream_.next_in != 0x1f)
        damaged(input_.path(), "other bytes after the stream", "its end");
      inflateReset(&stream_);
    }
    between_members_ = false;
    started_ = true;
    const int result = inflate(&stream_, Z_NO_FLUSH);
    if (result == Z_STREAM_END) return void(between_members_ = true);
    if (result == Z_OK || result == Z_BUF_ERROR) return;
    damaged(input_.path(), stream_.msg ? stream_.msg : zError(result), "a gzip stream");
  }

  CompressedInput input_;
  z_stream stream_{};
  bool started_ = false, between_members_ = false, done_ = false;
};

class ZstdDecoder final : public ByteStream::Decoder {
 public:
  ZstdDecoder(const Path& path, int64_t max_expansion)
      : input_(path, max_expansion), context_(ZSTD_createDCtx()) {
    if (!context_) throw std::bad_alloc();
  }
  ~ZstdDecoder() override { ZSTD_freeDCtx(context_); }
  ZstdDecoder(const ZstdDecoder&) = delete;
  ZstdDecoder& operator=(const ZstdDecoder&) = delete;

  size_t read(char* data, size_t size) override {
    ZSTD_outBuffer out{data, size, 0};
    while (out.pos == 0 && !done_) {
      if (in_.pos == in_.size && !flush_pending_ && !refill()) break;
      const size_t result = ZSTD_decompressStream(context_, &out, &in_);
      if (ZSTD_isError(result)) damaged(input_.path(), ZSTD_getErrorName(result), "a zstd stream");
      inside_frame_ = result != 0;
      flush_pending_ = out.pos == out.size;
    }
    input_.count_output(out.pos);
    return out.pos;
  }

 private:
  bool refill() {
    if (input_.refill()) {
      in_ = {input_.data(), input_.size(), 0};
      return true;
    }
    if (inside_frame_) damaged(input_.path(), "the end of the file", "the end of the zstd frame");
    done_ = true;
    return false;
  }

  CompressedInput input_;
  ZSTD_DCtx* context_;
  ZSTD_inBuffer in_{nullptr, 0, 0};
  bool inside_frame_ = true;  // an empty file is not a zstd stream
  bool flush_pending_ = false, done_ = false;
};

}  // namespace

ByteStream::ByteStream(const Path& path, int64_t max_expansion) {
  const Path extension = path.extension();
  if (extension == ".gz") {
    decoder_ = std::make_unique<GzipDecoder>(path, max_expansion);
  } else if (extension == ".zst") {
    decoder_ = std::make_unique<ZstdDecoder>(path, max_expansion);
  } else {
    decoder_ = std::make_unique<PlainDecoder>(path);
  }
}

ByteStream::~ByteStream() = default;
ByteStream::ByteStream(ByteStream&&) noexcept = default;
ByteStream& ByteStream::operator=(ByteStream&&) noexcept = default;

size_t ByteStream::read(char* data, size_t size) {
  return size == 0 ? 0 : decoder_->read(data, size);
}

}  // namespace capstan::text
