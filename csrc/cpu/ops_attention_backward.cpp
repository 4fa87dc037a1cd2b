// flash_attention_backward on the CPU: arguments, and how the work is cut into tasks for the
// threads; the arithmetic is in attention_backward.cpp.
#include <algorithm>
#include <atomic>

#include "cpu/attention_operands.h"
#include "cpu/dispatch.h"
#include "cpu/workspace.h"

namespace pumice::cpu {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;

constexpr const char* kOp = "flash_attention_backward";

// Every block of keys that such a task passes is converted and transposed for it: for so many
// blocks of queries it does not count.
constexpr int32_t kQueryBlocksOfTask = 4;

struct Sequences {
  std::vector<SequenceRange> ranges;
  int64_t scores = 0, longest = 0;  // q_len · k_len of all, and of the largest

  explicit Sequences(const AttentionProblem& problem) {
    for (int64_t b = 0; b < problem.batch; ++b) {
      ranges.push_back(sequence_of(problem, b));
      const int64_t size = int64_t{ranges[b].q_len} * ranges[b].k_len;
      scores += size;
      longest = std::max(longest, size);
    }
  }
};

int32_t query_blocks(const SequenceRange& sequence) {
  return static_cast<int32_t>(ceil_div(sequence.q_len, kGradQueries));
}

int32_t key_blocks(const SequenceRange& sequence) {
  return static_cast<int32_t>(ceil_div(sequence.k_len, kGradKeys));
}

// One pass over a sequence and KV head for all gradients takes five products for each block of
// scores; a pass for the keys' and one for the queries' take four and three, but split finely.
// Which is sooner done? (Both give the same bits.)
bool whole_heads(const AttentionProblem& problem, const Sequences& sequences, int64_t threads) {
  const int64_t total = sequences.scores * problem.kv_heads;
  if (total == 0) return true;
  const int64_t rounds = ceil_div(total, threads * sequences.longest);
  return 5 * rounds * sequences.longest * threads <= 7 * total;
}

std::vector<AttentionRegion> regions_of(const AttentionProblem& problem, const Sequences& sequences,
                                        int64_t threads) {
  std::vector<AttentionRegion> regions;
  const bool whole = whole_heads(problem, sequences, threads);
  const int64_t group = problem.group();
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int32_t m = query_blocks(sequences.ranges[b]), n = key_blocks(sequences.ranges[b]);
    for (int64_t head = 0; head < problem.heads; head += group) {
      if (whole) {
        regions.push_back({b, head, head + group, 0, m, 0, n, true, true});
        continue;
      }
      for (int32_t i = 0; i < n; ++i) {
        regions.push_back({b, head, head + group, 0, m, i, i + 1, true, false});
      }
      // The last queries first: with a causal mask they see most.
      for (int64_t h = head; h < head + group; ++h) {
        for (int32_t i = m; i > 0; i -= kQueryBlocksOfTask) {
          const int32_t begin = std::max(i - kQueryBlocksOfTask, 0);
          regions.push_back({b, h, h + 1, begin, i, 0, n, false, true});
        }
      }
    }
  }
  return regions;
}

// The floats that the largest of the regions takes.
int64_t scratch_size(const AttentionProblem& problem, const std::vector<AttentionRegion>& regions) {
  int64_t rows = 0;
  for (const AttentionRegion& region : regions) {
    if (!region.of_queries) continue;
    rows = std::max(rows, (region.head_end - region.head_begin) *
                              (region.query_end - region.query_begin) * kGradQueries);
  }
  return attention_backward_kernels().scratch_size(problem, rows);
}

void fill_delta(const AttentionBackwardJob& job) {
  const AttentionProblem& problem = job.problem;
  const int64_t elements = std::max<int64_t>(1, problem.max_q * problem.value_dim);
  for_rows(problem.batch * problem.heads, elements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      attention_backward_kernels().delta(job, i / problem.heads, i % problem.heads);
    }
  });
}

