// kernel: attention_backward
//
// The gradients of one region (attention_backward.h): for each block of keys the blocks of queries
// that see one of them, head by head.
//
// The block of keys is converted and transposed once; each block of queries that passes is
// multiplied five times while both lie in L2: scores and grad_out·value (right operand transposed),
// then P and dS, read along either side, times query, key and grad_out.
#include "cpu/attention_backward.h"

#include <algorithm>
#include <limits>

#include "cpu/attention_backward_row.h"
#include "cpu/attention_block.h"
#include "cpu/attention_visible.h"
#include "cpu/element.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Blocks of floats, laid out one after the other in the worker's scratch; without memory they are
// only counted.
class Scratch {
 public:
  explicit Scratch(float* memory) : memory_(memory) {}
  BlockRows<float> block(int64_t rows, int64_t columns) {
    const BlockRows<float> found{memory_ ? memory_ + size_ : nullptr, padded_columns(columns)};
    size_ += rows * found.stride;
    return found;
  }
  int64_t size() const { return size_; }

 private:
  float* memory_;
  int64_t size_ = 0;
};

struct Buffers {
  BlockRows<float> key, key_transposed, value_transposed;  // of the present block of keys
  BlockRows<float> grad_key, grad_value;
  BlockRows<float> query, grad_out;  // of the present block of queries
  BlockRows<float> lse, delta;
  BlockRows<float> p, ds;  // S, then P; grad_out·value, then dS
  BlockRows<float> transposition;
  BlockRows<float> grad_query;  // of every query of the region, head by head
  int64_t size;

  Buffers(const AttentionProblem& problem, int64_t grad_query_rows, float* memory) {
    const int64_t d = problem.head_dim, dv = problem.value_dim;
    Scratch scratch(memory);
    key = scratch.block(kGradKeys, d);
    key_transposed = scratch.block(d, kGradKeys);
    value_transposed = scratch.block(dv, kGradKeys);
    grad_key = scratch.block(kGradKeys, d);
    grad_value = scratch.block(kGradKeys, dv);
    query = scratch.block(kGradQueries, d);
    grad_out = scratch.block(kGradQueries, dv);
    lse = scratch.block(1, kGradQueries);
    delta = scratch.block(1, kGradQueries);
    p = scratch.block(kGradQueries, kGradKeys);
    ds = scratch.block(kGradQueries, kGradKeys);
    transposition = scratch.block(kBlockPad, std::max(d, dv));
    grad_query = scratch.block(grad_query_rows, d);
    size = scratch.size();
  }
};

BlockRows<const float> read(BlockRows<float> block) { return {block.data, block.stride}; }

void clear(BlockRows<float> block, int64_t rows) {
  std::fill_n(block.data, rows * block.stride, 0.0f);
}

// Rows of floats to consecutive tokens of one head of a contiguous gradient.
void store_rows(BlockRows<float> block, int64_t rows, int64_t columns, DType dtype, int64_t token,
                int64_t heads, int64_t head, void* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = ((token + i) * heads + head) * columns;
    const float* row = block.row(i);
    for (int64_t d = 0; d < columns; ++d) store_element(out, dtype, at + d, row[d]);
  }
}

float alibi_slope(const ScoreRule& score, int64_t batch, int64_t head) {
  return score.alibi_slopes ? score.alibi_slopes[batch * score.alibi_batch_stride + head] : 0.0f;
}

// Σ_d a[d]·b[d]
float dot(const float* a, const float* b, int64_t count) {
  Vec partial = zero();
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) partial = fma(load(a + d), load(b + d), partial);
  float total = sum(partial);
  for (; d < count; ++d) total += a[d] * b[d];
  return total;
}

// One region under way.
class RegionPass {
 public:
  RegionPass(const AttentionBackwardJob& job, const AttentionRegion& region, float* scratch)
      : job_(job),
        problem_(job.problem),
        region_(region),
        sequence_(sequence_of(job.problem, region.batch)),
        kv_head_(region.head_begin / job.problem.group()),
        query_begin_(region.query_begin * kGradQueries),
        query_end_(smaller(region.query_end * kGradQueries, sequence_.q_len)),
        rows_(region.of_queries ? larger(query_end_ - query_begin_, 0) : 0),
        buffers_(job.problem, heads() * rows_, scratch) {}

