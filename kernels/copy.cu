// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Device copy: to = from.
// Memory: 1 byte read and 1 written per byte. Reference: memcpy.
#include "capstan/kernels/copy.h"

#include "check.h"
#include "numbers.cuh"

namespace capstan::kernels {
namespace {

constexpr int kPerThread = 4;  // 16-byte words in flight per thread

struct Word {
  alignas(16) uint32_t part[4];
};

__global__ void copy_words(const Word* from, Word* to, int64_t count) {
  const int64_t stride = all_threads();
  int64_t i = first_index();
  for (; i + (kPerThread - 1) * stride < count; i += kPerThread * stride) {
    Word word[kPerThread];
    CAPSTAN_UNROLL
    for (int j = 0; j < kPerThread; ++j) word[j] = from[i + j * stride];
    CAPSTAN_UNROLL
    for (int j = 0; j < kPerThread; ++j) to[i + j * stride] = word[j];
  }
  for (; i < count; i += stride) to[i] = from[i];
}

__global__ void copy_bytes(const uint8_t* from, uint8_t* to, int64_t count) {
  for (int64_t i = first_index(); i < count; i += all_threads()) to[i] = from[i];
}

}  // namespace

void copy(const CopyArgs& args, Stream stream) {
  check_sizes("copy", {args.bytes});
  if (args.bytes == 0) return;
  check_present("copy", {{"from", args.from}, {"to", args.to}});
  const int64_t words = are_aligned({args.from, args.to}) ? args.bytes / kVectorBytes : 0;
  const int64_t done = words * kVectorBytes, rest = args.bytes - done;
  if (words > 0)
    launch("copy", flat_shape(words, kPerThread), stream, copy_words,
           static_cast<const Word*>(args.from), static_cast<Word*>(args.to), words);
  if (rest > 0)
    launch("copy", flat_shape(rest, 1), stream, copy_bytes,
           static_cast<const uint8_t*>(args.from) + done, static_cast<uint8_t*>(args.to) + done,
           rest);
}

}  // namespace capstan::kernels
