"""From logits to tokens: filtered distributions, sampling, and verification of drafted tokens.

**Numbers.** ``u`` in [0, 1) is given by ``uniforms``, or drawn by Philox4x32-10 (Salmon et al.,
2011) of ``seeds`` (the key) and ``positions``: number i of a row is the first word, in units of
2^-32, of the counter (position, i, purpose), position being 64 bits and the purpose 0 for
:func:`sample` and 1 for verification: drafts sampled with the seeds that verify them are
independent of that all the same. The numbers of a row depend on nothing but its own seed and
position. Without either they come from ``torch.rand``.

**Every device agrees.** Weights exp((x - max x) / temperature) are computed in fp32 by operations
that round alike everywhere and added up as integers in units of 2^-40, exactly. Tokens are
therefore the same on every device and for every grouping of rows; probabilities have the same bits;
log-probabilities agree within an ulp. Against real numbers weights have a relative error of 2^-22,
and a token of less than 2^-41 of the most probable one's probability is never drawn.

**Input that is not finite.** A logit that is NaN counts as -∞ and is never drawn; several of +∞
share everything. A row with nothing else than NaN and -∞ has no distribution: its probabilities and
log-probability are NaN, its token is 0. In verification a probability that is NaN or negative
counts as 0 and one above 1 as 1; from a row of zeros token 0 is drawn; a draft that is no token of
the vocabulary is rejected. Nothing is ever a token out of range.

The kernels look at values where they lie, so that on CUDA nothing waits for the GPU and each
function is one launch (beside what turns a Python number into a tensor, or makes one contiguous).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pumice.ops import _library
from pumice.ops import _sampling_fakes as _sampling_fakes
from pumice.ops._checks import check_vector
from pumice.ops._sampling_checks import (
    check_distributions,
    check_drafts,
    check_draws,
    check_float_parameter,
    check_logits,
    check_parents,
    check_top_k,
)

Filters = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _check_filters(
    op: str,
    logits: Tensor,
    temperature: Tensor | float | None,
    top_k: Tensor | int | None,
    top_p: Tensor | float | None,
    min_p: Tensor | float | None,
) -> Filters:
    check_logits(op, logits)
    return (
        check_float_parameter(op, "temperature", temperature, 1.0, math.inf, logits),
        check_top_k(op, top_k, logits),
        check_float_parameter(op, "top_p", top_p, 1.0, 1.0, logits),
        check_float_parameter(op, "min_p", min_p, 0.0, 1.0, logits),
    )


def sampling_probs(
    logits: Tensor,
    *,
    temperature: Tensor | float | None = None,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    min_p: Tensor | float | None = None,
) -> Tensor:
    """The distributions that tokens are drawn from.

    ``probs[r] = softmax(logits[r] / temperature)`` over the tokens that the filters leave, 0
    elsewhere. Tokens are ranked by logit, of equal ones the first before the others.

    1. ``top_k``: the k first of that ranking.
    2. ``top_p`` (Holtzman et al., 2020, "The Curious Case of Neural Text Degeneration"): of those,
       renormalised, the shortest leading part whose probabilities reach ``top_p``; at least one.
    3. ``min_p`` (Nguyen et al., 2024, "Turning Up the Heat"): of those the tokens with at least
       ``min_p`` times the probability of the most probable one.

    This is transformers' order; vLLM applies ``min_p`` before the others, which differs where
    ``top_p`` is given too, for it is then a part of less.

    Args:
        logits: [R, V], float32, float16 or bfloat16, any strides; R ≥ 0, 1 ≤ V ≤ 2^23.
        temperature: a float or float32 [R] (or [1]). None: 1. 0 is greedy: probability 1 for the
            first largest logit. In a tensor, negative numbers and NaN are greedy too.
        top_k: an int or int32 [R] (or [1]). None, 0 and V or more (in a tensor negative numbers
            too): all.
        top_p: a float or float32 [R] (or [1]). None and 1 (in a tensor more than 1 and NaN too):
            all. It is rounded down to a multiple of 2^-32.
        min_p: a float or float32 [R] (or [1]). None and 0 (in a tensor negative numbers and NaN
            too): all.

    Returns:
        probs: float32 [R, V].

    Raises:
        ValueError: for shapes, devices and Python numbers out of range.
        TypeError: for other dtypes.
    """
    filters = _check_filters("sampling_probs", logits, temperature, top_k, top_p, min_p)
    probs: Tensor = _library.ops.sampling_probs(logits, *filters)
    return probs


def sample(
    logits: Tensor,
    *,
    temperature: Tensor | float | None = None,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    min_p: Tensor | float | None = None,
    uniforms: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token from each row's distribution (:func:`sampling_probs`).

    ``tokens[r]`` is the first token at which the running sum of the probabilities, in the order of
    the vocabulary, passes ``u[r]`` times their sum.

    Args:
        logits, temperature, top_k, top_p, min_p: as for :func:`sampling_probs`.
        uniforms: float32 [R], in [0, 1).
        seeds, positions: int64 [R] each, instead of uniforms.

    Returns:
        tokens: int64 [R].
        logprobs: float32 [R], ln of the probability that the token had; 0 where greedy.

    Raises:
        ValueError: for shapes, devices and Python numbers out of range.
        TypeError: for other dtypes.
    """
    op = "sample"
    filters = _check_filters(op, logits, temperature, top_k, top_p, min_p)
    draws = check_draws(op, uniforms, seeds, positions, (logits.shape[0],), logits)
    tokens, logprobs = _library.ops.sample(logits, *filters, *draws)
    return tokens, logprobs


