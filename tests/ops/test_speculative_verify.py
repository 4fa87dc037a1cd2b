"""Verification of drafts, chains and trees, against float64 and by what comes out of many."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import pumice
from backends import Backend
from sampling_reference import chi_square_excess, drawn, uniform, walk

PADDING = -2


def distributions(*shape: int, seed: int, sharp: float = 1.5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(*shape, generator=g) * sharp, -1)


def sampled(probs: Tensor, seed: int) -> Tensor:
    """A token from each distribution [..., V]."""
    g = torch.Generator().manual_seed(seed)
    flat = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=g)
    return flat.view(probs.shape[:-1])


@st.composite
def cases(draw: st.DrawFn, largest: int) -> dict[str, Any]:
    batch, drafts = draw(st.integers(0, 3)), draw(st.integers(0, 6))
    vocab = draw(st.one_of(st.integers(1, 9), st.integers(1, largest)))
    seed = draw(st.integers(0, 10**6))
    target = distributions(batch, drafts + 1, vocab, seed=seed)
    # Drafts near the target, so that some are accepted.
    near = target[:, :drafts] * distributions(batch, drafts, vocab, seed=seed + 1, sharp=0.5)
    probs = near / near.sum(-1, keepdim=True)
    tokens = sampled(probs, seed) if probs.numel() else torch.zeros(batch, drafts).long()
    tree = draw(st.booleans())
    parents = np.array([[draw(st.integers(-1, n - 1)) if tree else n - 1 for n in range(drafts)]
                        for _ in range(batch)]).reshape(batch, drafts)  # fmt: skip
    for row in parents:
        if draw(st.booleans()):
            row[draw(st.integers(0, drafts)) :] = PADDING
    certain = draw(st.booleans())
    uniforms = torch.rand(batch, drafts + 1, generator=torch.Generator().manual_seed(seed))
    return {"tokens": tokens, "probs": None if certain else probs, "target": target, "tree": tree,
            "parents": parents, "uniforms": uniforms}  # fmt: skip


def poisoned(case: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
    """With nonsense in what must not be looked at."""
    tokens, target = case["tokens"].clone(), case["target"].clone()
    probs = None if case["probs"] is None else case["probs"].clone()
    for b, n in np.argwhere(case["parents"] == PADDING):
        tokens[b, n] = 2**62
        target[b, n + 1] = torch.nan
        if probs is not None:
            probs[b, n] = torch.inf
    return tokens, probs, target


def verify(backend: Backend, case: dict[str, Any]) -> tuple[Tensor, ...]:
    tokens, probs, target = poisoned(case)
    device = backend.device
    keywords = {"draft_probs": None if probs is None else probs.to(device),
                "uniforms": case["uniforms"].to(device)}  # fmt: skip
    parents = torch.from_numpy(case["parents"]).int().to(device)
    given = tokens.to(device), target.to(device)
    if case["tree"]:
        found = pumice.ops.speculative_verify_tree(given[0], parents, given[1], **keywords)
        return tuple(x.cpu() for x in found)
    counts = (parents != PADDING).sum(1).int()
    out, accepted = pumice.ops.speculative_verify(*given, num_drafts=counts, **keywords)
    # A chain is a tree; the number of the last token is the one after its last draft.
    tree = pumice.ops.speculative_verify_tree(given[0], parents, given[1], **keywords)
    assert torch.equal(tree[0], out)
    assert torch.equal(tree[2], accepted)
    return out.cpu(), tree[1].cpu(), accepted.cpu()


def test_against_float64(backend: Backend) -> None:
    seen = {"accepted": 0, "rejected": 0, "siblings": 0}

    @backend.for_all(cases(300))
    def property_holds(case: dict[str, Any]) -> None:
        tokens, path, accepted = verify(backend, case)
        batch, drafts = case["tokens"].shape
        assert tokens.shape == (batch, drafts + 1)
        assert path.shape == (batch, drafts)
        assert (accepted.dtype, path.dtype) == (torch.int32, torch.int32)
        for b in range(batch):
            probs = None if case["probs"] is None else case["probs"][b].double().numpy()
            expected = walk(case["tokens"][b].tolist(), case["parents"][b].tolist(), probs,
                            case["target"][b].double().numpy(),
                            case["uniforms"][b].double().numpy())  # fmt: skip
            if expected.undecided:
                continue
            count = len(expected.accepted)
            assert accepted[b] == count
            assert path[b].tolist() == expected.accepted + [-1] * (drafts - count)
            assert tokens[b, :count].tolist() == case["tokens"][b][expected.accepted].tolist()
            last = int(tokens[b, count])
            assert last in drawn(expected.rest, float(case["uniforms"][b, expected.last_uniform]))
            assert tokens[b, count + 1 :].tolist() == [-1] * (drafts - count)
            nodes = case["parents"][b]
            seen["accepted"] += count
            seen["rejected"] += count < (nodes != PADDING).sum()
            seen["siblings"] += len(set(nodes)) < len(nodes)

    assert min(seen.values()) > 10, "the examples do not show what they should"


def test_a_chain_of_one_by_hand(backend: Backend) -> None:
    """p / q = 0.25, then norm(max(p - q, 0)) = (0, 0.2, 0.8)."""
    target = torch.tensor([[[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]])
    draft = torch.tensor([[[0.8, 0.2, 0.0]]])
    for u, v, expected in ((0.24, 0.59, [0, 0]), (0.24, 0.61, [0, 1]), (0.26, 0.166, [1, -1]),
                           (0.26, 0.168, [2, -1]), (0.26, 0.0, [1, -1])):  # fmt: skip
        tokens, accepted = pumice.ops.speculative_verify(
            torch.tensor([[0]]).to(backend.device), target.to(backend.device),
            draft_probs=draft.to(backend.device),
            uniforms=torch.tensor([[u, v]]).to(backend.device),
        )  # fmt: skip
        assert tokens.tolist() == [expected]
        assert accepted.tolist() == [int(u < 0.25)]


def test_siblings_by_hand(backend: Backend) -> None:
    """p = (.5, .3, .2) less (.9, .1, 0) is (0, .5, .5), and that less (0, .8, .2) is (0, 0, 1)."""
    target = torch.full((1, 5, 3), 1 / 3)
    target[0, 0], target[0, 2] = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 0.25, 0.5])
    draft = torch.tensor([[[0.9, 0.1, 0], [0, 0.8, 0.2], [0, 0, 1.0], [0.5, 0.5, 0]]])
    tokens = torch.tensor([[0, 1, 2, 0]])
    parents = torch.tensor([[-1, -1, -1, 1]], dtype=torch.int32)
    for uniforms, path in (
        ((0.55, 0.9, 0.9, 0.9), [0]),
        ((0.56, 0.62, 0.9, 0.49), [1, 3]),  # 0.5 / 0.8; then 0.25 / 0.5 of another row
        ((0.56, 0.62, 0.9, 0.51), [1]),
        ((0.56, 0.63, 0.99, 0.0), [2]),
    ):
        u = torch.tensor([[*uniforms, 0.5]])
        _, found, accepted = pumice.ops.speculative_verify_tree(
            tokens.to(backend.device), parents.to(backend.device), target.to(backend.device),
            draft_probs=draft.to(backend.device), uniforms=u.to(backend.device),
        )  # fmt: skip
        assert found.tolist() == [path + [-1] * (4 - len(path))]
        assert accepted.tolist() == [len(path)]


def test_greedy_is_plain_decoding(backend: Backend) -> None:
    """At temperature 0 drafts are accepted as long as they are the target's choice."""
    logits = torch.randn(4, 4, 333, generator=torch.Generator().manual_seed(0)).to(backend.device)
    best = logits.argmax(-1)
    probs = pumice.ops.sampling_probs(logits.flatten(0, 1), temperature=0).view_as(logits)
    drafts = best[:, :3].clone()
    for b in range(3):
        drafts[b, b] = (drafts[b, b] + 1) % 333
    for draft_probs in (None, logits[:, :3].softmax(-1)):
        tokens, accepted = pumice.ops.speculative_verify(drafts, probs, draft_probs=draft_probs)
        assert accepted.tolist() == [0, 1, 2, 3]
        for b, count in enumerate(accepted.tolist()):
            assert tokens[b].tolist() == best[b, : count + 1].tolist() + [-1] * (3 - count)


