// The order of x in which registers of it can be picked from.
//
// A shuffle of bytes looks up within 128-bit lanes: a lane of 16 bytes of x, a chunk, holds whole
// groups, of which it picks half, 8 bytes. So a register picked has for each lane two chunks of x
// as sources, chunks 2i and 2i + 1, which lie in the same lane of two registers:
//
//   x         | chunk 0 | chunk 1 | chunk 2 | chunk 3 | …
//   prepared  | chunk 0 | chunk 2 | …  || chunk 1 | chunk 3 | …     || ends a register
#pragma once

#include <cstdint>
#include <cstring>

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int64_t kChunkBytes = 16;

// `bytes`, whole blocks of kSources registers of kRegisterBytes, in the order above: chunk
// kSources·i + s of a block becomes chunk i of its register s.
template <int64_t kRegisterBytes, int64_t kSources>
void order_chunks(const void* x, int64_t bytes, void* prepared) {
  constexpr int64_t kLanesOf = kRegisterBytes / kChunkBytes;
  constexpr int64_t kBlockBytes = kSources * kRegisterBytes;
  for (int64_t block = 0; block < bytes; block += kBlockBytes) {
    const char* from = static_cast<const char*>(x) + block;
    char* to = static_cast<char*>(prepared) + block;
    for (int64_t chunk = 0; chunk < kSources * kLanesOf; ++chunk) {
      const int64_t place = chunk % kSources * kLanesOf + chunk / kSources;
      std::memcpy(to + place * kChunkBytes, from + chunk * kChunkBytes, kChunkBytes);
    }
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
