// The main loop of flash_forward by mma.sync: scores, softmax and weighted values of a tile of
// rows, over the blocks of keys that its queries may see.
//
// Tiles of keys and of values alternate in a ring of slots in shared memory. A step waits for its
// tile, starts the copy of the one that is kRing - 1 steps ahead into the slot that the step before
// has left, and multiplies:
//
//     keys n │ values n │ keys n' │ values n' │ ...        n' the next block that may be visible
//
// One barrier a step: it makes the tile visible to all, and says that the step before is over.
//
// 0 · NaN: a value that a row does not see must not reach it, though p = 0. Values past the last
// key are zero. In a block that some row sees and another does not, the threads look through what
// they copied, on the way to a barrier that is there anyway; if there is an infinity or NaN, it is
// multiplied as zero and added only to the rows that see it.
#pragma once

#include "cuda/attention/cache_tile.h"
#include "cuda/attention/flash_score.h"
#include "cuda/attention/flash_source.h"

namespace pumice::cuda {

// Rows of query in shared memory, or in the registers of the warps that multiply them.
template <class T, class Tile>
class FlashQuery {
 public:
  using Shared = SharedTile<Tile::kRows, Tile::kHeadDim>;
  static constexpr int kSteps = Tile::kHeadDim / 16;

  explicit __device__ __forceinline__ FlashQuery(const unsigned char* shared) : shared_(shared) {}

  static __device__ __forceinline__ void copy(unsigned char* shared, const FlashForward& call,
                                              const FlashWork& work) {
    const TokenView& view = call.problem.query;
    const int pack = call.plan.pack;
    Shared::template copy<Tile::kThreads>(
        shared, static_cast<int>(threadIdx.x), work.rows, call.key_columns, [&](int r) {
          return static_cast<const uint16_t*>(view.data) +
                 token_offset(view, work.sequence.batch, work.sequence.q_begin, work.query(r, pack),
                              work.head(r, pack));
        });
  }

  // Once they have arrived, and stand in the order of the keys' columns.
  __device__ __forceinline__ void load() {
    if constexpr (Tile::kQueryInRegisters) {
      const ThreadPlace<Tile> place;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int r = 0; r < Tile::kRowTiles; ++r) {
          Shared::load_a(kept_[k][r], shared_, place.warp_row + r * 16, k, place.lane);
        }
      }
    }
  }

  __device__ __forceinline__ void get(uint32_t (&a)[Tile::kRowTiles][4], int k,
                                      const ThreadPlace<Tile>& place) const {
#pragma unroll
    for (int r = 0; r < Tile::kRowTiles; ++r) {
      if constexpr (Tile::kQueryInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[r][i] = kept_[k][r][i];
      } else {
        Shared::load_a(a[r], shared_, place.warp_row + r * 16, k, place.lane);
      }
    }
  }

 private:
  const unsigned char* shared_;
  uint32_t kept_[Tile::kQueryInRegisters ? kSteps : 1][Tile::kRowTiles][4];
};

// What a block knows of its work beside the call. One thread works it out, and it stays in shared
// memory: in registers it would take some 50 of each thread, which sums and scores need.
template <class Source>
struct FlashBlock {
  FlashWork work;
  MaskView mask;
  BlockWalk walk;
  Source source;
  int m0, m1;      // queries
  int first, end;  // blocks of keys
  // Blocks that the edges of the mask leave wholly visible: nothing need be asked of them.
  int clean_first, clean_end;

