// What flash_attention_backward asks of the CPU kernels: plain structs, and a table of functions
// for each instruction set. Every function is single-threaded and works on a part of the problem;
// the operator (ops_attention_backward.cpp) spreads the parts over threads. No torch here.
//
// With P[i,j] = exp(score[i,j] - lse[i]), 0 where j is hidden from i, and f' the slope of the score
// along q·k (softmax_scale, less under softcap):
//
//     delta[i] = out[i]·grad_out[i] - grad_lse[i]
//     dS[i,j]  = P[i,j] · (grad_out[i]·value[j] - delta[i]) · f'
//     grad_value[j] = Σ_i P[i,j]·grad_out[i]     grad_key[j] = Σ_i dS[i,j]·query[i]
//     grad_query[i] = Σ_j dS[i,j]·key[j]
//
// after FlashAttention-2 (Dao, 2023): P is computed again from lse, block by block, never stored.
#pragma once

#include "common/attention_problem.h"

namespace pumice::cpu {

// Sides of a block of the score matrix. What a worker keeps of query, key and value, of their
// gradients and transposes, is some 8 · 64 · D floats: 256 KB where D = 128, within L2.
constexpr int32_t kGradQueries = 64;
constexpr int32_t kGradKeys = 64;

struct AttentionBackwardJob {
  AttentionProblem problem;
  TokenView out, grad_out;
  const float* lse;       // [B, H, S_q], or [H, total] where packed
  const float* grad_lse;  // the same, or null
  float* delta;           // the same
  void* grad_query;       // contiguous, in the dtype of the problem
  void* grad_key;
  void* grad_value;
};

// A rectangle of the score matrices of some heads of one KV head, and the gradients wanted of it:
// of keys and values where it spans all queries of the sequence and all heads of the KV head, of
// queries where it spans all keys.
struct AttentionRegion {
  int64_t batch;
  int64_t head_begin, head_end;
  int32_t query_begin, query_end;  // in blocks
  int32_t key_begin, key_end;
  bool of_keys, of_queries;
};

struct AttentionBackwardKernels {
  // delta of the queries of one head.
  void (*delta)(const AttentionBackwardJob& job, int64_t batch, int64_t head);
  // The floats of scratch that gradients() takes for a region of_queries of so many heads times
  // queries, counted in whole blocks.
  int64_t (*scratch_size)(const AttentionProblem& problem, int64_t query_rows);
  // The gradients of a region. Each sum runs over the blocks in one order however the problem is
  // cut into regions, so that its bits do not depend on the cut.
  void (*gradients)(const AttentionBackwardJob& job, const AttentionRegion& region, float* scratch);
};

// Each instruction set's table, defined in attention_backward.cpp.
#define PUMICE_DECLARE_ATTENTION_BACKWARD(isa)                      \
  namespace isa {                                                   \
  extern const AttentionBackwardKernels attention_backward_kernels; \
  }
PUMICE_DECLARE_ATTENTION_BACKWARD(portable)
PUMICE_DECLARE_ATTENTION_BACKWARD(avx2)
PUMICE_DECLARE_ATTENTION_BACKWARD(avx512vnni)
#undef PUMICE_DECLARE_ATTENTION_BACKWARD

}  // namespace pumice::cpu
