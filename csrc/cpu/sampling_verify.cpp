// kernel: speculative_verify
//
// Leviathan et al., 2023, and its extension to trees (Miao et al., 2024, "SpecInfer"): walk from
// the root; of a node's children the first accepted one is next; a rejected child x takes its
// distribution away, p <- norm(max(p - q, 0)); where no child is accepted a token is drawn from p.
//
// What is left of p after some rejections is computed from its row and the drafts' rows whenever it
// is needed, which is once for each child that has an elder sibling, and for the last token: 2 rows
// of V floats read, for a chain.
#include <algorithm>

#include "cpu/sampling_row.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// The distribution after a node, less what its rejected children took.
struct Residual {
  const VerifyProblem& problem;
  const VerifyScratch& scratch;
  int64_t batch;
  const float* target;
  int32_t count = 0;   // of rejected children
  float scale = 1.0f;  // 1 / its sum, as far as that is known

  bool certain() const { return problem.draft_probs.data == nullptr; }
  int64_t token_of(int64_t n) const { return problem.draft_tokens[batch * problem.drafts + n]; }

  // out[v] = p(v) for `size` tokens from `begin` on, up to a factor; the mass of that.
  Mass chunk(int64_t begin, int64_t size, float* out) const {
    for (int64_t i = 0; i < size; ++i) out[i] = as_probability(target[begin + i]);
    for (int32_t r = 0; r < count; ++r) {
      if (certain()) {
        const int64_t at = token_of(scratch.rejected[r]) - begin;
        if (at >= 0 && at < size) out[at] = 0.0f;
        continue;
      }
      const float* draft = problem.draft_probs.row(batch, scratch.rejected[r]) + begin;
      const float factor = scratch.scales[r];
      for (int64_t i = 0; i < size; ++i) {
        const float left = out[i] * factor - as_probability(draft[i]);
        out[i] = as_probability(left);
      }
    }
    Mass mass = 0;
    for (int64_t i = 0; i < size; ++i) mass += mass_of(out[i]);
    return mass;
  }

  float at(int64_t token) const {
    if (token < 0 || token >= problem.vocab) return 0.0f;
    float p;
    chunk(token, 1, &p);
    return as_probability(p * scale);
  }

  float draft_at(int64_t n, int64_t token) const {
    if (certain()) return 1.0f;
    if (token < 0 || token >= problem.vocab) return 0.0f;
    return as_probability(problem.draft_probs.row(batch, n)[token]);
  }

  // Nothing is rejected yet after another node, whose row is given.
  void begin_at(int64_t row) {
    target = problem.target_probs.row(batch, row);
    count = 0;
    scale = 1.0f;
  }

  void reject(int64_t n) {
    scratch.rejected[count] = static_cast<int32_t>(n);
    scratch.scales[count] = certain() ? 1.0f : scale;
    ++count;
  }

  Mass measure() const {
    float p[kSamplingChunk];
    Mass total = 0;
    for (int64_t c = 0; c < sampling_chunks(problem.vocab); ++c) {
      const int64_t begin = c * kSamplingChunk;
      scratch.masses[c] = chunk(begin, std::min(kSamplingChunk, problem.vocab - begin), p);
      total += scratch.masses[c];
    }
    return total;
  }

  // The sum, of the last rejection too. Where that leaves nothing, which only rounding or input
  // that is no distribution can make, it is taken back.
  Mass settle() {
    Mass total = measure();
    while (total == 0 && count > 0) {
      --count;
      total = measure();
    }
    return total;
  }

  int64_t draw(uint32_t fraction) {
    float p[kSamplingChunk];
    const Mass total = settle();
    if (total == 0) return 0;
    Mass target_mass = part_of(total, fraction);
    const int64_t begin =
        kSamplingChunk * passing_chunk(scratch.masses, sampling_chunks(problem.vocab), target_mass);
    const int64_t size = std::min(kSamplingChunk, problem.vocab - begin);
    chunk(begin, size, p);
    return begin + passing_weight(p, size, target_mass);
  }
};

void verify_one(const VerifyProblem& problem, const VerifyScratch& scratch, int64_t batch) {
  const int64_t drafts = problem.drafts;
  int64_t* tokens = problem.tokens + batch * (drafts + 1);
  int32_t* path = problem.path != nullptr ? problem.path + batch * drafts : nullptr;
  const auto fraction = [&](int64_t n) {
    return problem.draws.fraction(batch, n, DrawPurpose::kVerify);
  };

  Residual residual{problem, scratch, batch, problem.target_probs.row(batch, 0)};
  int32_t node = kRoot, accepted = 0;
  bool settled = true;
  int64_t last = 0;  // the index of the last number, after those of all nodes
  for (int64_t n = 0; n < drafts; ++n) {
    const int32_t parent = problem.parent(batch, n);
    if (parent >= kRoot) last = n + 1;
    if (parent != node) continue;
    if (!settled) {
      const Mass total = residual.settle();
      residual.scale = total > 0 ? inverse_of(total) : 1.0f;
      settled = true;
    }
    const int64_t token = residual.token_of(n);
    if (accepts(fraction(n), residual.at(token), residual.draft_at(n, token))) {
      if (path != nullptr) path[accepted] = static_cast<int32_t>(n);
      tokens[accepted++] = token;
      node = static_cast<int32_t>(n);
      residual.begin_at(n + 1);
      settled = true;
    } else {
      residual.reject(n);
      settled = false;
    }
  }
  problem.num_accepted[batch] = accepted;
  tokens[accepted] = residual.draw(fraction(last));
  std::fill(tokens + accepted + 1, tokens + drafts + 1, int64_t{-1});
  if (path != nullptr) std::fill(path + accepted, path + drafts, -1);
}

void verify(const VerifyProblem& problem, const VerifyScratch& scratch, int64_t begin,
            int64_t end) {
  for (int64_t batch = begin; batch < end; ++batch) verify_one(problem, scratch, batch);
}

}  // namespace

const VerifyKernels verify_kernels = {verify};

}  // namespace pumice::cpu::PUMICE_ISA
