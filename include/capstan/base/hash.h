// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// XXH3 hashes (xxHash), written as lower-case hexadecimal.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace capstan {

[[nodiscard]] uint64_t xxh3_64(std::span<const std::byte> bytes, uint64_t seed = 0);
[[nodiscard]] uint64_t xxh3_64(std::string_view text, uint64_t seed = 0);
[[nodiscard]] std::string xxh3_128_hex(std::span<const std::byte> bytes);  // 32 digits
[[nodiscard]] std::string xxh3_128_hex(std::string_view text);
[[nodiscard]] std::string hex64(uint64_t value);  // 16 digits

// Streaming XXH3-128: the digest of all bytes given to update().
class Hasher {
 public:
  Hasher();
  ~Hasher();
  Hasher(Hasher&&) noexcept;
  Hasher& operator=(Hasher&&) noexcept;
  void update(std::span<const std::byte> bytes);
  void update(std::string_view text);
  [[nodiscard]] std::string hex() const;  // 32 digits; may be called more than once

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace capstan
