"""What the tests of trees share: prompts, true continuations, and drafts that are wild."""

from __future__ import annotations

import random

import torch

from pumice.decode.draft_tree import ROOT, Tree, TreeDraft
from pumice.decode.request import SamplingParams

GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)
WARM = SamplingParams(max_new_tokens=3, temperature=1.3, top_k=4, ignore_eos=True)


def prompt(length, seed=0):
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def continued(model, tokens, count):
    """Greedy, the whole text through the model for every token."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-count:]


class Wild(TreeDraft):
    """Random trees that hold, where asked, some of the true continuation, between wrong branches:
    what is accepted hardly ever lies in consecutive nodes."""

    def __init__(self, truth=None, max_nodes=12, vocabulary=range(61), seed=0):
        self.truth = truth
        self.max_nodes = max_nodes
        self.vocabulary = vocabulary
        self.generator = random.Random(seed)
        self.released = []

    def propose(self, requests):
        return [self.tree(request) for request in requests]

    def tree(self, request):
        tree = Tree()
        depths = [0]
        for _ in range(self.generator.randrange(self.max_nodes)):
            parent = self.generator.randrange(-1, len(tree))
            if depths[parent + 1] < request.max_drafts:
                tree.add(self.generator.choice(self.vocabulary), parent)
                depths = [0, *tree.depths()]
        if self.truth is not None:
            text = self.truth[tuple(request.tokens[:4])]
            node = ROOT
            length = self.generator.randrange(min(5, request.max_drafts) + 1)
            for token in text[len(request.tokens) : len(request.tokens) + length]:
                node = tree.add(token, node)
        return tree

    def release(self, id):
        self.released.append(id)
