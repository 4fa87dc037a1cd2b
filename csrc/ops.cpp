// Every operator of pumice, with one line of maths: the table of contents of the library.
//
// Sizes: M tokens (all leading dimensions of x, flattened), K input features, N output features.
// Implementations: csrc/cpu/ops_*.cpp and csrc/cuda/*/ops_*.cu. Fakes and autograd:
// python/pumice/ops/.
#include "common/torch_api.h"

PUMICE_LIBRARY(m) {
  // q[m,k] = round(x[m,k]·smooth[k] / scale[m]),  scale[m] = max_k |x[m,k]·smooth[k]| / 127
  // (one scale for the tensor with per_tensor; the given one with scale). With a threshold, values
  // not below it are left out of the maximum and become q = 0, and outliers[k] says which columns
  // hold one. (No argument is keyword-only: register_autograd allows no such tensors.)
  m.def(
      "int8_quantize(Tensor x, bool per_tensor=False, float? threshold=None, Tensor? smooth=None,"
      " Tensor? scale=None) -> (Tensor q, Tensor scale, Tensor outliers)");

  // y[m,n] = (Σ_k q[m,k]·qweight[n,k]) · scale[m] · weight_scale[n] + bias[n]
  m.def(
      "int8_linear(Tensor q, Tensor scale, Tensor qweight, Tensor weight_scale, Tensor? bias, *,"
      " ScalarType out_dtype) -> Tensor");

  // LLM.int8(): y[m,n] = (s[m]·Σ_k q[m,k]·qweight[n,k] + Σ_{k∈O}
  // r[m,k]·qweight[n,k])·weight_scale[n]
  // + bias[n], with q, s as above, O the columns holding an outlier and r = x - s·q what int8 left
  // over there (in 16 bit); per_element keeps only the outlying elements in r, so that no row
  // depends on another.
  m.def(
      "int8_mixed_linear(Tensor x, Tensor qweight, Tensor weight_scale, Tensor? bias, *,"
      " float threshold=6.0, bool per_element=False) -> Tensor");

  // Packed weights of bits = 2, 3, 4 or 8 (csrc/common/intn_layout.h): q[n,k] as a bit stream.
  m.def("int4_pack(Tensor q, int bits=4) -> Tensor");
  m.def("int4_unpack(Tensor qweight, int k, int bits=4) -> Tensor");

  // W[n,k] = (q[n,k] - zeros[n,g]) · scales[n,g],  g = k / group_size or g_idx[k]; without zeros
  // 2^(bits-1)
  m.def(
      "int4_dequantize(Tensor qweight, Tensor scales, Tensor? zeros, Tensor? g_idx, int k,"
      " int group_size, int bits=4, *, ScalarType out_dtype) -> Tensor");

  // y[m,n] = Σ_k x[m,perm[k]]·W[n,k] + Σ_j x[m,outlier_idx[j]]·outlier_weight[n,j]
  //        + Σ_r (Σ_k x[m,k]·lora_a[r,k])·lora_b[n,r] + bias[n]
  m.def(
      "int4_linear(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? g_idx,"
      " Tensor? perm, Tensor? bias, Tensor? outlier_idx, Tensor? outlier_weight, Tensor? lora_a,"
      " Tensor? lora_b, *, int group_size, int bits=4, bool int8_activation=False) -> Tensor");

  // 2:4 weights, two kept of every four along K (csrc/common/sparse24_layout.h). W is [N, K], fp32,
  // fp16, bf16 or int8.  compress: the kept values and their places; gather: the values of any W at
  // given places; decompress: W, zero where nothing was kept.
  m.def("sparse24_compress(Tensor w) -> (Tensor values, Tensor meta)");
  m.def("sparse24_gather(Tensor w, Tensor meta) -> Tensor");
  m.def("sparse24_decompress(Tensor values, Tensor meta) -> Tensor");

  // y[m,n] = Σ_j x[m,c(n,j)]·values[n,j] + bias[n],  c(n,j) the column of kept value j < K/2
  m.def("sparse24_linear(Tensor x, Tensor values, Tensor meta, Tensor? bias) -> Tensor");

  // y[m,n] = (Σ_j q[m,c(n,j)]·values[n,j]) · scale[m] · weight_scale[n] + bias[n]
  m.def(
      "sparse24_int8_linear(Tensor q, Tensor scale, Tensor values, Tensor meta,"
      " Tensor weight_scale, Tensor? bias, *, ScalarType out_dtype) -> Tensor");

  // y[m,n] = Σ_j x[m,c(n,j)]·(q[n,j] - zeros[n,g])·scales[n,g] + bias[n],  g = c(n,j) / group_size;
  // qvalues: q [N, K/2] packed as by int4_pack
  m.def(
      "sparse24_int4_linear(Tensor x, Tensor qvalues, Tensor meta, Tensor scales, Tensor? zeros,"
      " Tensor? bias, *, int group_size, int bits=4) -> Tensor");

  // Sizes of attention: B sequences, S_q queries, S_k keys, heads H, KV heads H_kv, head dim D.
  // Tensors are [B, S, H, D], or [total, H, D] with cu_seqlens; masks: csrc/common/attention_mask.h
  //
  // out[i] = Σ_j exp(score[i,j] - lse[i]) · value[j],  lse[i] = ln(Σ_j exp(score[i,j]) + exp(sink))
  // over the visible j,  score[i,j] = softcap(softmax_scale · query[i]·key[j]) - slope · |p_i - j|
  m.def(
      "flash_attention(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q,"
      " Tensor? cu_seqlens_k, Tensor? sinks, Tensor? alibi_slopes, Tensor? global_index,"
      " Tensor? mask_bits, Tensor? mask_blocks, *, int max_seqlen_q=0, int max_seqlen_k=0,"
      " float softmax_scale, bool causal=False, int window_left=-1, int window_right=-1,"
      " int sink_tokens=0, int global_tokens=0, float softcap=0.0) -> (Tensor out, Tensor lse)");

  // Gradients of query, key and value; delta[i] = out[i]·grad_out[i] - grad_lse[i], from which
  // those of the sinks follow.
  m.def(
      "flash_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key,"
      " Tensor value, Tensor out, Tensor lse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
      " Tensor? sinks, Tensor? alibi_slopes, Tensor? global_index, Tensor? mask_bits,"
      " Tensor? mask_blocks, *, int max_seqlen_q=0, int max_seqlen_k=0, float softmax_scale,"
      " bool causal=False, int window_left=-1, int window_right=-1, int sink_tokens=0,"
      " int global_tokens=0, float softcap=0.0)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor delta)");

  // bits[…,i,w] bit b = mask[…,i,32w+b];  blocks: 0, 1, 2 where a 64 × 64 square shows none, some,
  // all
  m.def("attention_mask_pack(Tensor mask) -> (Tensor bits, Tensor blocks)");

  // out = Σ_p exp(lses[p] - lse) · outs[p],  lse = ln Σ_p exp(lses[p])
  m.def("merge_attention(Tensor outs, Tensor lses) -> (Tensor out, Tensor lse)");

  // Attention to keys and values in blocks of a pool (csrc/common/paged_cache.h): key j of sequence
  // b is k_scale · key_cache[block_table[b, j / block_size], j % block_size], j < seq_lens[b]. The
  // queries are a sequence's last tokens; tree_mask: which of each other they see, bit t of row i.
  m.def(
      "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table,"
      " Tensor seq_lens, Tensor? cu_seqlens_q, Tensor? sinks, Tensor? alibi_slopes,"
      " Tensor? tree_mask, Tensor? k_scale, Tensor? v_scale, *, int max_seqlen_q=0,"
      " float softmax_scale, bool causal=True, int window_left=-1, int window_right=-1,"
      " int sink_tokens=0, float softcap=0.0) -> (Tensor out, Tensor lse)");

  // cache[slot / block_size, slot % block_size] = round(rotated key[t] / k_scale), the same of
  // value without the rotation, slot = slot_mapping[t]; none where it is negative.
  m.def(
      "cache_append(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
      " Tensor slot_mapping, Tensor? k_scale, Tensor? v_scale, Tensor? cos, Tensor? sin,"
      " Tensor? positions, *, bool interleaved=False) -> ()");

  // cache[pairs[n, 1]] = cache[pairs[n, 0]] of both caches
  m.def("cache_copy_blocks(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor pairs) -> ()");

  // probs[r] = softmax(logits[r] / temperature) without what top_k, top_p and min_p remove, which
  // sums to 1 again; at temperature 0 all of it at the first maximum.
  m.def(
      "sampling_probs(Tensor logits, Tensor? temperature, Tensor? top_k, Tensor? top_p,"
      " Tensor? min_p) -> Tensor");

  // tokens[r] = the first at which the running sum of those probabilities passes u[r]; ln of its
  // own. u is given by uniforms or is Philox4x32-10 (csrc/common/philox.h) of seed and position.
  m.def(
      "sample(Tensor logits, Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p,"
      " Tensor? uniforms, Tensor? seeds, Tensor? positions) -> (Tensor tokens, Tensor logprobs)");

  // Of a chain of drafts x those before the first with u ≥ p(x) / q(x), then a token drawn from
  // norm(max(p - q, 0)) there, or from p after the last; then -1.
  m.def(
      "speculative_verify(Tensor draft_tokens, Tensor? num_drafts, Tensor? draft_probs,"
      " Tensor target_probs, Tensor? uniforms, Tensor? seeds, Tensor? positions)"
      " -> (Tensor tokens, Tensor num_accepted)");

  // The same of a tree: of a node's children the first accepted one is next, p becoming
  // norm(max(p - q, 0)) after each that is not.
  m.def(
      "speculative_verify_tree(Tensor draft_tokens, Tensor parents, Tensor? draft_probs,"
      " Tensor target_probs, Tensor? uniforms, Tensor? seeds, Tensor? positions)"
      " -> (Tensor tokens, Tensor path, Tensor num_accepted)");
}
