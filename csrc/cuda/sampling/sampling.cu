// kernel: sampling
//
// A row of logits to a distribution, or to a token drawn from it: a block of 512 threads a row, one
// on an SM, so that one launch does without waiting between blocks.
//
// The row is read for its maximum; greedy sampling ends there. Filters first find a bound on what
// they keep (the k-th largest of the threads' maxima; a weight from the mass that top_p leaves out;
// min_p itself) and set aside what is not below it, as a rule some hundred tokens of a hundred
// thousand: then all else happens in shared memory. Where these do not fit, or there is no bound,
// the same code reads the row again for every step, from the L2 cache.
//
// A thread has 64 bytes under way, an SM 32 KB, which Little's law asks for at 4.1 TB/s. For many
// rows bound by memory: 256 rows of 152064 logits in 16 bits are 78 MB, 19 µs a pass, of which
// there are one if greedy, 2 with top_k or min_p, 2.1 without filters, 3 with top_p alone; some 25
// instructions a weight take as long as 8 bytes of memory, so that 60 % of that is expected. For
// few rows bound by what one SM has under way: 300 KB, some 7 µs a pass.
#include "cuda/launch.h"
#include "cuda/sampling/sampling.h"
#include "cuda/sampling/sampling_filter.h"
#include "cuda/sampling/sampling_locate.h"

namespace pumice::cuda {
namespace {

constexpr int32_t kMaxCandidates = 4096;

struct SamplingShared {
  SelectShared select;
  RowFilter filter;
  float bound;
  int32_t count;
  uint32_t maxima[kSamplingThreads];
  float logits[kMaxCandidates];
  int32_t tokens[kMaxCandidates];
};

// The logit from which on tokens may be kept, -∞ if there is no such bound; to every thread.
__device__ __forceinline__ float find_bound(const RowFilter& filter, int32_t vocab, Mass all,
                                            const RowWeights& weights, SamplingShared& shared) {
  float bound = -INFINITY;
  if (filter.top_k < vocab && filter.top_k <= kSamplingThreads) {
    // k threads have maxima not below the k-th largest maximum, hence so many tokens are not.
    const Selected last = select(
        Numbers{kSamplingThreads}, 0, order_key(weights.max), static_cast<Mass>(filter.top_k),
        shared.select, [&](int32_t thread, float) { return shared.maxima[thread]; },
        [](int32_t, float) { return Mass{1}; });
    if (last.key != 0) bound = float_of_order_key(last.key);
  }
  if (threadIdx.x == 0) {
    if (filter.nucleus && filter.top_k == vocab) {
      bound =
          least_logit_of(nucleus_weight_of(filter.top_p, all, vocab), weights.max, weights.scale);
    }
    // The mass that top_p is a part of may be that of tokens which min_p removes.
    if (filter.least_weight > 0.0f && !filter.nucleus) {
      bound = fmaxf(bound, least_logit_of(filter.least_weight, weights.max, weights.scale));
    }
    shared.bound = isfinite(weights.max) ? bound : -INFINITY;
  }
  __syncthreads();
  return shared.bound;
}

// Sets aside the row's tokens from the bound on; returns how many there are, more than fit perhaps.
// A thread reads again only if its own maximum is not below it.
template <class T>
__device__ __forceinline__ int32_t collect(const LogitRow<T>& row, float bound, float own_max,
                                           SamplingShared& shared) {
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  if (own_max >= bound) {
    visit_all(row, [&](int32_t index, float logit) {
      if (!(logit >= bound)) return;
      const int32_t slot = atomicAdd(&shared.count, 1);
      if (slot >= kMaxCandidates) return;
      shared.logits[slot] = logit;
      shared.tokens[slot] = index;
    });
  }
  __syncthreads();
  return shared.count;
}

// What becomes of a row.
template <class T>
struct RowOutput {
  const SamplingProblem& problem;
  const SamplingOutput& output;
  const LogitRow<T>& row;
  int64_t index;

  __device__ __forceinline__ float* probs() const { return output.probs + index * problem.vocab; }

  // All of it at a token, or nothing is a distribution here.
  __device__ __forceinline__ void write_certain(int32_t token, bool exists) const {
    if (output.probs == nullptr) {
      if (threadIdx.x != 0) return;
      output.tokens[index] = token;
      output.logprobs[index] = exists ? 0.0f : NAN;
      return;
    }
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < row.vocab; i += kSamplingThreads) {
      probs()[i] = !exists ? NAN : i == token ? 1.0f : 0.0f;
    }
  }

  __device__ __forceinline__ void write_token(int32_t token, Mass total,
                                              const RowWeights& weights) const {
    if (threadIdx.x != 0) return;
    output.tokens[index] = token;
    const float below = below_max(to_float(row.data[token]), weights.max);
    output.logprobs[index] = log_probability(below, weights.scale, total);
  }