void fill_gradients(const AttentionBackwardJob& job, const Tensor& like) {
  const AttentionProblem& problem = job.problem;
  const int64_t available = torch::stable::get_num_threads();
  const Sequences sequences(problem);
  const std::vector<AttentionRegion> regions = regions_of(problem, sequences, available);
  const int64_t count = static_cast<int64_t>(regions.size());
  if (count == 0) return;
  const int64_t work = sequences.scores * problem.heads * (problem.head_dim + problem.value_dim);
  const int64_t threads = std::clamp<int64_t>(work / (64 * kGrain), 1, std::min(available, count));
  const int64_t size = scratch_size(problem, regions);
  Workspace workspace;
  const size_t scratch = workspace.reserve<float>(threads * size);
  workspace.allocate(like);
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    float* const own = workspace.at<float>(scratch) + begin * size;
    for (int64_t i = next++; i < count; i = next++) {
      attention_backward_kernels().gradients(job, regions[i], own);
    }
  });
}

void check_rows(const char* name, const Tensor& rows, const Tensor& query, bool packed,
                const AttentionProblem& problem) {
  check_float32(kOp, name, rows);
  const bool shaped =
      packed ? rows.dim() == 2 && rows.size(0) == problem.heads && rows.size(1) == problem.total_q
             : rows.dim() == 3 && rows.size(0) == problem.batch && rows.size(1) == problem.heads &&
                   rows.size(2) == problem.max_q;
  PUMICE_CHECK(
      shaped && same_device(rows, query), kOp, name,
      " must have shape [B, H, S_q], or [H, total] with cu_seqlens, on the device of query");
}

void check_like_out(const char* name, const Tensor& x, const Tensor& query,
                    const AttentionProblem& problem) {
  bool shaped = x.dim() == query.dim() && x.size(-1) == problem.value_dim;
  for (int64_t i = 0; shaped && i + 1 < x.dim(); ++i) shaped = x.size(i) == query.size(i);
  PUMICE_CHECK(shaped && x.scalar_type() == query.scalar_type() && same_device(x, query), kOp, name,
               " must have the shape of query but for the last dimension, that of value, and the "
               "dtype and device of query");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_backward(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value,
    Tensor out, Tensor lse, std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
    std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes,
    std::optional<Tensor> global_index, std::optional<Tensor> mask_bits,
    std::optional<Tensor> mask_blocks, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double softmax_scale, bool causal, int64_t window_left, int64_t window_right,
    int64_t sink_tokens, int64_t global_tokens, double softcap) {
  AttentionTensors tensors{query, key,          value,        cu_seqlens_q, cu_seqlens_k,
                           sinks, alibi_slopes, global_index, mask_bits,    mask_blocks};
  AttentionBackwardJob job{};
  job.problem = attention_problem(kOp, tensors,
                                  {max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left,
                                   window_right, sink_tokens, global_tokens, softcap});
  const AttentionProblem& problem = job.problem;
  const bool packed = problem.packed();
  check_like_out("out", out, query, problem);
  check_like_out("grad_out", grad_out, query, problem);
  check_rows("lse", lse, query, packed, problem);
  if (grad_lse) check_rows("grad_lse", *grad_lse, query, packed, problem);
  out = with_unit_stride(out);
  grad_out = with_unit_stride(grad_out);
  lse = torch::stable::contiguous(lse);
  if (grad_lse) grad_lse = torch::stable::contiguous(*grad_lse);

  // Packed tokens may lie outside of every sequence.
  const auto empty = [&](const Tensor& like) {
    return packed ? new_zeros(like, like.sizes()) : new_empty(like, like.sizes());
  };
  Tensor grad_query = empty(query), grad_key = empty(key), grad_value = empty(value);
  Tensor delta = empty(lse);
  job.out = token_view(out);
  job.out.data = out.const_data_ptr();
  job.grad_out = token_view(grad_out);
  job.grad_out.data = grad_out.const_data_ptr();
  job.lse = lse.const_data_ptr<float>();
  job.grad_lse = grad_lse ? grad_lse->const_data_ptr<float>() : nullptr;
  job.delta = delta.mutable_data_ptr<float>();
  job.grad_query = grad_query.mutable_data_ptr();
  job.grad_key = grad_key.mutable_data_ptr();
  job.grad_value = grad_value.mutable_data_ptr();
  fill_delta(job);
  fill_gradients(job, query);
  return {grad_query, grad_key, grad_value, delta};
}

}  // namespace

PUMICE_CPU_IMPL(m) { m.impl("flash_attention_backward", TORCH_BOX(&flash_attention_backward)); }

}  // namespace pumice::cpu
