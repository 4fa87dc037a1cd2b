// Launchers of the sampling kernels. Host code only.
#pragma once

#include "common/sampling_problem.h"
#include "cuda/device.h"

namespace pumice::cuda {

// What to make of each row: probabilities [R, V], or tokens and their log-probabilities [R].
struct SamplingOutput {
  float* probs = nullptr;
  int64_t* tokens = nullptr;
  float* logprobs = nullptr;
};

void sampling(const char* op, const SamplingProblem& problem, const SamplingOutput& output,
              cudaStream_t stream);

void speculative_verify(const char* op, const VerifyProblem& problem, cudaStream_t stream);

// Drafts of a sequence that fit into a block's shared memory.
constexpr int64_t kMaxCudaDrafts = 4096;

}  // namespace pumice::cuda
