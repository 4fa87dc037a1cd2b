// The sampling operators on CUDA: arguments and outputs; one launch each.
#include "common/sampling_args.h"
#include "cuda/sampling/sampling.h"
#include "cuda/tensor_access.h"

namespace pumice::cuda {
namespace {

using torch::stable::new_empty;

template <class T>
const T* pointer_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? read_pointer<T>(*tensor) : nullptr;
}

void set_pointers(const DrawTensors& tensors, DrawSource& draws) {
  draws.uniforms = pointer_or_null<float>(tensors.uniforms);
  draws.seeds = pointer_or_null<int64_t>(tensors.seeds);
  draws.positions = pointer_or_null<int64_t>(tensors.positions);
}

void set_pointers(const SamplingTensors& tensors, SamplingProblem& problem) {
  problem.logits = read_pointer<void>(tensors.logits);
  problem.filters.temperature.data = pointer_or_null<float>(tensors.temperature);
  problem.filters.top_k.data = pointer_or_null<int32_t>(tensors.top_k);
  problem.filters.top_p.data = pointer_or_null<float>(tensors.top_p);
  problem.filters.min_p.data = pointer_or_null<float>(tensors.min_p);
}

Tensor probabilities(Tensor logits, std::optional<Tensor> temperature, std::optional<Tensor> top_k,
                     std::optional<Tensor> top_p, std::optional<Tensor> min_p) {
  const char* op = "pumice::sampling_probs";
  SamplingTensors tensors{logits, temperature, top_k, top_p, min_p};
  SamplingProblem problem = check_sampling(op, tensors, nullptr);
  const DeviceGuard guard(logits);
  Tensor probs = new_empty(logits, {problem.rows, problem.vocab}, ScalarType::Float);
  if (problem.rows == 0) return probs;
  set_pointers(tensors, problem);
  SamplingOutput output;
  output.probs = write_pointer<float>(probs);
  sampling(op, problem, output, current_stream(logits));
  return probs;
}

std::tuple<Tensor, Tensor> sample(Tensor logits, std::optional<Tensor> temperature,
                                  std::optional<Tensor> top_k, std::optional<Tensor> top_p,
                                  std::optional<Tensor> min_p, std::optional<Tensor> uniforms,
                                  std::optional<Tensor> seeds, std::optional<Tensor> positions) {
  const char* op = "pumice::sample";
  SamplingTensors tensors{logits, temperature, top_k, top_p, min_p};
  const DrawTensors draws{uniforms, seeds, positions};
  SamplingProblem problem = check_sampling(op, tensors, &draws);
  const DeviceGuard guard(logits);
  Tensor tokens = new_empty(logits, {problem.rows}, ScalarType::Long);
  Tensor logprobs = new_empty(logits, {problem.rows}, ScalarType::Float);
  if (problem.rows == 0) return {tokens, logprobs};
  set_pointers(tensors, problem);
  set_pointers(draws, problem.draws);
  SamplingOutput output;
  output.tokens = write_pointer<int64_t>(tokens);
  output.logprobs = write_pointer<float>(logprobs);
  sampling(op, problem, output, current_stream(logits));
  return {tokens, logprobs};
}

void run_verify(const char* op, const VerifyTensors& tensors, VerifyProblem& problem) {
  const Tensor& drafts = tensors.draft_tokens;
  PUMICE_CHECK(problem.drafts <= kMaxCudaDrafts, op, "CUDA takes up to ", kMaxCudaDrafts,
               " drafts of a sequence, not ", problem.drafts);
  if (problem.batch == 0) return;
  problem.draft_tokens = read_pointer<int64_t>(drafts);
  problem.num_drafts = pointer_or_null<int32_t>(tensors.num_drafts);
  problem.parents = pointer_or_null<int32_t>(tensors.parents);
  problem.draft_probs.data = pointer_or_null<float>(tensors.draft_probs);
  problem.target_probs.data = read_pointer<float>(tensors.target_probs);
  set_pointers(tensors.draws, problem.draws);
  speculative_verify(op, problem, current_stream(drafts));
}

std::tuple<Tensor, Tensor> verify(Tensor draft_tokens, std::optional<Tensor> num_drafts,
                                  std::optional<Tensor> draft_probs, Tensor target_probs,
                                  std::optional<Tensor> uniforms, std::optional<Tensor> seeds,
                                  std::optional<Tensor> positions) {
  const char* op = "pumice::speculative_verify";
  VerifyTensors tensors{draft_tokens, num_drafts,   std::nullopt,
                        draft_probs,  target_probs, {uniforms, seeds, positions}};
  VerifyProblem problem = check_verify(op, tensors);
  const DeviceGuard guard(draft_tokens);
  Tensor tokens = new_empty(draft_tokens, {problem.batch, problem.drafts + 1});
  Tensor num_accepted = new_empty(draft_tokens, {problem.batch}, ScalarType::Int);
  problem.tokens = write_pointer<int64_t>(tokens);
  problem.num_accepted = write_pointer<int32_t>(num_accepted);
  run_verify(op, tensors, problem);
  return {tokens, num_accepted};
}

std::tuple<Tensor, Tensor, Tensor> verify_tree(Tensor draft_tokens, Tensor parents,
                                               std::optional<Tensor> draft_probs,
                                               Tensor target_probs, std::optional<Tensor> uniforms,
                                               std::optional<Tensor> seeds,
                                               std::optional<Tensor> positions) {
  const char* op = "pumice::speculative_verify_tree";
  VerifyTensors tensors{draft_tokens, std::nullopt, parents,
                        draft_probs,  target_probs, {uniforms, seeds, positions}};
  VerifyProblem problem = check_verify(op, tensors);
  const DeviceGuard guard(draft_tokens);
  Tensor tokens = new_empty(draft_tokens, {problem.batch, problem.drafts + 1});
  Tensor path = new_empty(parents, {problem.batch, problem.drafts});
  Tensor num_accepted = new_empty(parents, {problem.batch});
  problem.tokens = write_pointer<int64_t>(tokens);
  problem.path = write_pointer<int32_t>(path);
  problem.num_accepted = write_pointer<int32_t>(num_accepted);
  run_verify(op, tensors, problem);
  return {tokens, path, num_accepted};
}

}  // namespace

PUMICE_CUDA_IMPL(m) {
  m.impl("sampling_probs", TORCH_BOX(&probabilities));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("speculative_verify", TORCH_BOX(&verify));
  m.impl("speculative_verify_tree", TORCH_BOX(&verify_tree));
}

}  // namespace pumice::cuda