def test_certain_drafts_are_one_hot(backend: Backend) -> None:
    """Without draft_probs as with q = 1 at each draft, by the same numbers."""
    target = distributions(20, 4, 11, seed=1).to(backend.device)
    tokens = sampled(target[:, :3].cpu(), 2).to(backend.device)
    one_hot = torch.nn.functional.one_hot(tokens, 11).float()
    for parents in ([-1, 0, 1], [-1, -1, 1], [-1, 0, 0]):
        tree = torch.tensor([parents] * 20, dtype=torch.int32, device=backend.device)
        seeds = torch.arange(20, device=backend.device)
        keywords = {"seeds": seeds, "positions": seeds}
        certain = pumice.ops.speculative_verify_tree(tokens, tree, target, **keywords)
        given = pumice.ops.speculative_verify_tree(
            tokens, tree, target, draft_probs=one_hot, **keywords
        )
        assert all(torch.equal(a, b) for a, b in zip(certain, given, strict=True))


def test_degenerate_rows_are_defined(backend: Backend) -> None:
    nan, inf = torch.nan, torch.inf
    rows = {
        "zeros": [0, 0, 0, 0],
        "nan": [nan] * 4,
        "negative": [-1, -inf, nan, -0.0],
        "one": [0, nan, 0.5, -3],
        "large": [0, inf, 0, 2],
    }
    target = torch.tensor(list(rows.values()))[:, None].expand(5, 3, 4).to(backend.device)
    drafts = torch.tensor([[2, 2]] * 5, device=backend.device)
    u = torch.tensor([[0.25, 0.25, 0.75]] * 5, device=backend.device)
    for probs in (None, target[:, :2], torch.zeros_like(target[:, :2])):
        tokens, accepted = pumice.ops.speculative_verify(
            drafts, target, draft_probs=probs, uniforms=u
        )
        # Nothing to draw from is token 0.
        assert tokens[:3].tolist() == [[0, -1, -1]] * 3
        assert accepted[:3].tolist() == [0, 0, 0]
        assert tokens[3].tolist() == [2, 2, 2]  # the only one possible
    # q as large as p everywhere leaves nothing: then p stays.
    same = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]], device=backend.device)
    tokens, accepted = pumice.ops.speculative_verify(
        torch.zeros(1, 1, dtype=torch.int64, device=backend.device), same,
        draft_probs=torch.ones(1, 1, 2, device=backend.device),
        uniforms=torch.tensor([[0.75, 0.75]], device=backend.device),
    )  # fmt: skip
    assert (tokens.tolist(), accepted.tolist()) == ([[1, -1]], [0])


