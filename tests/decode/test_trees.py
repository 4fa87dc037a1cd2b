"""Trees of guesses: their nodes, what these see, where they lie, and who proposes which."""

import random

import numpy as np
import pytest
import torch
from distribution import next_probs
from sharp_models import sharp
from tree_drafts import GREEDY, WARM, continued, prompt

from pumice.decode.block_manager import BlockManager
from pumice.decode.draft import DraftRequest
from pumice.decode.draft_slots import keep_drafts
from pumice.decode.draft_tree import ROOT, NgramTreeDraft, Tree
from pumice.decode.draft_tree_model import ModelTreeDraft
from pumice.decode.pool import CachePool
from pumice.decode.speculative import TreeDecoder
from pumice.decode.tree_verify import tree_mask


@pytest.fixture(scope="module")
def model():
    return sharp("llama")


def test_a_tree_knows_its_nodes():
    tree = Tree()
    a = tree.add(5, ROOT)
    b = tree.add(6, a)
    c = tree.add(5, b)
    assert tree.add(6, a) == b
    d = tree.add(7, a)
    assert (len(tree), tree.tokens, tree.parents) == (4, [5, 6, 5, 7], [-1, 0, 1, 0])
    assert tree.depths() == [1, 2, 3, 2]
    assert tree.ancestors() == [[a], [a, b], [a, b, c], [a, d]]


def test_the_mask_shows_a_node_its_ancestors():
    generator = random.Random(0)
    trees = []
    for size in (0, 5, 1, 9):
        parents = [generator.randrange(-1, i) for i in range(size)]
        trees.append(Tree(list(range(size)), parents))
    words = tree_mask(trees)
    assert words.shape == (4 + 15, 1)
    mask = torch.from_numpy(words) >> torch.arange(32) & 1
    row = 0
    for tree in trees:
        for query in range(1 + len(tree)):
            seen, node = {query}, query
            while node > 0:
                node = tree.parents[node - 1] + 1
                seen.add(node)
            assert set(mask[row].nonzero().flatten().tolist()) == seen
            row += 1


@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_tokens_are_moved_in_every_layer_also_onto_each_other(cache_dtype):
    scales = [(torch.ones(1), torch.ones(1))] * 2 if cache_dtype else None
    pool = CachePool(4, 4, [(2, 8, 8), (1, 4, 2)], torch.float32, cache_dtype, scales=scales)
    caches = [*pool.key_caches, *pool.value_caches]
    for cache in caches:
        cache.view(torch.uint8).random_(0, 100)
    before = [cache.view(torch.uint8).clone() for cache in caches]
    source, destination = np.array([3, 9, 4, 7, 12]), np.array([2, 3, 4, 9, 0])
    pool.move_tokens(source, destination)
    for cache, old in zip(caches, before, strict=True):
        expected = old.flatten(0, 1).clone()
        expected[destination] = old.flatten(0, 1)[source]
        assert torch.equal(cache.view(torch.uint8).flatten(0, 1), expected)


def test_sequences_without_a_tree_are_chains_in_the_mask():
    tree = Tree([5, 6, 7], [-1, -1, 0])
    mask = tree_mask([None, tree, None], np.array([40, 4, 1]))
    assert mask.shape == (45, 2)
    bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")
    assert (bits[:40, :40] == np.tri(40)).all()
    assert bits[40:44, :4].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    assert bits[44].tolist() == [1, *[0] * 63]
    assert not bits[:, 40:].any()


def test_what_is_likeliest_is_followed():
    tree = Tree([5, 6, 5, 7, 8], [-1, -1, 1, 1, 3])
    assert tree.follow([6, 0, 7, 0, 8, 1]) == [1, 3, 4]
    assert tree.follow([6, 0, 9, 0, 8, 1]) == [1]
    assert tree.follow([5, 6, 0, 0, 0, 0]) == [0]
    assert tree.follow([4, 6, 0, 0, 0, 0]) == []
    assert tree.first(3) == Tree([5, 6, 5], [-1, -1, 1])
    assert tree.first(2).follow([6, 0, 7]) == [1]
    assert [Tree([1, 2], parents).is_chain for parents in ([-1, 0], [-1, -1])] == [True, False]


