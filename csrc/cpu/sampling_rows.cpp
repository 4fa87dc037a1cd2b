// kernel: sampling
//
// A row of logits to a distribution, or to a token drawn from it.
//
// The row is read once for its maximum, and those of its chunks: all that greedy sampling does, at
// the speed of memory. Weights are computed in a second pass, the row then lying in a cache: 25
// operations of vectors each, as fast as the L2 cache gives. A token is drawn by the masses of
// chunks, then within one. Filters come down to a logit (sampling_filter.h): chunks whose maximum
// is below it are not looked at again, so that top_k costs some k chunks more than greedy.
#include "cpu/sampling_filter.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

LogitRow row_of(const SamplingProblem& problem, int64_t row) {
  return {problem.logits, problem.dtype, row * problem.row_stride, problem.vocab};
}

bool keeps_all(const RowFilter& filter, int64_t vocab) {
  return filter.top_k == vocab && !filter.nucleus && !(filter.least_weight > 0);
}

// What a row keeps: all, or what the filters leave.
KeptTokens tokens_of(const LogitRow& row, float max, const RowFilter& filter,
                     const SamplingScratch& scratch) {
  if (keeps_all(filter, row.vocab)) return {};
  return RowFiltering{row, filter, scratch, max}.run();
}

struct Drawn {
  int64_t token;
  Mass total;
};

Drawn draw(const LogitRow& row, float max, const RowFilter& filter, const KeptTokens& kept,
           const SamplingScratch& scratch, uint32_t fraction) {
  float copy[kSamplingChunk], weights[kSamplingChunk];
  const int64_t chunks = sampling_chunks(row.vocab);
  Mass total = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    scratch.masses[c] = 0;
    if (!kept.may_keep(scratch.maxima[c])) continue;
    scratch.masses[c] = weigh_kept(row.chunk(c, copy), max, filter.scale, kept, weights);
    total += scratch.masses[c];
  }
  Mass target = part_of(total, fraction);
  const LogitChunk chunk = row.chunk(passing_chunk(scratch.masses, chunks, target), copy);
  weigh_kept(chunk, max, filter.scale, kept, weights);
  return {chunk.begin + passing_weight(weights, chunk.count, target), total};
}

void sample(const SamplingProblem& problem, const SamplingScratch& scratch, int64_t* tokens,
            float* logprobs, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const LogitRow row = row_of(problem, r);
    const RowFilter filter = problem.filters.of(r, problem.vocab);
    const Maximum max = find_maximum(row, scratch.maxima);
    tokens[r] = max.token;
    logprobs[r] = max.value == kNothing ? kNaN : 0.0f;
    if (filter.greedy || max.value == kNothing) continue;
    const uint32_t fraction = problem.draws.fraction(r, 0, DrawPurpose::kSample);
    const KeptTokens kept = tokens_of(row, max.value, filter, scratch);
    const Drawn drawn = draw(row, max.value, filter, kept, scratch, fraction);
    tokens[r] = drawn.token;
    const float logit = load_element(row.data, row.dtype, row.begin + drawn.token);
    logprobs[r] = log_probability(below_max(logit, max.value), filter.scale, drawn.total);
  }
}

void fill(float* probs, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) probs[i] = value;
}

void write_probabilities(const LogitRow& row, float max, const RowFilter& filter,
                         const KeptTokens& kept, const float* maxima, float* probs) {
  float copy[kSamplingChunk];
  Mass total = 0;
  for (int64_t c = 0; c < sampling_chunks(row.vocab); ++c) {
    const LogitChunk chunk = row.chunk(c, copy);
    float* weights = probs + chunk.begin;
    if (kept.may_keep(maxima[c])) {
      total += weigh_kept(chunk, max, filter.scale, kept, weights);
    } else {
      fill(weights, chunk.count, 0.0f);
    }
  }
  const float inverse = inverse_of(total);
  for (int64_t i = 0; i < row.vocab; ++i) probs[i] *= inverse;
}

void probabilities(const SamplingProblem& problem, const SamplingScratch& scratch, float* all_probs,
                   int64_t begin, int64_t end) {
  const int64_t vocab = problem.vocab;
  for (int64_t r = begin; r < end; ++r) {
    const LogitRow row = row_of(problem, r);
    const RowFilter filter = problem.filters.of(r, vocab);
    const Maximum max = find_maximum(row, scratch.maxima);
    float* probs = all_probs + r * vocab;
    if (max.value == kNothing) {
      fill(probs, vocab, kNaN);
    } else if (filter.greedy) {
      fill(probs, vocab, 0.0f);
      probs[max.token] = 1.0f;
    } else {
      const KeptTokens kept = tokens_of(row, max.value, filter, scratch);
      write_probabilities(row, max.value, filter, kept, scratch.maxima, probs);
    }
  }
}

}  // namespace

const SamplingKernels sampling_kernels = {probabilities, sample};

}  // namespace pumice::cpu::PUMICE_ISA
