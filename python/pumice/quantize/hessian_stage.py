"""The step that GPTQ and SparseGPT share: the Hessians of a block, one after the other."""

from __future__ import annotations

import warnings
from abc import abstractmethod

from pumice.calibration import Block, Hessian, SharedInput, Stage

# With less data the solvers fit the sample. GPTQ's output error on held-out text over that of plain
# rounding, down_proj of SmolLM2-135M (K = 1536, 4 bit, groups of 64, damp 0.01): block 14, 2048
# tokens 1.06, 4096 tokens 0.92, 8192 tokens 0.86; block 3, 4096 tokens 1.13. With damp 1, block 14:
# 0.87, 0.86.
_TOKENS_PER_FEATURE = 4


class HessianStage(Stage):
    """Collect the Hessians of a block and compress its layers, those of one input together."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._warned = False

    @abstractmethod
    def compress(self, block: Block, group: SharedInput[Hessian]) -> None:
        """Replace the layers of one input. Rows are independent: they are rows of one matrix."""

    def process(self, block: Block) -> None:
        shared = block.collect(lambda _, linear: Hessian(linear.in_features, block.device))
        while shared:
            group = shared.pop(0)  # its Hessian is freed when it is done
            self._check_tokens(block, group)
            self.compress(block, group)

    def _check_tokens(self, block: Block, group: SharedInput[Hessian]) -> None:
        name, tokens = group.names[0], group.statistic.tokens
        features = block.layers[name].in_features
        if tokens < _TOKENS_PER_FEATURE * features and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._method}: {tokens} calibration tokens are few for the {features} inputs of "
                f"{block.full_name(name)}, {_TOKENS_PER_FEATURE} an input or a damp of 0.1 to 1 "
                "fit the sample less",
                stacklevel=2,
            )
