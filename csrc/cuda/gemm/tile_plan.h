// Tiles of y = x·Wᵀ whose sums a block keeps, seen as [rows of the weight][tokens], and the parts
// of K: what int4_gemm and sparse24_gemm plan alike. Pure functions of numbers.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pumice::cuda {

struct TilePlan {
  int rows, tokens, slice_k;
  int parts;  // of K, each of a block of its own
};

constexpr int64_t blocks_along(int64_t size, int block) { return (size + block - 1) / block; }

constexpr int64_t tile_count(const TilePlan& plan, int64_t m, int64_t n) {
  return blocks_along(m, plan.tokens) * blocks_along(n, plan.rows);
}

// Splits K where there are tiles for less than three quarters of the SMs, as long as every part has
// 4 slices: the exchange of the sums and the zeroing of tickets cost some 3 µs.
constexpr int parts_of_k(const TilePlan& plan, int64_t m, int64_t n, int64_t k, int sm_count) {
  constexpr int64_t kMaxParts = 16, kMinSlices = 4;
  const int64_t tiles = tile_count(plan, m, n);
  if (4 * tiles >= 3 * sm_count) return 1;
  const int64_t slices = blocks_along(k, plan.slice_k);
  const int64_t parts = std::min({kMaxParts, sm_count / tiles, slices / kMinSlices});
  return static_cast<int>(std::max<int64_t>(parts, 1));
}

// What the parts of all tiles take in global memory: their sums, and a ticket for each tile.
constexpr int64_t partial_sum_bytes(const TilePlan& plan, int64_t m, int64_t n) {
  if (plan.parts == 1) return 0;
  return tile_count(plan, m, n) * plan.parts * plan.rows * plan.tokens * 4;
}
constexpr int64_t ticket_count(const TilePlan& plan, int64_t m, int64_t n) {
  return plan.parts == 1 ? 0 : tile_count(plan, m, n);
}

}  // namespace pumice::cuda
