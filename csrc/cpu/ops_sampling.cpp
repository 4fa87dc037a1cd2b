// The sampling operators on the CPU: arguments, scratch and threads; the arithmetic is in
// sampling_*.cpp.
#include <tuple>

#include "common/sampling_args.h"
#include "cpu/dispatch.h"
#include "cpu/workspace.h"

namespace pumice::cpu {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

template <class T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

void set_pointers(const DrawTensors& tensors, DrawSource& draws) {
  draws.uniforms = data_of<float>(tensors.uniforms);
  draws.seeds = data_of<int64_t>(tensors.seeds);
  draws.positions = data_of<int64_t>(tensors.positions);
}

void set_pointers(const SamplingTensors& tensors, SamplingProblem& problem) {
  problem.logits = tensors.logits.const_data_ptr();
  problem.filters.temperature.data = data_of<float>(tensors.temperature);
  problem.filters.top_k.data = data_of<int32_t>(tensors.top_k);
  problem.filters.top_p.data = data_of<float>(tensors.top_p);
  problem.filters.min_p.data = data_of<float>(tensors.min_p);
}

// f(scratch, begin, end) on ranges of rows, in parallel.
template <class F>
void for_sampled_rows(const SamplingProblem& problem, const Tensor& like, const F& f) {
  const int64_t chunks = sampling_chunks(problem.vocab);
  const int64_t grain = std::max<int64_t>(1, kGrain / problem.vocab);
  parallel_for(0, problem.rows, grain, [&](int64_t begin, int64_t end) {
    Workspace workspace;
    const size_t maxima = workspace.reserve<float>(chunks);
    const size_t masses = workspace.reserve<Mass>(chunks);
    const size_t candidates = workspace.reserve<Candidate>(problem.vocab);
    workspace.allocate(like);
    f(SamplingScratch{workspace.at<float>(maxima), workspace.at<Mass>(masses),
                      workspace.at<Candidate>(candidates)},
      begin, end);
  });
}

Tensor probabilities(Tensor logits, std::optional<Tensor> temperature, std::optional<Tensor> top_k,
                     std::optional<Tensor> top_p, std::optional<Tensor> min_p) {
  const char* op = "pumice::sampling_probs";
  SamplingTensors tensors{logits, temperature, top_k, top_p, min_p};
  SamplingProblem problem = check_sampling(op, tensors, nullptr);
  Tensor probs = new_empty(logits, {problem.rows, problem.vocab}, ScalarType::Float);
  set_pointers(tensors, problem);
  auto* out = static_cast<float*>(probs.mutable_data_ptr());
  for_sampled_rows(problem, logits,
                   [&](const SamplingScratch& scratch, int64_t begin, int64_t end) {
                     sampling_kernels().probabilities(problem, scratch, out, begin, end);
                   });
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
  Tensor tokens = new_empty(logits, {problem.rows}, ScalarType::Long);
  Tensor logprobs = new_empty(logits, {problem.rows}, ScalarType::Float);
  set_pointers(tensors, problem);
  set_pointers(draws, problem.draws);
  auto* out = static_cast<int64_t*>(tokens.mutable_data_ptr());
  auto* out_logprobs = static_cast<float*>(logprobs.mutable_data_ptr());
  for_sampled_rows(problem, logits,
                   [&](const SamplingScratch& scratch, int64_t begin, int64_t end) {
                     sampling_kernels().sample(problem, scratch, out, out_logprobs, begin, end);
                   });
  return {tokens, logprobs};
}

void run_verify(const VerifyTensors& tensors, VerifyProblem& problem) {
  const Tensor& drafts = tensors.draft_tokens;
  problem.draft_tokens = static_cast<const int64_t*>(drafts.const_data_ptr());
  problem.num_drafts = data_of<int32_t>(tensors.num_drafts);
  problem.parents = data_of<int32_t>(tensors.parents);
  problem.draft_probs.data = data_of<float>(tensors.draft_probs);
  problem.target_probs.data = static_cast<const float*>(tensors.target_probs.const_data_ptr());
  set_pointers(tensors.draws, problem.draws);
  const int64_t grain = std::max<int64_t>(1, kGrain / problem.vocab);
  parallel_for(0, problem.batch, grain, [&](int64_t begin, int64_t end) {
    Workspace workspace;
    const size_t masses = workspace.reserve<Mass>(sampling_chunks(problem.vocab));
    const size_t rejected = workspace.reserve<int32_t>(problem.drafts);
    const size_t scales = workspace.reserve<float>(problem.drafts);
    workspace.allocate(drafts);
    verify_kernels().verify(
        problem,
        {workspace.at<Mass>(masses), workspace.at<int32_t>(rejected), workspace.at<float>(scales)},
        begin, end);
  });
}

std::tuple<Tensor, Tensor> verify(Tensor draft_tokens, std::optional<Tensor> num_drafts,
                                  std::optional<Tensor> draft_probs, Tensor target_probs,
                                  std::optional<Tensor> uniforms, std::optional<Tensor> seeds,
                                  std::optional<Tensor> positions) {
  VerifyTensors tensors{draft_tokens, num_drafts,   std::nullopt,
                        draft_probs,  target_probs, {uniforms, seeds, positions}};
  VerifyProblem problem = check_verify("pumice::speculative_verify", tensors);
  Tensor tokens = new_empty(draft_tokens, {problem.batch, problem.drafts + 1});
  Tensor num_accepted = new_empty(draft_tokens, {problem.batch}, ScalarType::Int);
  problem.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  problem.num_accepted = static_cast<int32_t*>(num_accepted.mutable_data_ptr());
  run_verify(tensors, problem);
  return {tokens, num_accepted};
}

std::tuple<Tensor, Tensor, Tensor> verify_tree(Tensor draft_tokens, Tensor parents,
                                               std::optional<Tensor> draft_probs,
                                               Tensor target_probs, std::optional<Tensor> uniforms,
                                               std::optional<Tensor> seeds,
                                               std::optional<Tensor> positions) {
  VerifyTensors tensors{draft_tokens, std::nullopt, parents,
                        draft_probs,  target_probs, {uniforms, seeds, positions}};
  VerifyProblem problem = check_verify("pumice::speculative_verify_tree", tensors);
  Tensor tokens = new_empty(draft_tokens, {problem.batch, problem.drafts + 1});
  Tensor path = new_empty(parents, {problem.batch, problem.drafts});
  Tensor num_accepted = new_empty(parents, {problem.batch});
  problem.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  problem.path = static_cast<int32_t*>(path.mutable_data_ptr());
  problem.num_accepted = static_cast<int32_t*>(num_accepted.mutable_data_ptr());
  run_verify(tensors, problem);
  return {tokens, path, num_accepted};
}

}  // namespace

PUMICE_CPU_IMPL(m) {
  m.impl("sampling_probs", TORCH_BOX(&probabilities));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("speculative_verify", TORCH_BOX(&verify));
  m.impl("speculative_verify_tree", TORCH_BOX(&verify_tree));
}

}  // namespace pumice::cpu