@pytest.mark.parametrize("token", [-1, 4, 2**40, -(2**63)])
def test_drafts_out_of_range_are_rejected(backend: Backend, token: int) -> None:
    target = torch.full((1, 3, 4), 0.25, device=backend.device)
    drafts = torch.tensor([[token, 1]], device=backend.device)
    u = torch.zeros(1, 3, device=backend.device)
    for probs in (None, target[:, :2]):
        tokens, accepted = pumice.ops.speculative_verify(
            drafts, target, draft_probs=probs, uniforms=u
        )
        assert accepted.tolist() == [0]
        assert tokens.tolist() == [[0, -1, -1]]


def test_odd_trees_are_defined(backend: Backend) -> None:
    """Parents that are no earlier draft make a draft that nothing reaches."""
    target = torch.full((1, 4, 4), 0.25, device=backend.device)
    drafts = torch.tensor([[1, 2, 3]], device=backend.device)
    u = torch.tensor([[0.0, 0.0, 0.0, 0.6]], device=backend.device)
    for parents, path in (([0, 1, 2], []), ([2, -1, 1], [1, 2]), ([-7, 99, -1], [2]),
                          ([-1, 1, 0], [0, 2])):  # fmt: skip
        tree = torch.tensor([parents], dtype=torch.int32, device=backend.device)
        tokens, found, accepted = pumice.ops.speculative_verify_tree(
            drafts, tree, target, uniforms=u
        )
        assert accepted.tolist() == [len(path)]
        assert found.tolist() == [path + [-1] * (3 - len(path))]
        assert tokens[0, len(path)] == 2  # 0.6


