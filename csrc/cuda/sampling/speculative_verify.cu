// kernel: speculative_verify
//
// Leviathan et al., 2023, and its extension to trees (Miao et al., 2024, "SpecInfer"); a chain is
// the tree in which every draft follows the one before. A block of 512 threads a sequence, one
// launch. What decides about every draft is loaded at once, then all threads walk from the root
// alike. What is left of p after some rejections is computed from its row and the drafts' rows
// whenever it is needed: for each child that has an elder sibling, and for the last token.
//
// Bound by memory for many sequences, 2 rows of V floats each for a chain: 64 of 152064 tokens are
// 78 MB, 19 µs at 4.1 TB/s. For few bound by what an SM has under way: 1.2 MB, some 25 µs.
#include "cuda/launch.h"
#include "cuda/sampling/sampling.h"
#include "cuda/sampling/sampling_locate.h"

namespace pumice::cuda {
namespace {

// A draft, and what decides about it as a first child.
struct Draft {
  int64_t token;
  int32_t parent;
  uint32_t fraction;
  float p, q;
};

// A child that was rejected, and 1 / the sum of the distribution that it was tried on.
struct Rejection {
  int32_t draft;
  float scale;
};

// Shared memory: this, then the drafts, then the rejections.
struct VerifyShared {
  Mass warps[kSamplingWarps];

  __device__ __forceinline__ Draft* drafts() { return reinterpret_cast<Draft*>(this + 1); }
  __device__ __forceinline__ Rejection* rejections(int64_t count) {
    return reinterpret_cast<Rejection*>(drafts() + count);
  }
};

size_t shared_bytes(int64_t drafts) {
  return sizeof(VerifyShared) + static_cast<size_t>(drafts) * (sizeof(Draft) + sizeof(Rejection));
}

// Width floats of a row of probabilities from `index` on, which all exist.
template <int kWidth>
__device__ __forceinline__ void load_probabilities(const float* row, int32_t index,
                                                   float (&p)[kWidth]) {
  struct alignas(sizeof(float) * kWidth) Piece {
    float at[kWidth];
  };
  const Piece piece = *reinterpret_cast<const Piece*>(row + index);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) p[i] = as_probability(piece.at[i]);
}

// The distribution after a node less what its rejected children took, up to a factor: a source
// (sampling_block.h). kWidth 4 where all rows lie on boundaries of 16 bytes.
template <int width>
struct Residual {
  static constexpr int kWidth = width;
  struct Unit {
    int32_t first;
    float p[kWidth];
  };
  const VerifyProblem& problem;
  const Draft* drafts;
  Rejection* rejections;
  int64_t batch;
  const float* target;
  int32_t count;  // of rejections

  __device__ __forceinline__ int32_t units() const {
    return static_cast<int32_t>(problem.vocab / kWidth);
  }
  __device__ __forceinline__ bool holds(int32_t) const { return true; }
  __device__ __forceinline__ bool certain() const { return problem.draft_probs.data == nullptr; }

  template <int kCount>
  __device__ __forceinline__ void values(int32_t index, float (&p)[kCount]) const {
    load_probabilities(target, index, p);
    for (int32_t r = 0; r < count; ++r) {
      const Rejection rejection = rejections[r];
      if (certain()) {
        const int64_t token = drafts[rejection.draft].token;
#pragma unroll
        for (int i = 0; i < kCount; ++i) p[i] = token == index + i ? 0.0f : p[i];
        continue;
      }
      float q[kCount];
      load_probabilities(problem.draft_probs.row(batch, rejection.draft), index, q);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        p[i] = as_probability(add_rounded(multiply_rounded(p[i], rejection.scale), -q[i]));
      }
    }
  }
  __device__ __forceinline__ Unit load(int32_t unit) const {
    Unit loaded;
    loaded.first = unit * kWidth;
    values(loaded.first, loaded.p);
    return loaded;
  }
  __device__ __forceinline__ float value(const Unit& unit, int i) const { return unit.p[i]; }
  __device__ __forceinline__ float at(int64_t token, float scale) const {
    if (token < 0 || token >= problem.vocab) return 0.0f;
    float p[1];
    values(static_cast<int32_t>(token), p);
    return as_probability(multiply_rounded(p[0], scale));
  }
};

__device__ __forceinline__ Mass probability_mass(int32_t, float p) { return mass_of(p); }