  void run() {
    clear(buffers_.grad_query, heads() * rows_);
    for (int32_t n = region_.key_begin; n < region_.key_end; ++n) key_block(n);
    for (int64_t head = region_.head_begin; region_.of_queries && head < region_.head_end; ++head) {
      store_rows(grad_query(head, query_begin_), rows_, problem_.head_dim, problem_.dtype,
                 sequence_.query_row + query_begin_, problem_.heads, head, job_.grad_query);
    }
  }

 private:
  int64_t heads() const { return region_.head_end - region_.head_begin; }

  BlockRows<float> grad_query(int64_t head, int32_t query) const {
    const int64_t row = (head - region_.head_begin) * rows_ + query - query_begin_;
    return {buffers_.grad_query.row(row), buffers_.grad_query.stride};
  }

  void key_block(int32_t n) {
    n0_ = n * kGradKeys;
    n1_ = smaller(n0_ + kGradKeys, sequence_.k_len);
    if (region_.of_keys) {
      clear(buffers_.grad_key, n1_ - n0_);
      clear(buffers_.grad_value, n1_ - n0_);
    }
    bool loaded = false;
    for (int64_t head = region_.head_begin; head < region_.head_end; ++head) {
      const MaskView mask =
          mask_view(problem_.mask, region_.batch, head, sequence_.q_len, sequence_.k_len);
      const BlockWalk walk = mask.queries_of(n0_, n1_, kGradQueries);
      const int32_t end = smaller(walk.block_end(), region_.query_end);
      for (int32_t m = mask.next_queries(walk, n0_, n1_, region_.query_begin); m < end;
           m = mask.next_queries(walk, n0_, n1_, m + 1)) {
        if (!loaded) load_keys();
        loaded = true;
        block(mask, head, m);
      }
    }
    if (region_.of_keys) {
      const int64_t token = sequence_.key_row + n0_;
      store_rows(buffers_.grad_key, n1_ - n0_, problem_.head_dim, problem_.dtype, token,
                 problem_.kv_heads, kv_head_, job_.grad_key);
      store_rows(buffers_.grad_value, n1_ - n0_, problem_.value_dim, problem_.dtype, token,
                 problem_.kv_heads, kv_head_, job_.grad_value);
    }
  }

  // Where token `i` of the sequence begins in a view whose first token of all is `row`.
  int64_t element(const TokenView& view, int64_t row, int64_t head, int64_t i) const {
    return first_element(view, problem_.packed(), region_.batch, row, head) + i * view.token_stride;
  }

  void load_keys() {
    const int64_t d = problem_.head_dim, dv = problem_.value_dim, rows = n1_ - n0_;
    const TokenView &key = problem_.key, &value = problem_.value;
    const int64_t first_key = element(key, sequence_.key_row, kv_head_, n0_);
    const int64_t first_value = element(value, sequence_.key_row, kv_head_, n0_);
    load_block(key.data, problem_.dtype, first_key, key.token_stride, rows, d, buffers_.key);
    load_transposed(key.data, problem_.dtype, first_key, key.token_stride, rows, d,
                    buffers_.transposition.data, buffers_.key_transposed);
    load_transposed(value.data, problem_.dtype, first_value, value.token_stride, rows, dv,
                    buffers_.transposition.data, buffers_.value_transposed);
  }

  // Rows [m0, m1) of query, grad_out, lse and delta. A query that sees nothing (lse = -inf) gets
  // lse = inf, so that its P is 0, and zeros: its grad_out may be anything.
  void load_queries(int64_t head, int32_t m0, int32_t m1) {
    const TokenView &query = problem_.query, &grad_out = job_.grad_out;
    load_block(query.data, problem_.dtype, element(query, sequence_.query_row, head, m0),
               query.token_stride, m1 - m0, problem_.head_dim, buffers_.query);
    load_block(grad_out.data, problem_.dtype, element(grad_out, sequence_.query_row, head, m0),
               grad_out.token_stride, m1 - m0, problem_.value_dim, buffers_.grad_out);
    const int64_t row = lse_row(problem_, sequence_, region_.batch, head) + m0;
    for (int32_t i = 0; i < m1 - m0; ++i) {
      const bool blind = job_.lse[row + i] == -kInfinity;
      buffers_.lse.data[i] = blind ? kInfinity : job_.lse[row + i];
      buffers_.delta.data[i] = blind ? 0.0f : job_.delta[row + i];
      if (blind) {
        std::fill_n(buffers_.query.row(i), buffers_.query.stride, 0.0f);
        std::fill_n(buffers_.grad_out.row(i), buffers_.grad_out.stride, 0.0f);
      }
    }
  }

