// What the sampling operators are asked, as host and device code see it.
#pragma once

#include "common/dtype.h"
#include "common/philox.h"
#include "common/sampling_numerics.h"

namespace pumice {

// A parameter of each row, or one for all of them (stride 0); null where it is not given.
template <class T>
struct RowParameter {
  const T* data = nullptr;
  int64_t stride = 0;

  PUMICE_HOST_DEVICE_MEMBER T of(int64_t row, T otherwise) const {
    return data != nullptr ? data[row * stride] : otherwise;
  }
};

// How a row of logits becomes a distribution.
struct RowFilter {
  bool greedy;         // all of it at the first maximum
  SoftmaxScale scale;  // log2(e) / temperature
  int64_t top_k;       // from 1 to V - 1, or V: all
  bool nucleus;        // whether top_p cuts
  uint32_t top_p;      // in units of 2^-32
  float least_weight;  // of the tokens kept, the most probable one's being 1; 0: all
};

struct FilterParameters {
  RowParameter<float> temperature;
  RowParameter<int32_t> top_k;
  RowParameter<float> top_p, min_p;

  PUMICE_HOST_DEVICE_MEMBER RowFilter of(int64_t row, int64_t vocab) const {
    RowFilter filter;
    const float t = temperature.of(row, 1.0f), p = top_p.of(row, 1.0f), m = min_p.of(row, 0.0f);
    const int64_t k = top_k.of(row, 0);
    filter.greedy = !(t > 0.0f);  // and NaN
    filter.scale = softmax_scale_of(filter.greedy ? 1.0f : t);
    filter.top_k = k > 0 && k < vocab ? k : vocab;
    filter.nucleus = p < 1.0f;  // and not NaN
    filter.top_p = fraction_bits(p);
    filter.least_weight = m > 0.0f ? (m < 1.0f ? m : 1.0f) : 0.0f;
    return filter;
  }
};

// The fourth word of the counter: an operator's own numbers, whatever seed others draw with. A
// draft sampled and verified by numbers that depend on each other would not be exact.
enum class DrawPurpose : uint32_t { kSample = 0, kVerify = 1 };

// Where a row's uniform numbers come from: a table, or Philox of the row's seed and position.
struct DrawSource {
  const float* uniforms = nullptr;  // [rows, draws]
  int64_t draws = 1;
  const int64_t* seeds = nullptr;  // [rows]
  const int64_t* positions = nullptr;

  // In units of 2^-32.
  PUMICE_HOST_DEVICE_MEMBER uint32_t fraction(int64_t row, int64_t index,
                                              DrawPurpose purpose) const {
    if (uniforms != nullptr) return fraction_bits(uniforms[row * draws + index]);
    const uint64_t seed = static_cast<uint64_t>(seeds[row]);
    const uint64_t position = static_cast<uint64_t>(positions[row]);
    const Philox4 counter = {{static_cast<uint32_t>(position),
                              static_cast<uint32_t>(position >> 32), static_cast<uint32_t>(index),
                              static_cast<uint32_t>(purpose)}};
    return philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32))
        .word[0];
  }
};

// sampling_probs and sample: R rows of V logits.
struct SamplingProblem {
  const void* logits = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0, vocab = 0;
  int64_t row_stride = 0;
  FilterParameters filters;
  DrawSource draws;
};

// Rows of V probabilities [B, rows, V].
struct ProbabilityView {
  const float* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0;

  PUMICE_HOST_DEVICE_MEMBER const float* row(int64_t batch, int64_t index) const {
    return data + batch * batch_stride + index * row_stride;
  }
};

constexpr int32_t kRoot = -1;

// speculative_verify and speculative_verify_tree: of B sequences, N drafts each. A chain is the
// tree in which every draft follows the one before.
struct VerifyProblem {
  int64_t batch = 0, drafts = 0, vocab = 0;
  const int64_t* draft_tokens = nullptr;  // [B, N]
  const int32_t* num_drafts = nullptr;    // [B], of a chain; null: N
  const int32_t* parents = nullptr;       // [B, N]; null: a chain
  ProbabilityView draft_probs;            // null: each draft was certain
  ProbabilityView target_probs;           // N + 1 rows: after the root, after each draft
  DrawSource draws;
  int64_t* tokens = nullptr;        // [B, N + 1]
  int32_t* path = nullptr;          // [B, N] of a tree
  int32_t* num_accepted = nullptr;  // [B]

  // The node before draft n of a sequence: another draft, kRoot, or something else for padding.
  PUMICE_HOST_DEVICE_MEMBER int32_t parent(int64_t batch_index, int64_t n) const {
    if (parents != nullptr) return parents[batch_index * drafts + n];
    const int64_t count = num_drafts != nullptr ? num_drafts[batch_index] : drafts;
    return n < count ? static_cast<int32_t>(n) - 1 : kRoot - 1;
  }
};

}  // namespace pumice