  __device__ __forceinline__ uint32_t fraction() const {
    return problem.draws.fraction(index, 0, DrawPurpose::kSample);
  }
};

// From the whole row.
template <class T, class MassOf>
__device__ __forceinline__ void finish(const RowOutput<T>& out, const LogitRow<T>& row,
                                       const KeptTokens& kept, const RowWeights& weights,
                                       SelectShared& shared, MassOf&& mass) {
  if (out.output.probs == nullptr) {
    const Located drawn = locate(row, out.fraction(), shared.warps, mass);
    return out.write_token(drawn.index, drawn.total, weights);
  }
  const float inverse = inverse_of(block_sum_of(row, shared.warps, mass));
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < row.vocab; i += kSamplingThreads) {
    const float logit = to_float(row.data[i]), weight = weights.of(logit);
    out.probs()[i] = kept.keeps(i, logit, weight) ? multiply_rounded(weight, inverse) : 0.0f;
  }
}

// From candidates that hold all that is kept.
template <class T, class MassOf>
__device__ __forceinline__ void finish(const RowOutput<T>& out, const CandidateList& candidates,
                                       const KeptTokens& kept, const RowWeights& weights,
                                       SelectShared& shared, MassOf&& mass) {
  const Mass total = block_sum_of(candidates, shared.warps, mass);
  if (out.output.probs == nullptr) {
    const Mass need = part_of(total, out.fraction()) + 1;
    const int32_t token = find_token(candidates, out.row.vocab, need, shared, mass);
    return out.write_token(token, total, weights);
  }
  const float inverse = inverse_of(total);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < out.row.vocab; i += kSamplingThreads) {
    out.probs()[i] = 0.0f;
  }
  __syncthreads();
  visit_all(candidates, [&](int32_t index, float logit) {
    const float weight = weights.of(logit);
    if (kept.keeps(index, logit, weight)) out.probs()[index] = multiply_rounded(weight, inverse);
  });
}

template <class T>
__global__ void __launch_bounds__(kSamplingThreads, 1)
    sampling_kernel(const __grid_constant__ SamplingProblem problem,
                    const __grid_constant__ SamplingOutput output) {
  SamplingShared& shared = *dynamic_shared_memory<SamplingShared>();
  const int64_t index = blockIdx.x;
  const auto vocab = static_cast<int32_t>(problem.vocab);
  const LogitRow<T> row(static_cast<const T*>(problem.logits) + index * problem.row_stride, vocab);
  const RowOutput<T> out{problem, output, row, index};

  if (threadIdx.x == 0) shared.filter = problem.filters.of(index, vocab);
  float own_max = -INFINITY;
  int32_t own_token = 0;
  visit_all(row, [&](int32_t token, float logit) {
    if (logit > own_max) {
      own_max = logit;
      own_token = token;
    }
  });
  const bool any = own_max > -INFINITY;
  const uint32_t own_key = any ? order_key(own_max) : 0;
  shared.maxima[threadIdx.x] = own_key;
  const uint64_t rank = any ? uint64_t{own_key} << 32 | ~static_cast<uint32_t>(own_token) : 0;
  const uint64_t first = block_max(rank, shared.select.warps);
  const RowFilter filter = shared.filter;
  if (first == 0 || filter.greedy) {
    return out.write_certain(first == 0 ? 0 : static_cast<int32_t>(~static_cast<uint32_t>(first)),
                             first != 0);
  }

  const RowWeights weights{float_of_order_key(static_cast<uint32_t>(first >> 32)), filter.scale};
  const auto run = [&](const auto& source, const KeptTokens& kept) {
    finish(out, source, kept, weights, shared.select, [&](int32_t token, float logit) {
      const float weight = weights.of(logit);
      return kept.keeps(token, logit, weight) ? mass_of(weight) : 0;
    });
  };
  const bool only_top_p = filter.nucleus && filter.top_k == vocab;
  if (filter.top_k == vocab && !filter.nucleus && !(filter.least_weight > 0.0f)) {
    return run(row, KeptTokens{});
  }
  const Mass all =
      only_top_p ? block_sum_of(row, shared.select.warps,
                                [&](int32_t, float logit) { return mass_of(weights.of(logit)); })
                 : 0;
  const float bound = find_bound(filter, vocab, all, weights, shared);
  if (bound > -INFINITY) {
    const int32_t count = collect(row, bound, own_max, shared);
    if (count <= kMaxCandidates) {
      const CandidateList candidates{shared.logits, shared.tokens, count};
      return run(candidates,
                 filter_tokens(candidates, count, filter, vocab, weights, all, shared.select));
    }
  }
  run(row, filter_tokens(row, vocab, filter, vocab, weights, all, shared.select));
}

}  // namespace

void sampling(const char* op, const SamplingProblem& problem, const SamplingOutput& output,
              cudaStream_t stream) {
  PUMICE_CHECK(problem.rows <= INT32_MAX, op, "too many rows for one launch, ", problem.rows);
  dispatch_element(problem.dtype, [&](auto element) {
    launch(sampling_kernel<decltype(element)>, dim3(static_cast<unsigned>(problem.rows)),
           dim3(kSamplingThreads), sizeof(SamplingShared), stream, problem, output);
  });
}

}  // namespace pumice::cuda