@pytest.mark.parametrize("seed", range(20))
def test_the_drafts_that_stay_lie_as_without_branches(seed):
    """A cache of tokens: afterwards each sequence reads as its tokens and what was kept."""
    chance = random.Random(seed)
    size = chance.choice([1, 3, 4])
    manager = BlockManager(100, size, watermark=0)
    texts = [prompt(chance.randint(1, 9), seed=i) for i in range(3)]
    ids = np.array([manager.allocate(text[:-1], limit=0).id for text in texts])
    manager.append(ids, [t for text in texts for t in text[:-1]], [len(t) - 1 for t in texts])
    cache = np.full(100 * size, -1)
    for id, text in zip(ids, texts, strict=True):
        cache[slots_of(manager, id, size)] = text[:-1]
    for _ in range(4):
        drafts = [prompt(chance.randint(0, 9), seed=chance.randrange(99)) for _ in texts]
        rows = [[text[-1], *row] for text, row in zip(texts, drafts, strict=True)]
        tokens, counts = np.concatenate(rows), np.array([*map(len, rows)])
        step = manager.append(ids, tokens, counts)
        cache[step.slot_mapping] = tokens
        kept = [sorted(chance.sample(range(len(d)), chance.randint(0, len(d)))) for d in drafts]
        moves = keep_drafts(manager, ids, step, tokens, counts, counts - 1, kept)
        cache[moves.destination] = cache[moves.source]
        manager.commit(ids)
        for text, row, path in zip(texts, drafts, kept, strict=True):
            text += [row[i] for i in path]
        for id, text in zip(ids, texts, strict=True):
            assert cache[slots_of(manager, id, size)].tolist() == text
            for i, block in enumerate(manager.block_table(id)[: len(text) // size]):
                assert manager.block_tokens(block).tolist() == text[i * size : (i + 1) * size]
            text.append(chance.randrange(61))  # the next root


def slots_of(manager, id, size):
    places = np.arange(manager.num_tokens(id))
    return manager.block_table(id)[places // size] * size + places % size


def test_a_model_proposes_its_most_probable_tokens(model):
    text = prompt(9)
    draft = ModelTreeDraft(model, (3, 2), num_blocks=64, block_size=4)
    (tree,) = draft.propose([DraftRequest(0, text, 5, GREEDY)])
    assert tree.probs is None
    assert len(tree) == 3 + 6 == draft.max_nodes
    with torch.no_grad():
        first = model(torch.tensor([text])).logits[0, -1].topk(3).indices.tolist()
        assert tree.tokens[:3] == first
        for node, token in enumerate(first):
            logits = model(torch.tensor([[*text, token]])).logits[0, -1]
            children = [t for t, p in zip(tree.tokens, tree.parents, strict=True) if p == node]
            assert children == logits.topk(2).indices.tolist()
    (short,) = draft.propose([DraftRequest(0, text, 1, GREEDY)])
    assert short.tokens == first
    (none,) = draft.propose([DraftRequest(0, text, 0, GREEDY)])
    assert len(none) == 0


def test_a_model_draws_without_replacement(model):
    text = prompt(9)
    draft = ModelTreeDraft(model, (4, 2), num_blocks=64)
    (tree,) = draft.propose([DraftRequest(0, text, 5, WARM, seed=3)])
    q = next_probs(model, [text], WARM)[0]
    assert sorted(tree.tokens[:4]) == q.nonzero().flatten().tolist()  # all four that there are
    left = q.clone()
    for node in range(4):
        torch.testing.assert_close(tree.probs[node], left / left.sum(), rtol=1e-4, atol=1e-6)
        left[tree.tokens[node]] = 0
    assert len(tree) == len(tree.probs) == 12
    assert all(float(p[t]) > 0 for p, t in zip(tree.probs, tree.tokens, strict=True))
    (again,) = draft.propose([DraftRequest(1, text, 5, WARM, seed=3)])
    assert (again.tokens, again.parents) == (tree.tokens, tree.parents)
    (different,) = draft.propose([DraftRequest(2, text, 5, WARM, seed=4)])
    assert different.tokens != tree.tokens


def test_repetition_is_found_by_n_grams(model):
    text = [1, 2, 3, 4, 5, 9, 1, 2, 3, 7, 8, 9, 1, 2, 3]
    draft = NgramTreeDraft(branches=2, depth=3, min_ngram=2)
    (tree,) = draft.propose([DraftRequest(0, text, 9, GREEDY)])
    assert tree.tokens == [7, 8, 9, 4, 5, 9]
    assert tree.parents == [-1, 0, 1, -1, 3, 4]
    decoder = TreeDecoder(model, NgramTreeDraft(3, 6), num_blocks=64)
    assert decoder.generate([text], GREEDY) == [continued(model, text, 24)]
    for wrong in ({"branches": 0}, {"depth": 0}, {"min_ngram": 0}, {"max_ngram": 0}):
        with pytest.raises(ValueError, match="NgramTreeDraft"):
            NgramTreeDraft(**wrong)