template <int kWidth>
__global__ void __launch_bounds__(kSamplingThreads, 1)
    speculative_verify_kernel(const __grid_constant__ VerifyProblem problem) {
  VerifyShared& shared = *dynamic_shared_memory<VerifyShared>();
  const int64_t batch = blockIdx.x;
  const auto drafts = static_cast<int32_t>(problem.drafts);
  const auto thread = static_cast<int32_t>(threadIdx.x);
  Draft* draft = shared.drafts();
  Residual<kWidth> residual{
      problem, draft, shared.rejections(drafts), batch, problem.target_probs.row(batch, 0), 0};

  for (int32_t n = thread; n < drafts; n += kSamplingThreads) {
    Draft loaded{-1, problem.parent(batch, n), 0, 0.0f, 1.0f};
    if (loaded.parent >= kRoot && loaded.parent < n) {
      loaded.token = problem.draft_tokens[batch * drafts + n];
      loaded.fraction = problem.draws.fraction(batch, n, DrawPurpose::kVerify);
      const bool exists = loaded.token >= 0 && loaded.token < problem.vocab;
      if (exists) {
        loaded.p = as_probability(problem.target_probs.row(batch, loaded.parent + 1)[loaded.token]);
      }
      if (!residual.certain()) {
        loaded.q = exists ? as_probability(problem.draft_probs.row(batch, n)[loaded.token]) : 0.0f;
      }
    }
    draft[n] = loaded;
  }
  __syncthreads();

  int64_t* tokens = problem.tokens + batch * (drafts + 1);
  int32_t* path = problem.path != nullptr ? problem.path + batch * drafts : nullptr;
  int32_t node = kRoot, accepted = 0, last = 0;
  float scale = 1.0f;   // 1 / the sum of the residual, where settled
  bool settled = true;  // whether the last rejection has been looked at
  // The sum, of the last rejection too. Where that leaves nothing it is taken back.
  const auto settle = [&] {
    Mass total = block_sum_of(residual, shared.warps, probability_mass);
    if (total == 0 && residual.count > 0) {
      --residual.count;
      total = block_sum_of(residual, shared.warps, probability_mass);
    }
    return total;
  };
  for (int32_t n = 0; n < drafts; ++n) {
    if (draft[n].parent >= kRoot) last = n + 1;
    if (draft[n].parent != node) continue;
    const Draft tried = draft[n];
    float p = tried.p;
    if (!settled) {
      const Mass total = settle();
      scale = total > 0 ? inverse_of(total) : 1.0f;
      settled = true;
    }
    if (residual.count > 0 || scale != 1.0f) p = residual.at(tried.token, scale);
    if (accepts(tried.fraction, p, tried.q)) {
      if (thread == 0) {
        tokens[accepted] = tried.token;
        if (path != nullptr) path[accepted] = n;
      }
      ++accepted;
      node = n;
      residual.target = problem.target_probs.row(batch, n + 1);
      residual.count = 0;
      scale = 1.0f;
    } else {
      __syncthreads();  // nobody still reads a rejection that was taken back
      if (thread == 0) residual.rejections[residual.count] = {n, scale};
      ++residual.count;
      settled = false;
      __syncthreads();
    }
  }

  const uint32_t fraction = problem.draws.fraction(batch, last, DrawPurpose::kVerify);
  Located drawn = locate(residual, fraction, shared.warps, probability_mass);
  if (drawn.total == 0 && residual.count > 0) {
    --residual.count;
    drawn = locate(residual, fraction, shared.warps, probability_mass);
  }
  if (thread == 0) {
    tokens[accepted] = drawn.total > 0 ? drawn.index : 0;
    problem.num_accepted[batch] = accepted;
  }
  for (int32_t n = accepted + thread; n < drafts; n += kSamplingThreads) {
    tokens[n + 1] = -1;
    if (path != nullptr) path[n] = -1;
  }
}

bool in_pieces(const ProbabilityView& probs, int64_t vocab) {
  return reinterpret_cast<uintptr_t>(probs.data) % 16 == 0 && vocab % 4 == 0 &&
         probs.batch_stride % 4 == 0 && probs.row_stride % 4 == 0;
}

}  // namespace

void speculative_verify(const char* op, const VerifyProblem& problem, cudaStream_t stream) {
  PUMICE_CHECK(problem.batch <= INT32_MAX, op, "too many sequences for one launch, ",
               problem.batch);
  const bool pieces = in_pieces(problem.target_probs, problem.vocab) &&
                      in_pieces(problem.draft_probs, problem.vocab);
  launch(pieces ? speculative_verify_kernel<4> : speculative_verify_kernel<1>,
         dim3(static_cast<unsigned>(problem.batch)), dim3(kSamplingThreads),
         shared_bytes(problem.drafts), stream, problem);
}

}  // namespace pumice::cuda
