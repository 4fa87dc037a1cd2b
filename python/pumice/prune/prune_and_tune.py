"""Prune and Tune: prune a little, train what is left, prune more.

Syed, Guo, Sundarapandiyan, "Prune and Tune: Improving Efficient Pruning Techniques for Massive
Language Models", 2023. The training is in :mod:`pumice.prune._tune`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import nn

from pumice._calibrate import evaluation_mode, measure
from pumice.calibration.comm import is_distributed
from pumice.nn._linear import weight_of
from pumice.prune._layers import dense_layer
from pumice.prune._rounds import Rounds
from pumice.prune._tune import Objective, Tuning, tune
from pumice.prune.recipe import PruningRecipe
from pumice.quantize.recipe import Outcome, Recipe, Task, make_recipe

CRITERIA = ("magnitude", "wanda", "sparsegpt")

# The error of each layer is measured on this many samples.
_MEASURED_SAMPLES = 4


@dataclass(frozen=True)
class PruneAndTune(PruningRecipe):
    """Reach a high sparsity in rounds, each a pruning step and a short training of what is left.

    Round t of T prunes to the share ratio · (1 − (1 − t/T)³) of zeros (an n:m pattern: to the
    nearest n':m on the way, so in at most m − n rounds) by another method, then trains the weights
    that are left, the zeros fixed. Worth its cost from about 70 % of zeros on, where one shot of
    :class:`pumice.SparseGPT` breaks the model. A weight that became zero may come back in a later
    round, where SparseGPT makes up for others with it.

    Trained are the weights (and biases) of the chosen layers; everything else stays. Dropout is
    off, the order of the samples is drawn from ``seed``, so that one machine gives the same result
    each time (threads add in another order elsewhere).

    **Cost.** A copy of the whole model in fp32 is trained (products in bfloat16 if the model is):
    4 bytes a parameter, and for each trained one 4 of gradient and 8 of Adam's state; with ``rank``
    the latter only for r · (N + K) parameters of each layer, while the time stays nearly the same:
    rounds · steps · batch forward and backward passes of one sample.

    Args:
        ratio, pattern, store: see :class:`pumice.prune.PruningRecipe`.
        criterion: "sparsegpt", "wanda" or "magnitude", with its default settings.
        rounds: T.
        steps: of the optimizer, in each round.
        batch: samples that a step averages over.
        learning_rate: of Adam, at its largest: each round starts with a short warm-up and ends at
            zero. With ``rank`` about ten times that of full training.
        rank: 0 to train all weights that are left; otherwise a term B·A of this rank is trained in
            each layer, added to the weights that are left when the round ends.
        objective: "next_token", the language model's own loss (samples must be token ids), or
            "teacher", the KL divergence from the uncompressed model's outputs, of which one more
            forward pass is made for each sample.
        samples: the criterion sees so many of the calibration inputs, the first ones; the training
            sees all.
        seed: of the samples' order.

    Source: Syed, Guo, Sundarapandiyan, "Prune and Tune: Improving Efficient Pruning Techniques for
    Massive Language Models", 2023; the cubic schedule is that of Zhu, Gupta, "To prune, or not to
    prune", 2017.
    """

    name = "prune_and_tune"

    criterion: str = "sparsegpt"
    rounds: int = 4
    steps: int = 64
    batch: int = 4
    learning_rate: float = 1e-4
    rank: int = 0
    objective: Objective = "next_token"
    samples: int = 128
    seed: int = 0

    def validate(self) -> None:
        super().validate()
        who = type(self).__name__
        if self.criterion not in CRITERIA:
            raise ValueError(f"{who}: criterion must be one of {CRITERIA}, not {self.criterion!r}")
        for setting, least in (
            ("rounds", 1), ("steps", 1), ("batch", 1), ("samples", 1), ("rank", 0), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, setting)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{who}: {setting} must be an integer from {least} on, not {value!r}"
                )
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1:
            raise ValueError(f"{who}: learning_rate must be in (0, 1), not {rate!r}")
        if self.objective not in get_args(Objective):
            raise ValueError(
                f"{who}: objective must be one of {get_args(Objective)}, not {self.objective!r}"
            )

    def steps_of_pruning(self) -> list[Recipe]:
        """What is done to the model in each round, in order."""
        shares = [1 - (1 - t / self.rounds) ** 3 for t in range(1, self.rounds + 1)]
        structure = self.structure
        amounts: list[dict[str, Any]] = []
        for share in shares:
            if structure is not None:
                kept = structure.of - int(share * (structure.of - structure.kept) + 0.5)
                pattern = f"{kept}:{structure.of}"
                if kept < structure.of and {"pattern": pattern} not in amounts:
                    amounts.append({"pattern": pattern})
            elif isinstance(self.ratio, Mapping):
                amounts.append({"ratio": {name: r * share for name, r in self.ratio.items()}})
            else:
                amounts.append({"ratio": share * (0.5 if self.ratio is None else self.ratio)})
        return [make_recipe(self.criterion, store="dense", **amount) for amount in amounts]

    def apply(self, task: Task) -> Outcome:
        if is_distributed():
            raise ValueError("PruneAndTune: trains in one process, not in a distributed group")
        data = [] if task.calibration is None else list(task.calibration)
        if not data:
            raise ValueError(
                "compress: PruneAndTune needs calibration data: pass calibration=[inputs of the "
                "model, …]"
            )
        for name, linear in task.layers.items():  # fail before hours of work
            self._check(name, linear)
        student = copy.deepcopy(task.model).float()
        teacher = task.model if self.objective == "teacher" else None
        device = task.settings.device
        if device is not None:
            student = student.to(device)
            teacher = None if teacher is None else copy.deepcopy(teacher).to(device)
        inner = {name: student.get_submodule(name) for name in task.layers}
        linears = {name: m for name, m in inner.items() if isinstance(m, nn.Linear)}
        _part(linears.values())
        recipes = self.steps_of_pruning()
        rounds = Rounds.open(task.settings.resume, self.to_dict(), student, linears, data)
        total = len(recipes) * len(linears)
        tuning = Tuning(self.steps, self.batch, self.learning_rate, self.rank, self.objective)
        for index, recipe in enumerate(recipes):
            if rounds.restore(index, linears):
                task.progress((index + 1) * len(linears), total, f"round {index + 1}")
                continue

            def report(done: int, _: int, name: str, before: int = index * len(linears)) -> None:
                task.progress(before + done, total, name)

            settings = replace(task.settings, device=None, resume=rounds.folder(index))
            pruned = recipe.apply(Task(student, linears, data[: self.samples], report, settings))
            with torch.no_grad():
                for name, linear in linears.items():
                    linear.weight.copy_(weight_of(pruned.replacements[name], torch.float32))
            with evaluation_mode(student), evaluation_mode(task.model):
                tune(
                    student,
                    linears,
                    data,
                    tuning,
                    torch.Generator().manual_seed(self.seed * 1_000_003 + index),
                    teacher=teacher,
                    dtype=next(iter(task.layers.values())).weight.dtype,
                )
            rounds.record(index, linears)
        replacements = {n: self._finished(linear, linears[n]) for n, linear in task.layers.items()}
        measured = measure(task.model, task.layers, replacements, data[:_MEASURED_SAMPLES], None)
        return Outcome(replacements, measured)

    def compress_outside(self, name: str, linear: nn.Linear) -> nn.Module:
        raise NotImplementedError("PruneAndTune prunes a model as a whole")

    def _check(self, name: str, linear: nn.Linear) -> None:
        try:
            self.amount(name, linear)
            self.weight(linear)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error

    def _finished(self, original: nn.Linear, tuned: nn.Linear) -> nn.Module:
        result = dense_layer(original, tuned.weight.to(original.weight.device))
        if original.bias is not None:
            with torch.no_grad():
                result.bias.copy_(tuned.bias)
        return self.layer(result, result.weight)


def _part(linears: Iterable[nn.Linear]) -> None:
    """Layers that share a parameter get their own, as the replacements of all methods do.

    Otherwise it would be trained twice a step, and pruned by the scores of the last one alone.
    """
    seen: set[int] = set()
    for linear in linears:
        for name, parameter in list(linear.named_parameters()):
            if id(parameter) in seen:
                setattr(linear, name, nn.Parameter(parameter.detach().clone()))
            seen.add(id(parameter))
