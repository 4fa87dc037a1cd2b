// The forward pass of attention on the CPU, over dense, packed or paged keys.
#pragma once

#include "common/attention_problem.h"
#include "common/paged_cache.h"
#include "common/torch_api.h"

namespace pumice::cpu {

// Fills out and lse, contiguous. cache: where key and value lie; null: in the problem's own views.
void attention_forward(const AttentionProblem& problem, const PagedCache* cache, Tensor& out,
                       Tensor& lse);

}  // namespace pumice::cpu
