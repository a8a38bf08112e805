// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "kernels/array.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <random>

namespace capstan::kernels::test {
namespace {

uint16_t to_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

template <class T>
void put(Bytes& bytes, size_t index, T value) {
  std::memcpy(bytes.data() + index * sizeof(T), &value, sizeof(T));
}
template <class T>
T get(const Bytes& bytes, size_t index) {
  T value;
  std::memcpy(&value, bytes.data() + index * sizeof(T), sizeof(T));
  return value;
}

void put_value(Bytes& bytes, DType dtype, size_t i, double x) {
  switch (dtype) {
    case DType::kFp64:
      return put(bytes, i, x);
    case DType::kFp32:
      return put(bytes, i, static_cast<float>(x));
    case DType::kBf16:
      return put(bytes, i, to_bf16(static_cast<float>(x)));
    case DType::kInt64:
      return put(bytes, i, static_cast<int64_t>(x));
    case DType::kInt32:
      return put(bytes, i, static_cast<int32_t>(x));
    case DType::kUint8:
    case DType::kBool:
      return put(bytes, i, static_cast<uint8_t>(x));
    default:
      FAIL() << "no such array";
  }
}

double get_value(const Bytes& bytes, DType dtype, size_t i) {
  switch (dtype) {
    case DType::kFp64:
      return get<double>(bytes, i);
    case DType::kFp32:
      return get<float>(bytes, i);
    case DType::kBf16:
      return from_bf16(get<uint16_t>(bytes, i));
    case DType::kInt64:
      return static_cast<double>(get<int64_t>(bytes, i));
    case DType::kInt32:
      return get<int32_t>(bytes, i);
    default:
      return get<uint8_t>(bytes, i);
  }
}

Bytes to_bytes(DType dtype, const Values& values, size_t shift) {
  Bytes bytes((values.size() + shift) * size_of(dtype), 0xff);
  for (size_t i = 0; i < values.size(); ++i) put_value(bytes, dtype, shift + i, values[i]);
  return bytes;
}

bool is_close(double a, double b, Tolerance t) {
  if (std::isnan(b)) return std::isnan(a);
  if (std::isinf(b)) return a == b;
  return std::fabs(a - b) <= t.relative * std::fabs(b) + t.absolute;
}

}  // namespace

Array::Array(DType dtype, size_t count, size_t shift, const Bytes& bytes)
    : dtype_(dtype), count_(count), shift_(shift), memory_((count + shift) * size_of(dtype)) {
  memory_.write(bytes.data(), bytes.size());
}
Array::Array(DType dtype, const Values& values, size_t shift)
    : Array(dtype, values.size(), shift, to_bytes(dtype, values, shift)) {}
Array Array::of_size(DType dtype, size_t count, size_t shift) {
  return {dtype, count, shift, Bytes((count + shift) * size_of(dtype), 0xff)};
}
Array Array::zeros(DType dtype, size_t count) {
  return {dtype, count, 0, Bytes(count * size_of(dtype), 0)};
}

void* Array::data() const {
  return static_cast<unsigned char*>(memory_.data()) + shift_ * size_of(dtype_);
}

Bytes Array::bytes() const {
  Bytes all((count_ + shift_) * size_of(dtype_));
  memory_.read(all.data(), all.size());
  return {all.begin() + static_cast<std::ptrdiff_t>(shift_ * size_of(dtype_)), all.end()};
}

Values Array::values() const {
  const Bytes raw = bytes();
  Values values(count_);
  for (size_t i = 0; i < count_; ++i) values[i] = get_value(raw, dtype_, i);
  return values;
}

Values random_values(size_t count, uint64_t seed, double scale) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal(0.0, scale);
  Values values(count);
  for (double& x : values) x = normal(engine);
  return values;
}

Values random_ids(size_t count, uint64_t seed, int64_t below) {
  std::mt19937_64 engine(seed);
  std::uniform_int_distribution<int64_t> uniform(0, below - 1);
  Values values(count);
  for (double& x : values) x = static_cast<double>(uniform(engine));
  return values;
}

Tolerance tolerance_of(DType dtype) {
  switch (dtype) {
    case DType::kFp64:
      return {1e-11, 1e-12};
    case DType::kFp32:
      return {1e-5, 1e-5};
    case DType::kBf16:
      return {1.0 / 128, 2e-3};
    default:
      return {0, 0};
  }
}

void expect_close(const Values& actual, const Values& expected, Tolerance tolerance,
                  const char* what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  size_t bad = 0, first = 0;
  double most = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double distance = std::fabs(actual[i] - expected[i]);
    if (distance > most) most = distance;
    if (!is_close(actual[i], expected[i], tolerance) && bad++ == 0) first = i;
  }
  EXPECT_EQ(bad, 0u) << what << ": " << bad << " of " << actual.size()
                     << " elements differ, first at " << first << ": " << actual[first]
                     << ", expected " << expected[first] << "; largest difference " << most;
}

std::vector<Array> same_bits(const std::function<std::vector<Array>()>& run) {
  begin_repeat(0);
  std::vector<Array> first = run();
  for (int repeat = 1; repeat < repeats(); ++repeat) {
    begin_repeat(repeat);
    const std::vector<Array> again = run();
    EXPECT_EQ(first.size(), again.size());
    for (size_t i = 0; i < first.size(); ++i)
      EXPECT_TRUE(first[i].bytes() == again[i].bytes())
          << "result " << i << " depends on the order of threads";
  }
  begin_repeat(0);
  return first;
}

}  // namespace capstan::kernels::test