def speculative_verify(
    draft_tokens: Tensor,
    target_probs: Tensor,
    *,
    num_drafts: Tensor | None = None,
    draft_probs: Tensor | None = None,
    uniforms: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Accept drafted tokens so that what comes out is distributed as by the target alone.

    Draft i, x drawn from q, is accepted while ``u[i] < p(x) / q(x)`` with p the target's
    distribution after the drafts before it. The first rejected one is replaced by a token drawn
    from ``norm(max(p - q, 0))``; where all are accepted one more is drawn from the target's last
    distribution (Leviathan et al., 2023, "Fast Inference from Transformers via Speculative
    Decoding"). At temperature 0, p being one-hot, drafts are accepted as long as they are the
    target's own choice.

    Args:
        draft_tokens: int64 [B, γ], γ ≥ 0.
        target_probs: float32 [B, γ + 1, V]: row i is after i drafts. Any strides.
        num_drafts: int32 [B], how many drafts each sequence has, 0 to γ; None: γ. Tokens and
            probabilities of the others are not looked at.
        draft_probs: float32 [B, γ, V], what the drafts were drawn from. None: each was certain,
            q(x) = 1, as with n-grams.
        uniforms: float32 [B, γ + 1]. Number i decides draft i, and the number after the last
            draft's (``num_drafts``, or γ) the token that is drawn.
        seeds, positions: int64 [B] each, instead of uniforms, numbered the same: a sequence's
            result depends on its own drafts, not on those of its batch.

    Returns:
        tokens: int64 [B, γ + 1]: the accepted drafts, the token that was drawn, then -1.
        num_accepted: int32 [B].

    Raises:
        ValueError: for shapes and devices.
        TypeError: for other dtypes.
    """
    op = "speculative_verify"
    draft_tokens = check_drafts(op, draft_tokens)
    check_distributions(op, target_probs, draft_probs, draft_tokens)
    batch, drafts = draft_tokens.shape
    if num_drafts is not None:
        num_drafts = check_vector(
            op, "num_drafts", num_drafts, (batch,), (torch.int32,), "draft_tokens", draft_tokens
        )
    draws = check_draws(op, uniforms, seeds, positions, (batch, drafts + 1), draft_tokens)
    tokens, num_accepted = _library.ops.speculative_verify(
        draft_tokens, num_drafts, draft_probs, target_probs, *draws
    )
    return tokens, num_accepted


def speculative_verify_tree(
    draft_tokens: Tensor,
    parents: Tensor,
    target_probs: Tensor,
    *,
    draft_probs: Tensor | None = None,
    uniforms: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept a path of a tree of drafted tokens, with the target's distribution.

    From the root on a node's children are tried in the order of their indices. Child x, drawn from
    q, is accepted if ``u < p(x) / q(x)``, and the walk goes on from there; else ``p <- norm(max(p -
    q, 0))`` and the next one is tried. Where no child is left a token is drawn from p (multi-step
    speculative sampling: Miao et al., 2024, "SpecInfer"). Exact where the children of a node were
    drawn independently, each from its own q, or without draft_probs are distinct or not, but chosen
    without chance.

    Args:
        draft_tokens: int64 [B, T], T ≥ 0.
        parents: int32 [B, T], the index of the draft before, less than its own; -1: the root, the
            last committed token; -2: no draft, and nothing of it is looked at.
        target_probs: float32 [B, T + 1, V]: row 0 is after the root, row t + 1 after draft t.
        draft_probs: float32 [B, T, V], what each draft was drawn from. None: each was certain,
            q(x) = 1, so that rejecting it leaves p without x.
        uniforms: float32 [B, T + 1]. Number t decides draft t, and the number after the last
            draft's (T where there is no padding) the token that is drawn.
        seeds, positions: int64 [B] each, instead of uniforms.

    Returns:
        tokens: int64 [B, T + 1]: the accepted drafts, the token that was drawn, then -1.
        path: int32 [B, T]: the indices of the accepted drafts, then -1.
        num_accepted: int32 [B].

    Raises:
        ValueError: for shapes and devices.
        TypeError: for other dtypes.
        RuntimeError: on CUDA for trees of more than 4096 drafts.
    """
    op = "speculative_verify_tree"
    draft_tokens = check_drafts(op, draft_tokens)
    parents = check_parents(op, parents, draft_tokens)
    check_distributions(op, target_probs, draft_probs, draft_tokens)
    batch, drafts = draft_tokens.shape
    draws = check_draws(op, uniforms, seeds, positions, (batch, drafts + 1), draft_tokens)
    tokens, path, num_accepted = _library.ops.speculative_verify_tree(
        draft_tokens, parents, draft_probs, target_probs, *draws
    )
    return tokens, path, num_accepted