def test_any_strides(backend: Backend) -> None:
    target, probs = distributions(3, 4, 8, seed=3), distributions(3, 3, 8, seed=4)
    tokens = sampled(probs, 5)
    seeds = torch.arange(3)
    keywords = {"seeds": seeds.to(backend.device), "positions": seeds.to(backend.device)}
    expected = pumice.ops.speculative_verify(
        tokens.to(backend.device), target.to(backend.device),
        draft_probs=probs.to(backend.device), **keywords
    )  # fmt: skip
    wide = torch.full((3, 5, 11), torch.nan)
    wide[:, 1:, 2:10] = target
    for strided in (
        wide.to(backend.device)[:, 1:, 2:10],
        target.permute(2, 1, 0).contiguous().to(backend.device).permute(2, 1, 0),
    ):
        found = pumice.ops.speculative_verify(
            tokens.t().contiguous().to(backend.device).t(), strided,
            draft_probs=probs.to(backend.device), **keywords
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_sequence_does_not_depend_on_others(backend: Backend) -> None:
    """Alone, with no more drafts than it has, as padded in a batch."""
    target, probs = distributions(4, 4, 50, seed=6), distributions(4, 3, 50, seed=7)
    tokens = sampled(probs, 8)
    counts = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    seeds = torch.arange(4) + 11
    moved = [x.to(backend.device) for x in (tokens, target, probs, counts, seeds)]
    tokens, target, probs, counts, seeds = moved
    together = pumice.ops.speculative_verify(
        tokens, target, draft_probs=probs, num_drafts=counts, seeds=seeds, positions=seeds
    )
    for b in range(4):
        one = slice(b, b + 1)
        alone = pumice.ops.speculative_verify(
            tokens[one, :b], target[one, : b + 1], draft_probs=probs[one, :b],
            seeds=seeds[one], positions=seeds[one],
        )  # fmt: skip
        assert alone[0].tolist() == [together[0][b, : b + 1].tolist()]
        assert alone[1].tolist() == together[1][one].tolist()


# p of the second token depends on the first, that of the third on the second.
VOCAB = 4
FIRST = distributions(VOCAB, seed=20, sharp=0.4)
NEXT = distributions(VOCAB, VOCAB, seed=21, sharp=0.4)
DRAFT = distributions(VOCAB, seed=22, sharp=0.4)
DRAFT_NEXT = distributions(VOCAB, VOCAB, seed=23, sharp=0.4)
JOINT = (FIRST[:, None] * NEXT).double().numpy()


def completed(tokens: Tensor) -> np.ndarray[Any, Any]:
    """Pairs of tokens, the second drawn from the target where verification gave but one."""
    pairs = tokens[:, :2].cpu()
    after = sampled(NEXT[pairs[:, 0]], 99)
    second = torch.where(pairs[:, 1] < 0, after, pairs[:, 1])
    return np.bincount((pairs[:, 0] * VOCAB + second).numpy(), minlength=VOCAB**2).astype(float)


def numbers(backend: Backend, rows: int) -> dict[str, Tensor]:
    seeds, positions = torch.full((rows,), 2024), torch.arange(rows)
    return {"seeds": seeds.to(backend.device), "positions": positions.to(backend.device)}


def rows_for(backend: Backend) -> int:
    return 60000 if backend.name != "emulated" else 400


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("certain", [False, True])
def test_chains_have_the_targets_distribution(
    backend: Backend, certain: bool, ragged: bool
) -> None:
    rows = rows_for(backend)
    first = torch.full((rows,), 1) if certain else sampled(DRAFT.expand(rows, VOCAB), 1)
    second = torch.full((rows,), 2) if certain else sampled(DRAFT_NEXT[first], 2)
    target = torch.stack([FIRST.expand(rows, VOCAB), NEXT[first], NEXT[second]], 1)
    probs = torch.stack([DRAFT.expand(rows, VOCAB), DRAFT_NEXT[first]], 1)
    counts = (torch.arange(rows) % 3).int() if ragged else None
    tokens, accepted = pumice.ops.speculative_verify(
        torch.stack([first, second], 1).to(backend.device), target.to(backend.device),
        draft_probs=None if certain else probs.to(backend.device),
        num_drafts=None if counts is None else counts.to(backend.device),
        **numbers(backend, rows),
    )  # fmt: skip
    counts_of_pairs = completed(tokens)
    assert abs(chi_square_excess(counts_of_pairs, JOINT.flatten())) < 4
    if not ragged:
        alpha = float(FIRST[1]) if certain else float(torch.minimum(FIRST, DRAFT).sum())
        found = float((accepted > 0).float().mean())
        assert abs(found - alpha) < 4 * (alpha * (1 - alpha) / rows) ** 0.5


# Root: 0, 1, 2; children of 0: 3, 4; child of 1: 5.
TREE = (-1, -1, -1, 0, 0, 1)


@pytest.mark.parametrize("certain", [False, True])
def test_trees_have_the_targets_distribution(backend: Backend, certain: bool) -> None:
    rows = rows_for(backend)
    if certain:  # two children of the root are one token
        tokens = torch.tensor([[0, 2, 2, 1, 3, 0]]).expand(rows, 6)
    else:
        roots = sampled(DRAFT.expand(rows, 3, VOCAB), 31)
        tokens = torch.cat([roots, sampled(DRAFT_NEXT[roots[:, [0, 0, 1]]], 32)], 1)
    target = torch.cat([FIRST.expand(rows, 1, VOCAB), NEXT[tokens]], 1)
    probs = torch.cat([DRAFT.expand(rows, 3, VOCAB), DRAFT_NEXT[tokens[:, [0, 0, 1]]]], 1)
    out, path, accepted = pumice.ops.speculative_verify_tree(
        tokens.contiguous().to(backend.device),
        torch.tensor([TREE], dtype=torch.int32).expand(rows, 6).to(backend.device),
        target.to(backend.device),
        draft_probs=None if certain else probs.to(backend.device),
        **numbers(backend, rows),
    )  # fmt: skip
    assert abs(chi_square_excess(completed(out), JOINT.flatten())) < 4
    first = path[:, 0].cpu()
    assert all((first == child).any() for child in ((0, 1) if certain else (0, 1, 2)))
    assert (accepted.cpu() == (path.cpu() >= 0).sum(1)).all()


def test_numbers_are_used_once(backend: Backend) -> None:
    """Each draft by its own: equal ones would accept all siblings or none."""
    target = torch.full((64, 5, 2), 0.5, device=backend.device)
    drafts = torch.zeros(64, 4, dtype=torch.int64, device=backend.device)
    seeds = torch.arange(64, device=backend.device)
    _, accepted = pumice.ops.speculative_verify(drafts, target, seeds=seeds, positions=seeds)
    for b in range(64):
        low = [uniform(b, b, i, 1) < 1 << 31 for i in range(4)]
        assert accepted[b] == (low.index(False) if False in low else 4)
