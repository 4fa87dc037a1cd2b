// Properties of the plans of int4_gemm, over many shapes and devices; prints what does not hold.
#include <cstdio>

#include "cuda/gemm/int4_tiles.h"

using namespace pumice::cuda;

namespace {

int failures = 0;

void expect(bool holds, const char* what, int64_t m, int64_t n, int64_t k) {
  if (holds) return;
  ++failures;
  std::printf("%s does not hold for m=%ld n=%ld k=%ld\n", what, long(m), long(n), long(k));
}

struct Device {
  int sm_count;
  size_t shared_memory;
};
constexpr Device kH200 = {132, 227 * 1024}, kA100 = {108, 163 * 1024}, kL40s = {142, 99 * 1024},
                 kEmulator = {4, 163 * 1024};

size_t shared_bytes(Int4TileName tile, bool is_fp32) {
  switch (tile) {
    case Int4TileName::kNarrow:
      return Int4TileNarrow::kSharedBytes;
    case Int4TileName::k8:
      return is_fp32 ? Int4SplitTile8::kSharedBytes : Int4Tile8::kSharedBytes;
    case Int4TileName::k16:
      return Int4Tile16::kSharedBytes;
    case Int4TileName::k32:
      return Int4Tile32::kSharedBytes;
    case Int4TileName::k64:
      return Int4Tile64::kSharedBytes;
    case Int4TileName::k128:
      return Int4Tile128::kSharedBytes;
    default:
      return is_fp32 ? Int4SplitTileCompact::kSharedBytes : Int4TileCompact::kSharedBytes;
  }
}

void check_plan(const Device& device, int64_t m, int64_t n, int64_t k, bool is_fp32, bool general) {
  const Int4Plan plan = plan_int4(m, n, k, is_fp32, general, device.sm_count, device.shared_memory);
  const int64_t tiles = tile_count(plan, m, n);
  const int64_t slices = blocks_along(k, plan.slice_k);
  expect(shared_bytes(plan.tile, is_fp32) <= device.shared_memory, "the plan fits", m, n, k);
  expect(plan.parts >= 1 && plan.parts <= slices, "every part has a slice", m, n, k);
  expect(plan.parts == 1 || tiles * plan.parts <= device.sm_count, "parts run at once", m, n, k);
  expect(ticket_count(plan, m, n) == (plan.parts == 1 ? 0 : tiles), "tickets", m, n, k);
  expect(partial_sum_bytes(plan, m, n) ==
             (plan.parts == 1 ? 0 : tiles * plan.parts * plan.rows * plan.tokens * 4),
         "room for every part's sums", m, n, k);
  if (is_fp32 || general) {
    expect(plan.tile == Int4TileName::k8 || plan.tile == Int4TileName::kCompact,
           "a tile that fp32 and the general path have", m, n, k);
  }
}

// The weight that many tokens are multiplied with is written out in parts, which cover it.
void check_parts(int64_t n, int64_t columns) {
  const int64_t limit = int64_t{256} << 20;
  const int64_t rows = int4_rows_at_once(n, columns, limit);
  const int64_t parts = blocks_along(n, static_cast<int>(rows));
  expect(rows >= 1 && rows <= n, "a part has rows", 0, n, columns);
  expect(rows == n || rows % 256 == 0, "parts are whole tiles", 0, n, columns);
  expect(2 * rows * columns <= limit || rows <= 256, "parts are bounded", 0, n, columns);
  expect(parts == 1 || 2 * n * columns > limit, "no parts where all fits", 0, n, columns);
  expect(parts * (rows - 256) < n, "parts are of like size", 0, n, columns);
}

template <class Tile>
void check_resident(int blocks) {
  expect(blocks * (Tile::kSharedBytes + 1024) <= kH200.shared_memory + 1024, "blocks on an SM",
         Tile::kTokens, Tile::kRows, Tile::kSliceK);
}

}  // namespace

int main() {
  for (const Device& device : {kH200, kA100, kL40s, kEmulator}) {
    for (int64_t m : {1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 500, 16384}) {
      for (int64_t n : {1, 7, 64, 1000, 4096, 28672, 151936}) {
        for (int64_t k : {1, 100, 512, 4096, 28672}) {
          for (int i = 0; i < 4; ++i) check_plan(device, m, n, k, i % 2 == 1, i / 2 == 1);
        }
      }
    }
  }
  for (int64_t n : {1, 255, 256, 4096, 16384, 16385, 28672, 151936}) {
    for (int64_t columns : {8, 4096, 8192, 8216, 28672, 1 << 20}) check_parts(n, columns);
  }
  for (int64_t m : {int64_t{1}, kInt4DequantizeFrom - 1, kInt4DequantizeFrom, int64_t{16384}}) {
    expect(int4_dequantizes(m, false) == (m >= 512), "many tokens take torch's product", m, 0, 0);
    expect(!int4_dequantizes(m, true), "fp32 keeps its two planes", m, 0, 0);
  }
  // What the tiles' comments say of an H200.
  check_resident<Int4Tile8>(2);
  check_resident<Int4TileNarrow>(2);
  check_resident<Int4Tile16>(2);
  check_resident<Int4SplitTile8>(2);
  const Int4Plan decode =
      plan_int4(1, 8192, 8192, false, false, kH200.sm_count, kH200.shared_memory);
  expect(decode.parts == 1, "no parts where tiles fill the device", 1, 8192, 8192);
  const Int4Plan narrow =
      plan_int4(1, 1024, 8192, false, false, kH200.sm_count, kH200.shared_memory);
  expect(narrow.parts > 1, "K is split for few columns", 1, 1024, 8192);
  return failures == 0 ? 0 : 1;
}
