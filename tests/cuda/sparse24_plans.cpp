// Properties of the plans of sparse24_gemm, over many shapes and devices; prints what does not
// hold.
#include <cstdio>

#include "cuda/sparse/sparse24_tiles.h"

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

template <Sparse24Kind kKind>
const Sparse24TileRow* row_of(Sparse24TileName name) {
  for (const Sparse24TileRow& row : kSparse24Tiles<kKind>) {
    if (row.name == name) return &row;
  }
  return nullptr;
}

template <Sparse24Kind kKind>
void check_plan(const Device& device, int64_t m, int64_t n, int64_t k, bool aligned) {
  const Sparse24Plan plan =
      plan_sparse24<kKind>(m, n, k, aligned, device.sm_count, device.shared_memory);
  const Sparse24TileRow* row = row_of<kKind>(plan.tile);
  if (row == nullptr) return expect(false, "the tile is in the table", m, n, k);
  const int64_t tiles = tile_count(plan, m, n);
  const int64_t slices = blocks_along(k, plan.slice_k);
  expect(row->shared_bytes <= device.shared_memory, "the plan fits", m, n, k);
  expect(plan.rows == row->rows && plan.tokens == row->tokens && plan.slice_k == row->slice_k,
         "the plan has its tile's sizes", m, n, k);
  expect(plan.parts >= 1 && plan.parts <= slices, "every part has a slice", m, n, k);
  expect(plan.parts == 1 || tiles * plan.parts <= device.sm_count, "parts run at once", m, n, k);
  expect(ticket_count(plan, m, n) == (plan.parts == 1 ? 0 : tiles), "tickets", m, n, k);
  expect(partial_sum_bytes(plan, m, n) ==
             (plan.parts == 1 ? 0 : tiles * plan.parts * plan.rows * plan.tokens * 4),
         "room for every part's sums", m, n, k);
  if (!aligned) {
    expect(plan.tile == Sparse24TileName::k8 || plan.tile == Sparse24TileName::k64,
           "a tile that operands of any alignment have", m, n, k);
  } else if (device.shared_memory >= kA100.shared_memory) {
    expect(m > plan.tokens || m > plan.tokens / 4 || plan.tile == Sparse24TileName::k8,
           "no more than three quarters of a tile's tokens are missing", m, n, k);
  }
}

template <Sparse24Kind kKind>
void check_plans() {
  for (const Device& device : {kH200, kA100, kL40s, kEmulator}) {
    for (int64_t m : {1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 500, 16384}) {
      for (int64_t n : {1, 7, 64, 1000, 4096, 28672, 151936}) {
        for (int64_t k : {4, 100, 512, 4096, 28672}) {
          check_plan<kKind>(device, m, n, k, true);
          check_plan<kKind>(device, m, n, k, false);
        }
      }
    }
  }
}

// Chunks of 16 bytes that 8 lanes write or read at once.
template <class Place>
void expect_other_banks(const char* what, Place place) {
  bool taken[8] = {};
  for (int lane = 0; lane < 8; ++lane) {
    bool& bank = taken[place(lane) % 8];
    expect(!bank, what, lane, 0, 0);
    bank = true;
  }
}

// [chunk][row]: lanes write neighbouring chunks, and read neighbouring rows.
template <int kChunks, int kRows>
void check_chunks_of_rows() {
  constexpr int kChunkRows = sparse24_rows_of_chunk(kRows, kChunks);
  const auto place = [](int chunk, int row) { return chunk * kChunkRows + row; };
  expect(kChunkRows >= kRows, "chunks do not overlap", kChunks, kRows, 0);
  for (int first = 0; first < kChunks * kRows; first += 8) {
    expect_other_banks("writing without bank conflicts", [&](int lane) {
      return place((first + lane) % kChunks, (first + lane) / kChunks);
    });
    expect_other_banks("reading without bank conflicts",
                       [&](int lane) { return place(first / kRows, first % kRows + lane); });
  }
}

