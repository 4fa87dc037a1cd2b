// Philox4x32-10 against the vectors that Random123 publishes (kat_vectors): a program for
// test_philox.py to run.
#include "common/philox.h"

#include <cstdio>

namespace {

struct Vector {
  pumice::Philox4 counter;
  uint32_t key[2];
  uint32_t expected[4];
};

constexpr Vector kVectors[] = {
    {{{0, 0, 0, 0}}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
     {0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

}  // namespace

int main() {
  int failures = 0;
  for (const Vector& vector : kVectors) {
    const pumice::Philox4 found = pumice::philox4x32(vector.counter, vector.key[0], vector.key[1]);
    for (int i = 0; i < 4; ++i) {
      if (found.word[i] == vector.expected[i]) continue;
      std::printf("word %d is %08x, not %08x\n", i, found.word[i], vector.expected[i]);
      ++failures;
    }
  }
  return failures != 0;
}