  void block(const MaskView& mask, int64_t head, int32_t m) {
    const int32_t m0 = m * kGradQueries, m1 = smaller(m0 + kGradQueries, sequence_.q_len);
    const int64_t queries = m1 - m0, keys = n1_ - n0_;
    const int64_t d = problem_.head_dim, dv = problem_.value_dim;
    const Buffers& b = buffers_;
    load_queries(head, m0, m1);
    multiply_block<false>({b.query.data, b.query.stride}, read(b.key_transposed), b.p, queries,
                          padded_columns(keys), d);
    multiply_block<false>({b.grad_out.data, b.grad_out.stride}, read(b.value_transposed), b.ds,
                          queries, padded_columns(keys), dv);
    differentiate(mask, head, m0, m1);
    if (region_.of_keys) {
      multiply_block<true>({b.p.data, 1, b.p.stride}, read(b.grad_out), b.grad_value, keys,
                           b.grad_out.stride, queries);
      multiply_block<true>({b.ds.data, 1, b.ds.stride}, read(b.query), b.grad_key, keys,
                           b.query.stride, queries);
    }
    if (region_.of_queries) {
      multiply_block<true>({b.ds.data, b.ds.stride}, read(b.key), grad_query(head, m0), queries,
                           b.key.stride, keys);
    }
  }

  void differentiate(const MaskView& mask, int64_t head, int32_t m0, int32_t m1) {
    const ScoreRule& rule = problem_.score;
    const float slope = alibi_slope(rule, region_.batch, head);
    const bool softcap = rule.softcap > 0.0f, alibi = rule.alibi_slopes != nullptr;
    const auto row_kernel =
        softcap ? (alibi ? differentiate_row<true, true> : differentiate_row<true, false>)
                : (alibi ? differentiate_row<false, true> : differentiate_row<false, false>);
    const bool all = mask.sees_all(m0, m1, n0_, n1_);
    const uint64_t every_key = bit_range(0, n1_ - n0_);
    for (int32_t i = 0; i < m1 - m0; ++i) {
      const GradRow row{all ? every_key : visible_keys(mask, m0 + i, n0_),
                        mask.position(m0 + i) - n0_, buffers_.lse.data[i], buffers_.delta.data[i]};
      row_kernel(rule, slope, row, padded_columns(n1_ - n0_), buffers_.p.row(i),
                 buffers_.ds.row(i));
    }
  }

  const AttentionBackwardJob& job_;
  const AttentionProblem& problem_;
  const AttentionRegion& region_;
  const SequenceRange sequence_;
  const int64_t kv_head_;
  const int32_t query_begin_, query_end_;
  const int64_t rows_;  // of grad_query, for each head
  const Buffers buffers_;
  int32_t n0_ = 0, n1_ = 0;  // the present block of keys
};

void gradients(const AttentionBackwardJob& job, const AttentionRegion& region, float* scratch) {
  RegionPass(job, region, scratch).run();
}

int64_t scratch_size(const AttentionProblem& problem, int64_t query_rows) {
  return Buffers(problem, query_rows, nullptr).size;
}

void delta(const AttentionBackwardJob& job, int64_t batch, int64_t head) {
  constexpr int64_t kChunk = 256;
  float out[kChunk], grad_out[kChunk];
  const AttentionProblem& problem = job.problem;
  const SequenceRange sequence = sequence_of(problem, batch);
  const int64_t row = lse_row(problem, sequence, batch, head);
  const auto first = [&](const TokenView& view) {
    return first_element(view, problem.packed(), batch, sequence.query_row, head);
  };
  const int64_t first_out = first(job.out), first_grad = first(job.grad_out);
  for (int64_t i = 0; i < sequence.q_len; ++i) {
    float product = 0.0f;
    for (int64_t d = 0; d < problem.value_dim; d += kChunk) {
      const int64_t count = std::min(kChunk, problem.value_dim - d);
      load_elements(job.out.data, problem.dtype, first_out + i * job.out.token_stride + d, count,
                    out);
      load_elements(job.grad_out.data, problem.dtype,
                    first_grad + i * job.grad_out.token_stride + d, count, grad_out);
      product += dot(out, grad_out, count);
    }
    job.delta[row + i] = product - (job.grad_lse ? job.grad_lse[row + i] : 0.0f);
  }
}

}  // namespace

const AttentionBackwardKernels attention_backward_kernels = {delta, scratch_size, gradients};

}  // namespace pumice::cpu::PUMICE_ISA