// [row][chunk] (sparse24_chunk_place).
template <int kChunks>
void check_rows_of_chunks() {
  static_assert(kChunks % 8 == 0);
  for (int i = 0; i < 64 * kChunks; i += 8) {
    expect_other_banks("writing without bank conflicts", [&](int lane) {
      return i / kChunks * kChunks + sparse24_chunk_place(i / kChunks, i % kChunks + lane);
    });
  }
  for (int i = 0; i < 8 * kChunks; ++i) {
    expect_other_banks("reading without bank conflicts", [&](int lane) {
      const int row = i / kChunks * 8 + lane;
      return row * kChunks + sparse24_chunk_place(row, i % kChunks);
    });
  }
}

template <class Tile>
void check_banks() {
  check_chunks_of_rows<Tile::kMetaChunks, Tile::kRows>();
  check_rows_of_chunks<Tile::kTokenRowBytes / 16>();
  if constexpr (Tile::kKind == Sparse24Kind::kInt4) {
    check_chunks_of_rows<Tile::kValueChunks, Tile::kRows>();
  } else {
    check_rows_of_chunks<Tile::kValueChunks>();
  }
}

template <class Tile>
void check_resident() {
  check_banks<Tile>();
  expect(Tile::kBlocksPerSm * (Tile::kSharedBytes + 1024) <= kH200.shared_memory + 1024,
         "blocks on an SM", Tile::kTokens, Tile::kRows, Tile::kSliceK);
}

template <Sparse24Kind kKind>
void check_resident_of() {
  check_resident<Sparse24Tile8<kKind>>();
  check_resident<Sparse24Tile32<kKind>>();
  check_resident<Sparse24Tile64<kKind>>();
  check_resident<Sparse24Tile128<kKind>>();
  check_resident<Sparse24Tile256<kKind>>();
}

template <Sparse24Kind kKind>
Sparse24Plan on_h200(int64_t m, int64_t n, int64_t k) {
  return plan_sparse24<kKind>(m, n, k, true, kH200.sm_count, kH200.shared_memory);
}

}  // namespace

int main() {
  check_plans<Sparse24Kind::k16Bit>();
  check_plans<Sparse24Kind::kInt8>();
  check_plans<Sparse24Kind::kInt4>();
  // What the tiles' comments say of an H200.
  check_resident_of<Sparse24Kind::k16Bit>();
  check_resident_of<Sparse24Kind::kInt8>();
  check_resident<Sparse24Int4Tile8>();
  check_resident<Sparse24Int4Tile16>();
  check_resident<Sparse24Int4Tile32>();
  check_resident<Sparse24Int4Tile64>();
  check_resident<Sparse24Int4Tile128>();
  constexpr auto k16Bit = Sparse24Kind::k16Bit;
  expect(on_h200<k16Bit>(1, 8192, 8192).parts == 1, "no parts where tiles fill the device", 1, 8192,
         8192);
  expect(on_h200<k16Bit>(1, 1024, 8192).parts > 1, "K is split for few rows", 1, 1024, 8192);
  expect(on_h200<k16Bit>(8192, 8192, 8192).tile == Sparse24TileName::k256,
         "the largest tile for large products", 8192, 8192, 8192);
  expect(plan_sparse24<k16Bit>(140, 300, 208, true, kEmulator.sm_count, kEmulator.shared_memory)
                 .tile == Sparse24TileName::k256,
         "a test of the largest tile", 140, 300, 208);
  expect(on_h200<k16Bit>(128, 8192, 8192).tile == Sparse24TileName::k128,
         "smaller ones where they fill the device better", 128, 8192, 8192);
  expect(sparse24_dense_from(pumice::DType::kFloat32, 90) == 64, "fp32 is written out", 64, 0, 0);
  for (const auto dtype : {pumice::DType::kFloat16, pumice::DType::kBFloat16}) {
    expect(sparse24_dense_from(dtype, 90) == kSparse24NeverDense, "16 bit is not", 1 << 20, 0, 0);
  }
  return failures == 0 ? 0 : 1;
}
