// Philox4x32-10, the counter-based random numbers of Salmon et al., 2011, "Parallel Random Numbers:
// As Easy as 1, 2, 3": a bijection of 128-bit counters for each 64-bit key, in integers alone, so
// that every device draws the same bits.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace pumice {

struct Philox4 {
  uint32_t word[4];
};

constexpr int kPhiloxRounds = 10;

PUMICE_HOST_DEVICE Philox4 philox4x32(Philox4 counter, uint32_t key0, uint32_t key1) {
  constexpr uint32_t kMultiply0 = 0xD2511F53u, kMultiply1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;  // golden ratio, √3 - 1
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t{kMultiply0} * counter.word[0];
    const uint64_t product1 = uint64_t{kMultiply1} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

}  // namespace pumice
