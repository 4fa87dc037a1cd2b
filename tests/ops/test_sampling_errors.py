"""What the sampling operators refuse, and how they say it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import pumice

X = torch.ones(3, 8)
U = torch.ones(3)
I64 = torch.arange(3)
Refusal = tuple[type[Exception], str, dict[str, Any]]

FILTERS: list[Refusal] = [
    (TypeError, "logits must be a torch.Tensor, not list", {"logits": [1.0]}),
    (TypeError, "logits must be float32 or float16 or bfloat16, not float64",
     {"logits": X.double()}),
    (ValueError, r"logits must have shape \[R, V\], not \[8\]", {"logits": X[0]}),
    (ValueError, r"must be from 1 to 8388608, but logits has shape \[3, 0\]",
     {"logits": X[:, :0]}),
    (ValueError, r"must be from 1 to 8388608, but logits has shape \[3, 8388609\]",
     {"logits": X[:, :1].expand(3, 8388609)}),
    (TypeError, "temperature must be a float or a float32 tensor, not str", {"temperature": "1"}),
    (TypeError, "temperature must be float32, not float64", {"temperature": U.double()}),
    (ValueError, r"temperature must have shape \[3\] or \[1\], not \[2\]", {"temperature": U[:2]}),
    (ValueError, "temperature must be at least 0 and finite, not -0.1", {"temperature": -0.1}),
    (ValueError, "temperature must be at least 0 and finite, not nan", {"temperature": math.nan}),
    (ValueError, "temperature must be at least 0 and finite, not inf", {"temperature": math.inf}),
    (ValueError, "temperature is on meta, but logits is on cpu", {"temperature": U.to("meta")}),
    (TypeError, "top_k must be an int or an int32 tensor, not float", {"top_k": 2.0}),
    (TypeError, "top_k must be an int or an int32 tensor, not bool", {"top_k": True}),
    (TypeError, "top_k must be int32, not int64", {"top_k": I64}),
    (ValueError, r"top_k must be at least 0 \(0: all tokens\), not -1", {"top_k": -1}),
    (ValueError, r"top_k must have shape \[3\] or \[1\], not \[3, 1\]",
     {"top_k": I64.int()[:, None]}),
    (ValueError, "top_p must be at least 0 and at most 1, not 1.5", {"top_p": 1.5}),
    (TypeError, "top_p must be float32, not float16", {"top_p": U.half()}),
    (ValueError, "min_p must be at least 0 and at most 1, not -0.5", {"min_p": -0.5}),
    (TypeError, "min_p must be a float or a float32 tensor, not list", {"min_p": [0.1]}),
]  # fmt: skip

DRAWS: list[Refusal] = [
    (ValueError, "seeds came without positions", {"seeds": I64}),
    (ValueError, "positions came without seeds", {"positions": I64}),
    (ValueError, "takes either uniforms or seeds and positions, not both",
     {"uniforms": U, "seeds": I64, "positions": I64}),
    (TypeError, "uniforms must be float32, not float64", {"uniforms": U.double()}),
    (ValueError, "uniforms must have shape", {"uniforms": U[:2]}),
    (TypeError, "seeds must be int64, not int32", {"seeds": I64.int(), "positions": I64}),
    (ValueError, r"positions must have shape \[3\], not \[2\]",
     {"seeds": I64, "positions": I64[:2]}),
    (ValueError, "seeds is on meta", {"seeds": I64.to("meta"), "positions": I64}),
]  # fmt: skip

TOKENS = torch.zeros(3, 2, dtype=torch.int64)
PARENTS = torch.tensor([[-1, 0]] * 3, dtype=torch.int32)
TARGET = torch.ones(3, 3, 8)
DRAFT = torch.ones(3, 2, 8)

VERIFY: list[Refusal] = [
    (TypeError, "draft_tokens must be a torch.Tensor, not list", {"draft_tokens": [[1]]}),
    (TypeError, "draft_tokens must be int64, not int32", {"draft_tokens": TOKENS.int()}),
    (ValueError, r"draft_tokens must have shape \[B, N\], not \[2\]", {"draft_tokens": TOKENS[0]}),
    (TypeError, "target_probs must be float32, not float16", {"target_probs": TARGET.half()}),
    (ValueError, r"target_probs must have shape \[3, 3, V\], .*, not \[3, 2, 8\]",
     {"target_probs": TARGET[:, :2]}),
    (ValueError, "the vocabulary, the last dimension of target_probs",
     {"target_probs": TARGET[..., :0]}),
    (ValueError, "target_probs is on meta, but draft_tokens is on cpu",
     {"target_probs": TARGET.to("meta")}),
    (TypeError, "draft_probs must be float32, not bfloat16", {"draft_probs": DRAFT.bfloat16()}),
    (ValueError, r"draft_probs must have shape \[3, 2, 8\], the vocabulary .*, not \[3, 2, 7\]",
     {"draft_probs": DRAFT[..., :7]}),
    (ValueError, "draft_probs is on meta", {"draft_probs": DRAFT.to("meta")}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), FILTERS)
@pytest.mark.parametrize("name", ["sampling_probs", "sample"])
def test_filters_refused(
    name: str, error: type[Exception], message: str, changed: dict[str, Any]
) -> None:
    with pytest.raises(error, match=f"^{name}: .*{message}"):
        getattr(pumice.ops, name)(**({"logits": X} | changed))


@pytest.mark.parametrize(("error", "message", "changed"), DRAWS)
def test_draws_refused(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^sample: .*{message}"):
        pumice.ops.sample(X, **changed)
    with pytest.raises(error, match=f"^speculative_verify: .*{message}"):
        pumice.ops.speculative_verify(TOKENS, TARGET, **changed)


@pytest.mark.parametrize(("error", "message", "changed"), VERIFY)
def test_verification_refused(
    error: type[Exception], message: str, changed: dict[str, Any]
) -> None:
    given = {"draft_tokens": TOKENS, "target_probs": TARGET} | changed
    with pytest.raises(error, match=f"^speculative_verify: .*{message}"):
        pumice.ops.speculative_verify(**given)
    parents = PARENTS
    with pytest.raises(error, match=f"^speculative_verify_tree: .*{message}"):
        pumice.ops.speculative_verify_tree(parents=parents, **given)


@pytest.mark.parametrize(("error", "message", "changed"), [
    (TypeError, "num_drafts must be int32, not int64", {"num_drafts": I64}),
    (ValueError, r"num_drafts must have shape \[3\], not \[2\]", {"num_drafts": I64.int()[:2]}),
    (ValueError, "num_drafts is on meta", {"num_drafts": I64.int().to("meta")}),
])  # fmt: skip
def test_counts_refused(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^speculative_verify: .*{message}"):
        pumice.ops.speculative_verify(TOKENS, TARGET, **changed)


@pytest.mark.parametrize(("error", "message", "parents"), [
    (TypeError, "parents must be a torch.Tensor, not list", [[-1]]),
    (TypeError, "parents must be int32, not int64", PARENTS.long()),
    (ValueError, r"parents must have the shape of draft_tokens, \[3, 2\], not \[3, 1\]",
     PARENTS[:, :1]),
    (ValueError, "parents is on meta", PARENTS.to("meta")),
])  # fmt: skip
def test_parents_refused(error: type[Exception], message: str, parents: Any) -> None:
    with pytest.raises(error, match=f"^speculative_verify_tree: .*{message}"):
        pumice.ops.speculative_verify_tree(TOKENS, parents, TARGET)


def test_no_gradient() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="sampling_probs is not differentiable"):
        pumice.ops.sampling_probs(x).sum().backward()


def test_the_operators_check_again() -> None:
    """Callers of torch.ops, who skip Python's checks."""
    op = torch.ops.pumice
    none = (None,) * 4
    with pytest.raises(RuntimeError, match="sample: takes either uniforms or both seeds and"):
        op.sample(X, *none, None, None, None)
    with pytest.raises(RuntimeError, match="sample: uniforms must have 3 rows of 1"):
        op.sample(X, *none, U[:2], None, None)
    with pytest.raises(RuntimeError, match=r"sampling_probs: top_k must be int32 of shape \[1\]"):
        op.sampling_probs(X, None, I64, None, None)
    with pytest.raises(RuntimeError, match="sampling_probs: top_p must be contiguous"):
        op.sampling_probs(X, None, None, torch.ones(6)[::2], None)
    with pytest.raises(RuntimeError, match="speculative_verify: target_probs must have shape"):
        op.speculative_verify(TOKENS, None, None, TARGET[:, 1:], None, I64, I64)
    with pytest.raises(RuntimeError, match="speculative_verify_tree: parents must be int32"):
        op.speculative_verify_tree(TOKENS, TOKENS, None, TARGET, None, I64, I64)