  __device__ FlashBlock(const FlashForward& call, const FlashWork& its_work,
                        const Source& its_source, int keys)
      : work(its_work), source(its_source) {
    const FlashSequence& sequence = work.sequence;
    mask = mask_view(call.problem.mask, sequence.batch, work.head0, sequence.q_len, sequence.k_len,
                     sequence.q_token);
    m0 = work.query(0, call.plan.pack);
    m1 = work.query(work.rows - 1, call.plan.pack) + 1;
    walk = mask.keys_of(m0, m1, keys);
    first = flash_part_begin(walk, work.part, work.parts);
    end = flash_part_begin(walk, work.part + 1, work.parts);
    const int p0 = mask.position(m0), p1 = mask.position(m1 - 1);
    clean_first = (max(p1 - mask.window_left, 0) + keys - 1) / keys;
    clean_end =
        min(min(p0 + mask.window_right, mask.causal ? p0 : kUnboundedWindow) + 1, mask.k_len) /
        keys;
    if (mask.bits != nullptr) clean_end = min(clean_end, mask.bits_first / keys);
  }
  __device__ __forceinline__ bool clean(int n) const { return n >= clean_first && n < clean_end; }
  // The block of keys after n.
  __device__ __forceinline__ int after(int n) const {
    return clean(n) && n + 1 < clean_end ? n + 1 : mask.next_keys(walk, m0, m1, n + 1);
  }
  __device__ __forceinline__ bool sees_all(int n, int keys) const {
    return clean(n) || mask.sees_all(m0, m1, n * keys, (n + 1) * keys);
  }
};

template <class T, class Tile, class Source>
class FlashMainloop {
 public:
  using Keys = typename Source::template Tile<T, Tile::kKeys, Tile::kHeadDim>;
  using Values = typename Source::template Tile<T, Tile::kKeys, Tile::kValueDim>;
  using Softmax = OnlineSoftmax<Tile::kRowTiles, Tile::kKeyTiles>;
  using Scores = float[Tile::kRowTiles][Tile::kKeyTiles][4];
  using Weights = uint32_t[Tile::kRowTiles][Tile::kKeyTiles][2];

  __device__ __forceinline__ FlashMainloop(const FlashForward& call,
                                           const FlashBlock<Source>& block, unsigned char* shared)
      : call_(call), block_(block), work_(block.work), shared_(shared) {}

