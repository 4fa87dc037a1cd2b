// Checked arguments of the sampling operators, shared by the CPU and CUDA entry points. Problems
// come back without their pointers.
#pragma once

#include "common/args.h"
#include "common/sampling_problem.h"

namespace pumice {

struct SamplingTensors {
  Tensor logits;
  std::optional<Tensor> temperature, top_k, top_p, min_p;
};

struct DrawTensors {
  std::optional<Tensor> uniforms, seeds, positions;
};

struct VerifyTensors {
  Tensor draft_tokens;
  std::optional<Tensor> num_drafts, parents, draft_probs;
  Tensor target_probs;
  DrawTensors draws;
};

inline void check_on(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  PUMICE_CHECK(tensor.is_contiguous() && same_device(tensor, like), op, name,
               " must be contiguous, on the device of the others");
}

inline void check_vocab(const char* op, int64_t vocab) {
  PUMICE_CHECK(vocab >= 1 && vocab <= kMaxVocab, op, "the vocabulary must have from 1 to ",
               kMaxVocab, " tokens, not ", vocab);
}

// A parameter [R] or [1]; returns its stride.
inline int64_t check_row_parameter(const char* op, const char* name,
                                   const std::optional<Tensor>& parameter, ScalarType type,
                                   int64_t rows, const Tensor& like) {
  if (!parameter) return 0;
  PUMICE_CHECK(parameter->scalar_type() == type && parameter->dim() == 1 &&
                   (parameter->size(0) == 1 || parameter->size(0) == rows),
               op, name, " must be ", type == ScalarType::Int ? "int32" : "float32",
               " of shape [1] or [", rows, "]");
  check_on(op, name, *parameter, like);
  return parameter->size(0) == 1 ? 0 : 1;
}

// uniforms [rows, draws] ([rows] for one draw), or seeds and positions [rows].
inline DrawSource check_draws(const char* op, const DrawTensors& tensors, int64_t rows,
                              int64_t draws, const Tensor& like) {
  DrawSource source;
  source.draws = draws;
  PUMICE_CHECK(tensors.seeds.has_value() == tensors.positions.has_value() &&
                   tensors.uniforms.has_value() != tensors.seeds.has_value(),
               op, "takes either uniforms or both seeds and positions");
  if (tensors.uniforms) {
    const Tensor& uniforms = *tensors.uniforms;
    check_float32(op, "uniforms", uniforms);
    PUMICE_CHECK(
        uniforms.dim() >= 1 && uniforms.size(0) == rows && uniforms.numel() == rows * draws, op,
        "uniforms must have ", rows, " rows of ", draws);
    check_on(op, "uniforms", uniforms, like);
    return source;
  }
  for (const auto& [name, tensor] :
       {std::pair("seeds", &*tensors.seeds), std::pair("positions", &*tensors.positions)}) {
    PUMICE_CHECK(
        tensor->scalar_type() == ScalarType::Long && tensor->dim() == 1 && tensor->size(0) == rows,
        op, name, " must be int64 of shape [", rows, "]");
    check_on(op, name, *tensor, like);
  }
  return source;
}

// `draws` is null for the distribution alone.
inline SamplingProblem check_sampling(const char* op, SamplingTensors& tensors,
                                      const DrawTensors* draws) {
  Tensor& logits = tensors.logits;
  PUMICE_CHECK(logits.dim() == 2 && is_floating_activation(logits.scalar_type()), op,
               "logits must have shape [R, V], float32, float16 or bfloat16");
  if (logits.stride(1) != 1 && logits.size(1) > 1) logits = torch::stable::contiguous(logits);
  SamplingProblem problem;
  problem.dtype = to_dtype(logits.scalar_type());
  problem.rows = logits.size(0);
  problem.vocab = logits.size(1);
  problem.row_stride = logits.stride(0);
  check_vocab(op, problem.vocab);
  FilterParameters& filters = problem.filters;
  const auto check = [&](const char* name, const std::optional<Tensor>& parameter,
                         ScalarType type) {
    return check_row_parameter(op, name, parameter, type, problem.rows, logits);
  };
  filters.temperature.stride = check("temperature", tensors.temperature, ScalarType::Float);
  filters.top_k.stride = check("top_k", tensors.top_k, ScalarType::Int);
  filters.top_p.stride = check("top_p", tensors.top_p, ScalarType::Float);
  filters.min_p.stride = check("min_p", tensors.min_p, ScalarType::Float);
  if (draws != nullptr) problem.draws = check_draws(op, *draws, problem.rows, 1, logits);
  return problem;
}

// Probabilities [B, rows, V] with neighbouring elements of a row.
inline ProbabilityView check_probabilities(const char* op, const char* name, Tensor& probs,
                                           int64_t batch, int64_t rows, int64_t vocab,
                                           const Tensor& like) {
  check_float32(op, name, probs);
  PUMICE_CHECK(
      probs.dim() == 3 && probs.size(0) == batch && probs.size(1) == rows && probs.size(2) == vocab,
      op, name, " must have shape [", batch, ", ", rows, ", ", vocab, "]");
  PUMICE_CHECK(same_device(probs, like), op, name, " must be on the device of the others");
  if (probs.stride(2) != 1 && vocab > 1) probs = torch::stable::contiguous(probs);
  return {nullptr, probs.stride(0), probs.stride(1)};
}

inline void check_of_drafts(const char* op, const char* name, const Tensor& tensor, ScalarType type,
                            std::initializer_list<int64_t> shape, const Tensor& like) {
  PUMICE_CHECK(tensor.scalar_type() == type && tensor.sizes().vec() == std::vector<int64_t>(shape),
               op, name, " must be ", type == ScalarType::Int ? "int32" : "int64", " with a place ",
               shape.size() == 1 ? "for each sequence" : "for each draft of each sequence");
  check_on(op, name, tensor, like);
}

inline VerifyProblem check_verify(const char* op, VerifyTensors& tensors) {
  VerifyProblem problem;
  const Tensor& drafts = tensors.draft_tokens;
  PUMICE_CHECK(drafts.dim() == 2 && tensors.target_probs.dim() == 3, op,
               "draft_tokens must have shape [B, N] and target_probs [B, N + 1, V]");
  problem.batch = drafts.size(0);
  problem.drafts = drafts.size(1);
  problem.vocab = tensors.target_probs.size(2);
  PUMICE_CHECK(problem.drafts < INT32_MAX, op, "there are too many drafts");
  check_vocab(op, problem.vocab);
  check_of_drafts(op, "draft_tokens", drafts, ScalarType::Long, {problem.batch, problem.drafts},
                  drafts);
  if (tensors.num_drafts) {
    check_of_drafts(op, "num_drafts", *tensors.num_drafts, ScalarType::Int, {problem.batch},
                    drafts);
  }
  if (tensors.parents) {
    check_of_drafts(op, "parents", *tensors.parents, ScalarType::Int,
                    {problem.batch, problem.drafts}, drafts);
  }
  problem.target_probs =
      check_probabilities(op, "target_probs", tensors.target_probs, problem.batch,
                          problem.drafts + 1, problem.vocab, drafts);
  if (tensors.draft_probs) {
    problem.draft_probs = check_probabilities(op, "draft_probs", *tensors.draft_probs,
                                              problem.batch, problem.drafts, problem.vocab, drafts);
  }
  problem.draws = check_draws(op, tensors.draws, problem.batch, problem.drafts + 1, drafts);
  return problem;
}

}  // namespace pumice
