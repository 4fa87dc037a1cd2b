// What flash_attention, merge_attention and attention_mask_pack ask of the CPU kernels: plain
// structs, and a table of functions for each instruction set. Every function is single-threaded and
// works on one task or range; the operators (ops_attention.cpp) spread them over threads. No torch
// here.
#pragma once

#include "common/attention_problem.h"
#include "common/paged_cache.h"

namespace pumice::cpu {

// Rows of a task, a row being a query of one head: each task reads the keys anew. The blocks of q,
// k, v, the scores and the sums take 330 KB where D = 128, within L2. A multiple of the rows of
// every register tile.
constexpr int32_t kTaskRows = 192;

// Part of the scores: queries [m0, m1) of heads [head, head + heads), which share a mask, against
// keys [n0, n1), n0 a multiple of 64. The heads are some of one KV head, or all of several.
struct AttentionTask {
  int64_t batch, head;
  int32_t heads, q_len, k_len, m0, m1, n0, n1;
  int64_t query_row;          // of the sequence's first query among those of all
  int64_t query, key, value;  // element offsets of the first token of the sequence
  const PagedCache* cache;    // where key and value lie, or null: in views of the problem
  const float* packed;        // or once more, block after block, as pack() left them; may be null
  // Of the sequence: out[i, h, D_v], contiguous, and lse[h · lse_head_stride + i].
  void* out;
  DType out_dtype;
  float* lse;
  int64_t lse_head_stride;
  const float* sinks;  // null where the keys are only some of the sequence's
};

// lse = ln(Σ_p exp(lses[p]) + exp(sink)),  out = Σ_p exp(lses[p] - lse) · outs[p], laid out as
// those of a task; parts follow each other at the part strides.
struct AttentionMerge {
  int64_t parts, heads, dim;
  const void* outs;
  DType outs_dtype;
  int64_t outs_part_stride;
  const float* lses;
  int64_t lses_part_stride, lses_head_stride;
  const float* sinks;  // or null
  void* out;
  DType out_dtype;
  float* lse;
  int64_t lse_head_stride;
};

struct AttentionMaskPack {
  const uint8_t* mask;  // [matrices, q_len, k_len] bools
  int64_t q_len, k_len;
  uint32_t* bits;   // [matrices, q_len, ceil(k_len / 32)]
  uint8_t* blocks;  // [matrices, ceil(q_len / 64), ceil(k_len / 64)]
};

struct AttentionForwardKernels {
  // The floats of scratch that run() and pack() take, and of a packed block.
  int64_t (*scratch_size)(const AttentionProblem& problem);
  int64_t (*packed_size)(const AttentionProblem& problem);
  // The 64 keys and values from n0 on, or as many as there are, as run() multiplies by them.
  void (*pack)(const AttentionProblem& problem, const AttentionTask& task, float* scratch,
               float* packed);
  void (*run)(const AttentionProblem& problem, const AttentionTask& task, float* scratch);
};

struct AttentionMergeKernels {
  // Rows [begin, end) of a sequence, row i·heads + h being query i of head h.
  void (*merge)(const AttentionMerge& job, int64_t begin, int64_t end);
  // Bands [begin, end) of kMaskBlock queries, ceil(q_len / 64) to a matrix.
  void (*pack_mask)(const AttentionMaskPack& job, int64_t begin, int64_t end);
};

#define PUMICE_DECLARE_ATTENTION_FORWARD(isa)                     \
  namespace isa {                                                 \
  extern const AttentionForwardKernels attention_forward_kernels; \
  extern const AttentionMergeKernels attention_merge_kernels;     \
  }
PUMICE_DECLARE_ATTENTION_FORWARD(portable)
PUMICE_DECLARE_ATTENTION_FORWARD(avx2)
PUMICE_DECLARE_ATTENTION_FORWARD(avx512vnni)
namespace avx512bf16 {
extern const AttentionForwardKernels attention_forward_kernels;
}
#undef PUMICE_DECLARE_ATTENTION_FORWARD

}  // namespace pumice::cpu