  __device__ __forceinline__ void run() {
    const MaskView& mask = block_.mask;
    int n = mask.next_keys(block_.walk, block_.m0, block_.m1, block_.first);
    if (n >= block_.end) return;

    FlashQuery<T, Tile> query(shared_);
    query.copy(shared_, call_, work_);
    copy_keys(n, 0);
    ptx::cp_async_commit();
    if constexpr (Tile::kRing == 3) {
      copy_values(n, 1);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<Tile::kRing - 2>();
    __syncthreads();
    if constexpr (Keys::kSeparatesColumns) {
      separate_columns<typename FlashQuery<T, Tile>::Shared, Tile::kThreads>(
          shared_, ptx::thread_index_here());
      __syncthreads();
    }
    query.load();

    // What is known of a block is asked twice, for between its two steps the softmax needs every
    // register: where blocks are clean, the answer is two comparisons.
    int slot = 0;
#pragma unroll 1
    while (n < block_.end) {
      if constexpr (Tile::kRing == 2) slot = 0;
      ptx::cp_async_wait<Tile::kRing - 2>();
      __syncthreads();
      if constexpr (Tile::kRing == 2) {
        copy_values(n, before(slot));
      } else if (const int next = block_.after(n); next < block_.end) {
        copy_keys(next, before(slot));
      }
      ptx::cp_async_commit();
      Weights weights;
      if (bool partial = !block_.sees_all(n, Tile::kKeys); warp_sees(n, partial)) {
        weigh_keys(weights, query, n, slot, partial);
      }
      slot = after(slot);

      ptx::cp_async_wait<Tile::kRing - 2>();
      const bool partial = !block_.sees_all(n, Tile::kKeys);
      bool non_finite = false;
      if (partial) {
        non_finite = __syncthreads_or(Values::template copied_non_finite<T, Tile::kThreads>(
            slot_at(slot), ptx::thread_index_here()));
      } else {
        __syncthreads();
      }
      const int next = block_.after(n);
      if (next < block_.end) {
        if constexpr (Tile::kRing == 2) {
          copy_keys(next, before(slot));
        } else {
          copy_values(next, before(slot));
        }
      }
      ptx::cp_async_commit();
      if (non_finite) {
        if (warp_sees(n, partial)) add_non_finite(slot, first_key(n));
        __syncthreads();
        Values::template clear_non_finite<T, Tile::kThreads>(slot_at(slot),
                                                             ptx::thread_index_here());
        __syncthreads();
      }
      if (warp_sees(n, partial)) add_values(weights, slot);
      slot = after(slot);
      n = next;
    }
  }

  // The factor from what the softmax works on to base 2.
  __device__ __forceinline__ float softmax_scale() const {
    const float scale = block_.source.softmax_scale(call_);
    return score_is_scaled_product(call_.problem.score, scale) ? scale * kLog2E : 1.0f;
  }
  // What the quotient is to be multiplied by.
  __device__ __forceinline__ float value_scale() const { return block_.source.value_scale(); }
  __device__ __forceinline__ const Softmax& softmax() const { return softmax_; }

  // For lane 4g + t, of row g or g + 8 (`half`): sums of two neighbouring columns of the values,
  // two of them for each v < kValueTiles, and the first one's number.
  __device__ __forceinline__ float2 pair(int row_tile, int v, int half) const {
    if constexpr (Values::kSeparatesColumns) {
      const int i = half * 2 + v % 2;
      return {sums_[row_tile][v / 2 * 2][i], sums_[row_tile][v / 2 * 2 + 1][i]};
    }
    return {sums_[row_tile][v][half * 2], sums_[row_tile][v][half * 2 + 1]};
  }
  static __device__ __forceinline__ int column(int v, int t) {
    return Values::kSeparatesColumns ? v / 2 * 16 + t * 4 + v % 2 * 2 : v * 8 + t * 2;
  }

 private:
  static __device__ __forceinline__ int after(int slot) {
    return slot == Tile::kRing - 1 ? 0 : slot + 1;
  }
  static __device__ __forceinline__ int before(int slot) {
    return slot == 0 ? Tile::kRing - 1 : slot - 1;
  }
  // Of the warp in block n.
  static __device__ __forceinline__ int first_key(int n) {
    return n * Tile::kKeys + ThreadPlace<Tile>().warp_key;
  }
  __device__ __forceinline__ unsigned char* slot_at(int slot) const {
    return shared_ + Tile::kRingOffset + slot * Tile::kSlotBytes;
  }

  __device__ __forceinline__ void copy_keys(int n, int slot) const {
    const int j = n * Tile::kKeys;
    block_.source.template copy_keys<Keys, Tile::kThreads>(
        slot_at(slot), j, work_.sequence.k_len - j, call_.key_columns);
  }
  __device__ __forceinline__ void copy_values(int n, int slot) const {
    const int j = n * Tile::kKeys;
    block_.source.template copy_values<Values, Tile::kThreads>(
        slot_at(slot), j, work_.sequence.k_len - j, call_.value_columns);
  }

  // Whether the warp has rows and keys in block n, and is not wholly above the diagonal.
  __device__ __forceinline__ bool warp_sees(int n, bool partial) const {
    const ThreadPlace<Tile> place;
    if (place.warp_row >= work_.rows) return false;
    if (!partial) return true;
    const MaskView& mask = block_.mask;
    const int j0 = n * Tile::kKeys + place.warp_key;
    const int last_row = min(place.warp_row + Tile::kWarpRows, work_.rows) - 1;
    return j0 < mask.k_len &&
           (!mask.causal || j0 <= mask.position(work_.query(last_row, call_.plan.pack)));
  }

  // From a tile of keys to p; what was summed up until now is brought to the new reference.
  __device__ __forceinline__ void weigh_keys(Weights& weights, const FlashQuery<T, Tile>& query,
                                             int n, int slot, bool partial) {
    Scores scores;
    multiply_keys(scores, query, slot);
    const float rule_scale = block_.source.softmax_scale(call_);
    if (!score_is_scaled_product(call_.problem.score, rule_scale)) {
      apply_score_rule<Tile>(scores, call_, work_, rule_scale, first_key(n));
    }
    if (partial) {
      hide_scores<Tile>(scores,
                        hidden_scores<Tile>(block_.mask, work_, call_.plan.pack, first_key(n)));
    }
    const float scale = softmax_scale();
    float factor[Softmax::kRows];
    if (softmax_.raise(scores, scale, factor)) rescale(factor);
    softmax_.template weigh<T>(scores, scale, weights);
  }

  __device__ __forceinline__ void multiply_keys(Scores& scores, const FlashQuery<T, Tile>& query,
                                                int slot) const {
#pragma unroll
    for (int r = 0; r < Tile::kRowTiles; ++r) {
#pragma unroll
      for (int n = 0; n < Tile::kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[r][n][i] = 0.0f;
      }
    }
    const unsigned char* keys = slot_at(slot);
    const ThreadPlace<Tile> place;
#pragma unroll
    for (int k = 0; k < Tile::kHeadDim / 16; ++k) {
      uint32_t a[Tile::kRowTiles][4];
      query.get(a, k, place);
#pragma unroll
      for (int n = 0; n < Tile::kKeyTiles / 2; ++n) {
        uint32_t b[2][2];
        Keys::load_b(b, keys, place.warp_key + n * 16, k, place.lane);
#pragma unroll
        for (int r = 0; r < Tile::kRowTiles; ++r) {
          mma_16bit<T>(scores[r][2 * n], a[r], b[0]);
          mma_16bit<T>(scores[r][2 * n + 1], a[r], b[1]);
        }
      }
    }
  }

  __device__ __forceinline__ void rescale(const float (&factor)[Softmax::kRows]) {
#pragma unroll
    for (int r = 0; r < Tile::kRowTiles; ++r) {
#pragma unroll
      for (int v = 0; v < Tile::kValueTiles; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[r][v][i] *= factor[2 * r + i / 2];
      }
    }
  }

  // The sums of the scores' mma are the A operand of this one, as they lie.
  __device__ __forceinline__ void add_values(const Weights& p, int slot) {
    const unsigned char* values = slot_at(slot);
    const ThreadPlace<Tile> place;
#pragma unroll
    for (int k = 0; k < Tile::kKeyTiles / 2; ++k) {
      uint32_t a[Tile::kRowTiles][4];
#pragma unroll
      for (int r = 0; r < Tile::kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[r][i] = p[r][2 * k + i / 2][i % 2];
      }
#pragma unroll
      for (int v = 0; v < Tile::kValueTiles / 2; ++v) {
        uint32_t b[2][2];
        Values::load_b_transposed(b, values, place.warp_key + k * 16, v, place.lane);
#pragma unroll
        for (int r = 0; r < Tile::kRowTiles; ++r) {
          mma_16bit<T>(sums_[r][2 * v], a[r], b[0]);
          mma_16bit<T>(sums_[r][2 * v + 1], a[r], b[1]);
        }
      }
    }
  }

  // The infinities and NaN among the values, key by key, to the rows that see them. Any p > 0 times
  // one is that itself.
  __device__ __forceinline__ void add_non_finite(int slot, int j0) {
    const MaskView& mask = block_.mask;
    const ThreadPlace<Tile> place;
    const unsigned char* values = slot_at(slot);
    const int keys = min(Tile::kWarpKeys, mask.k_len - j0);
#pragma unroll 1
    for (int key = 0; key < keys; ++key) {
      uint32_t sees = 0;
#pragma unroll 1
      for (int r = 0; r < Softmax::kRows; ++r) {
        const int row = min(place.row(r), work_.rows - 1);
        if (mask.visible(work_.query(row, call_.plan.pack), j0 + key)) sees |= 1u << r;
      }
#pragma unroll
      for (int v = 0; v < Tile::kValueTiles; ++v) {
        __syncwarp();  // or all loads come first, in registers that there are not
        const uint32_t pair = Values::pair(values, place.warp_key + key, v, place.lane % 4);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t bits = e == 0 ? pair & 0xffffu : pair >> 16;
          if (is_finite<T>(bits)) continue;
          const float value = to_float(bits_as<T>(static_cast<uint16_t>(bits)));
#pragma unroll
          for (int r = 0; r < Softmax::kRows; ++r) {
            if (sees >> r & 1) sums_[r / 2][v][r % 2 * 2 + e] += value;
          }
        }
      }
    }
  }

  const FlashForward& call_;
  const FlashBlock<Source>& block_;
  const FlashWork& work_;
  unsigned char* shared_;
  Softmax softmax_;
  float sums_[Tile::kRowTiles][Tile::kValueTiles][4] = {};
};

}  // namespace pumice::cuda
