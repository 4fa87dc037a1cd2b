// Where the sampling kernels find logits: a row in global memory, or candidates of it in shared
// memory. Sources as in sampling_block.h.
#pragma once

#include "cuda/element.h"
#include "cuda/sampling/sampling_block.h"

namespace pumice::cuda {

// A row of logits in pieces of 16 bytes, wherever it begins; the first and the last piece may lie
// partly outside.
template <class T>
struct LogitRow {
  static constexpr int kWidth = 16 / sizeof(T);
  struct alignas(16) Piece {
    T at[kWidth];
  };
  struct Unit {
    int32_t first;
    Piece piece;
  };
  const T* data;
  int32_t vocab;
  int32_t skipped;  // elements between a boundary of 16 bytes and the first

  __device__ __forceinline__ LogitRow(const T* row, int32_t vocab_size)
      : data(row),
        vocab(vocab_size),
        skipped(static_cast<int32_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T))) {}

  __device__ __forceinline__ int32_t units() const {
    return (vocab + skipped + kWidth - 1) / kWidth;
  }
  __device__ __forceinline__ bool holds(int32_t index) const {
    return static_cast<uint32_t>(index) < static_cast<uint32_t>(vocab);
  }
  __device__ __forceinline__ Unit load(int32_t unit) const {
    Unit loaded;
    loaded.first = unit * kWidth - skipped;
    if (loaded.first >= 0 && loaded.first + kWidth <= vocab) {
      loaded.piece = *reinterpret_cast<const Piece*>(data + loaded.first);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (holds(loaded.first + i)) loaded.piece.at[i] = data[loaded.first + i];
      }
    }
    return loaded;
  }
  __device__ __forceinline__ float value(const Unit& unit, int i) const {
    return to_float(unit.piece.at[i]);
  }
};

// Tokens set aside, in any order: what is computed from them does not depend on it.
struct CandidateList {
  static constexpr int kWidth = 1;
  struct Unit {
    int32_t first;
    float logit;
  };
  const float* logits;
  const int32_t* tokens;
  int32_t count;

  __device__ __forceinline__ int32_t units() const { return count; }
  __device__ __forceinline__ bool holds(int32_t) const { return true; }
  __device__ __forceinline__ Unit load(int32_t unit) const { return {tokens[unit], logits[unit]}; }
  __device__ __forceinline__ float value(const Unit& unit, int) const { return unit.logit; }
};

// The numbers from 0 to count - 1, for what lies in an array of the kernel's.
struct Numbers {
  static constexpr int kWidth = 1;
  struct Unit {
    int32_t first;
  };
  int32_t count;

  __device__ __forceinline__ int32_t units() const { return count; }
  __device__ __forceinline__ bool holds(int32_t) const { return true; }
  __device__ __forceinline__ Unit load(int32_t unit) const { return {unit}; }
  __device__ __forceinline__ float value(const Unit&, int) const { return 0.0f; }
};

}  // namespace pumice::cuda
