// What the sampling operators ask of the CPU kernels: one table of functions for each instruction
// set. Every function is single-threaded and works on a range of rows or sequences, with a scratch
// of its own. No torch here.
#pragma once

#include "common/sampling_problem.h"

namespace pumice::cpu {

// A vocabulary is looked at in chunks, of which some numbers are kept.
constexpr int64_t kSamplingChunk = 128;

constexpr int64_t sampling_chunks(int64_t vocab) {
  return (vocab + kSamplingChunk - 1) / kSamplingChunk;
}

// A token that may be drawn. Tokens are ranked by `order`: by logit, and of equals the first.
struct Candidate {
  uint64_t order;
  Mass mass;
};

struct SamplingScratch {
  float* maxima;          // [chunks]
  Mass* masses;           // [chunks]
  Candidate* candidates;  // [V]
};

struct VerifyScratch {
  Mass* masses;       // [chunks]
  int32_t* rejected;  // [N]
  float* scales;      // [N]
};

struct SamplingKernels {
  void (*probabilities)(const SamplingProblem& problem, const SamplingScratch& scratch,
                        float* probs, int64_t begin, int64_t end);
  void (*sample)(const SamplingProblem& problem, const SamplingScratch& scratch, int64_t* tokens,
                 float* logprobs, int64_t begin, int64_t end);
};

struct VerifyKernels {
  void (*verify)(const VerifyProblem& problem, const VerifyScratch& scratch, int64_t begin,
                 int64_t end);
};

#define PUMICE_DECLARE_SAMPLING_KERNELS(isa)     \
  namespace isa {                                \
  extern const SamplingKernels sampling_kernels; \
  extern const VerifyKernels verify_kernels;     \
  }
PUMICE_DECLARE_SAMPLING_KERNELS(portable)
PUMICE_DECLARE_SAMPLING_KERNELS(avx2)
PUMICE_DECLARE_SAMPLING_KERNELS(avx512vnni)
#undef PUMICE_DECLARE_SAMPLING_KERNELS

}  // namespace pumice::cpu
