// kernel: sampling
//
// A row of logits to a distribution, or to a token drawn from it.
//
// The row is read once for its maximum: all that greedy sampling does, at the speed of memory.
// Weights are computed in a second pass, the row then lying in a cache: 25 operations of vectors
// each, as fast as the L2 cache gives. A token is drawn by the masses of chunks, then within one.
// Filters look again at the chunks whose maximum is not below a bound on what they keep, some k of
// them for top_k, and choose among those candidates (sampling_filter.h).
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

struct Drawn {
  int64_t token;
  Mass total;
};

Drawn draw_of_all(const LogitRow& row, float max, const RowFilter& filter,
                  const SamplingScratch& scratch, uint32_t fraction) {
  float copy[kSamplingChunk], weights[kSamplingChunk];
  const int64_t chunks = sampling_chunks(row.vocab);
  Mass total = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    const LogitChunk chunk = row.chunk(c, copy);
    scratch.masses[c] = weigh(chunk.at, chunk.count, max, filter.scale, weights);
    total += scratch.masses[c];
  }
  Mass target = part_of(total, fraction);
  const LogitChunk chunk = row.chunk(passing_chunk(scratch.masses, chunks, target), copy);
  weigh(chunk.at, chunk.count, max, filter.scale, weights);
  return {chunk.begin + passing_weight(weights, chunk.count, target), total};
}

Mass mass_of_candidates(const Candidate* candidates, int64_t count) {
  Mass total = 0;
  for (int64_t i = 0; i < count; ++i) total += candidates[i].mass;
  return total;
}

Drawn draw_of_candidates(const Candidate* candidates, int64_t count, uint32_t fraction) {
  const Mass total = mass_of_candidates(candidates, count);
  Mass target = part_of(total, fraction);
  int64_t i = 0;
  for (; i + 1 < count && candidates[i].mass <= target; ++i) target -= candidates[i].mass;
  return {token_of(candidates[i].order), total};
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
    Drawn drawn;
    if (keeps_all(filter, problem.vocab)) {
      drawn = draw_of_all(row, max.value, filter, scratch, fraction);
    } else {
      const int64_t count = FilteredRow{row, filter, scratch, max.value}.run();
      drawn = draw_of_candidates(scratch.candidates, count, fraction);
    }
    tokens[r] = drawn.token;
    const float logit = load_element(row.data, row.dtype, row.begin + drawn.token);
    logprobs[r] = log_probability(below_max(logit, max.value), filter.scale, drawn.total);
  }
}

void fill(float* probs, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) probs[i] = value;
}

void all_probabilities(const LogitRow& row, float max, const RowFilter& filter, float* probs) {
  float copy[kSamplingChunk];
  Mass total = 0;
  for (int64_t c = 0; c < sampling_chunks(row.vocab); ++c) {
    const LogitChunk chunk = row.chunk(c, copy);
    total += weigh(chunk.at, chunk.count, max, filter.scale, probs + chunk.begin);
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
    } else if (keeps_all(filter, vocab)) {
      all_probabilities(row, max.value, filter, probs);
    } else {
      const FilteredRow filtered{row, filter, scratch, max.value};
      const int64_t count = filtered.run();
      const float inverse = inverse_of(mass_of_candidates(scratch.candidates, count));
      fill(probs, vocab, 0.0f);
      for (int64_t i = 0; i < count; ++i) {
        const Candidate& candidate = scratch.candidates[i];
        probs[token_of(candidate.order)] = filtered.weight_of(candidate) * inverse;
      }
    }
  }
}

}  // namespace

const SamplingKernels sampling_kernels = {probabilities, sample};

}  // namespace pumice::cpu::PUMICE_ISA
