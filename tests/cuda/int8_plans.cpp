// Properties of the plans of int8_gemm, over many shapes and devices; prints what does not hold.
#include <cstdio>

#include "common/int8_numerics.h"
#include "cuda/gemm/int8_tiles.h"

using pumice::DType;
using namespace pumice::cuda;

namespace {

int failures = 0;

void expect(bool holds, const char* what, const Int8GemmShape& shape) {
  if (holds) return;
  ++failures;
  std::printf("%s does not hold for m=%ld n=%ld k=%ld\n", what, long(shape.m), long(shape.n),
              long(shape.k));
}

struct Device {
  int sm_count;
  size_t shared_memory;
};
constexpr Device kH200 = {132, 227 * 1024}, kA100 = {108, 163 * 1024}, kL40s = {142, 99 * 1024},
                 kEmulator = {4, 163 * 1024};

Int8GemmShape shape_of(int64_t m, int64_t n, int64_t k, DType dtype, bool outliers) {
  return {m, n, k, outliers ? (k + 127) / 128 * 4 : 0, dtype};
}

void check_plan(const Device& device, const Int8GemmShape& shape) {
  const Int8Plan plan = choose_int8_plan(shape, device.sm_count, device.shared_memory);
  const int blocks = int8_gemm_blocks(plan, shape, device.sm_count, device.shared_memory);
  const int64_t items = int8_tile_count(plan.tile, shape) * plan.parts;
  expect(int8_shared_bytes(plan.tile, shape) <= device.shared_memory, "the plan fits", shape);
  expect(blocks >= 1 && blocks <= items, "1 <= blocks <= items", shape);
  expect(blocks <= device.sm_count * plan.tile.blocks_per_sm, "all blocks are resident", shape);
  expect(slices_of(shape.k) >= plan.parts, "every part has a slice", shape);
  const int64_t tickets = int8_ticket_count(plan, shape);
  expect(plan.parts == 1 ? tickets == 0 : tickets == int8_tile_count(plan.tile, shape),
         "a ticket for every shared tile", shape);
  expect(int8_partial_bytes(plan, shape) ==
             (plan.parts == 1 ? 0 : items * plan.tile.block_m * plan.tile.block_n * 4),
         "room for every part's sums", shape);
  // Parts are for filling the device, not for more work than it has room for.
  expect(plan.parts == 1 || items <= device.sm_count * plan.tile.blocks_per_sm,
         "parts of tiles run at once", shape);
}

void check_choice(const Int8GemmShape& shape, int block_m, int block_n) {
  const Int8Plan plan = choose_int8_plan(shape, kH200.sm_count, kH200.shared_memory);
  expect(plan.tile.block_m == block_m && plan.tile.block_n == block_n, "the expected tile", shape);
}

}  // namespace

int main() {
  for (const Device& device : {kH200, kA100, kL40s, kEmulator}) {
    for (int64_t m : {1, 33, 64, 65, 127, 128, 129, 500, 2048, 16384}) {
      for (int64_t n : {1, 7, 64, 1000, 4096, 28672, 151936}) {
        for (int64_t k : {int64_t{1}, int64_t{100}, int64_t{512}, int64_t{4096}, int64_t{28672},
                          pumice::kMaxInt8K}) {
          for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
            check_plan(device, shape_of(m, n, k, dtype, true));
            check_plan(device, shape_of(m, n, k, dtype, false));
          }
        }
      }
    }
  }
  // What the design rests on, on an H200: the large tile for large products, whatever the outliers
  // take; two blocks of the middle one on an SM; small tiles or parts where there are few rows.
  check_choice(shape_of(4096, 4096, 4096, DType::kBFloat16, true), 128, 256);
  check_choice(shape_of(2048, 8192, 8192, DType::kFloat32, true), 128, 256);
  check_choice(shape_of(64, 4096, 4096, DType::kBFloat16, true), 64, 64);
  const Int8GemmShape middle = shape_of(2048, 1024, 8192, DType::kBFloat16, true);
  for (const Int8TileRow& tile : kInt8Tiles) {
    if (tile.name != Int8TileName::k128x128) continue;
    expect(2 * (int8_shared_bytes(tile, middle) + 1024) <= kH200.shared_memory + 1024,
           "two blocks on an SM", middle);
  }
  const Int8GemmShape few_rows = shape_of(128, 8192, 8192, DType::kBFloat16, true);
  expect(choose_int8_plan(few_rows, kH200.sm_count, kH200.shared_memory).parts > 1,
         "K is split for few rows", few_rows);
  return failures == 0 ? 0 : 1;
}
