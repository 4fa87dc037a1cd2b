"""Perplexity against a direct computation, sizes against sums, speeds against a slowed model."""

import math
import time

import pytest
import torch
from torch import nn

import pumice
from pumice.evaluate import Perplexity, model_size, perplexity, throughput
from tiny_llama import make_model
from tiny_lm import TinyLm

IDS = torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(3))


class Bigram(nn.Module):
    """Logits that depend on the last token alone: perplexity can be written down."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits[ids]


def test_perplexity_is_exp_of_the_mean_negative_log_likelihood():
    torch.manual_seed(0)
    logits = torch.randn(256, 256)
    result = perplexity(Bigram(logits), IDS, context=300)  # three windows, 100 tokens dropped
    log_p = logits.double().log_softmax(-1)
    windows = IDS[:900].view(3, 300)
    nll = -log_p[windows[:, :-1], windows[:, 1:]]
    assert result.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert result.window_nll == pytest.approx(nll.mean(1).tolist(), rel=1e-5)
    assert result.mean_nll == pytest.approx(math.log(result.perplexity))
    assert (result.context, result.tokens) == (300, 3 * 299)


def test_a_uniform_model_has_its_vocabulary_as_perplexity():
    assert perplexity(Bigram(torch.zeros(256, 256)), IDS).perplexity == pytest.approx(256)


def test_windows_do_not_see_each_other():
    model = make_model()
    together = perplexity(model, IDS, context=100)
    for i, nll in enumerate(together.window_nll):
        alone = perplexity(model, IDS[100 * i : 100 * (i + 1)], context=100)
        assert alone.window_nll == pytest.approx([nll], rel=1e-5)


def test_chosen_windows_are_evenly_spaced():
    every = perplexity(make_model(), IDS, context=100).window_nll
    some = perplexity(make_model(), IDS, context=100, windows=4).window_nll
    assert some == pytest.approx([every[i] for i in (0, 2, 5, 7)])


def test_agrees_with_the_loss_of_transformers():
    model = make_model()
    with torch.no_grad():
        loss = model(IDS[None, :128], labels=IDS[None, :128]).loss
    assert perplexity(model, IDS[:128], context=128).mean_nll == pytest.approx(float(loss))


def test_progress_and_the_model_is_left_in_its_mode():
    model = make_model().train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    calls = []
    perplexity(model, IDS, context=125, on_window=lambda *call: calls.append(call))
    assert calls == [(i + 1, 8) for i in range(8)]
    assert [module.training for module in model.modules()] == modes


def test_bfloat16_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits = torch.randn(256, 256).bfloat16()
    rounded = perplexity(Bigram(logits), IDS).perplexity
    assert rounded == pytest.approx(perplexity(Bigram(logits.float()), IDS).perplexity, rel=1e-6)


def test_nan_and_overflow_are_results_not_errors():
    assert math.isnan(perplexity(Bigram(torch.full((256, 256), torch.nan)), IDS).perplexity)
    wrong = torch.full((256, 256), 1e4)
    wrong[:, IDS] = -1e4
    assert perplexity(Bigram(wrong), IDS).perplexity == math.inf


def test_relative_to_pairs_the_windows():
    def result(nll, context=10):
        mean = sum(nll) / len(nll)
        return Perplexity(math.exp(mean), mean, tuple(nll), context, 9 * len(nll))

    base = result([1.0, 5.0, 3.0])
    ratio, error = result([1.1, 5.1, 3.1]).relative_to(base)
    assert (ratio, error) == (pytest.approx(math.exp(0.1)), pytest.approx(0, abs=1e-12))
    ratio, error = result([1.2, 5.1, 3.0]).relative_to(base)
    assert error == pytest.approx(ratio * 0.1 / math.sqrt(3))
    assert math.isnan(result([1.0]).relative_to(result([1.0]))[1])
    assert all(map(math.isnan, result([math.nan, 1.0, 1.0]).relative_to(base)))
    with pytest.raises(ValueError, match=r"different windows.* 2 × 10 tokens against 3 × 10"):
        result([1.0, 2.0]).relative_to(base)
    with pytest.raises(ValueError, match=r"3 × 11 tokens against 3 × 10"):
        result([1.0, 2.0, 3.0], context=11).relative_to(base)


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        (IDS[:100], {}, ValueError, "100 tokens give 0 windows of 128"),
        (IDS, {"windows": 8}, ValueError, "give 7 windows of 128, but 8 were needed"),
        (IDS, {"windows": 0}, ValueError, "0 were needed"),
        (IDS, {"context": 1}, ValueError, r"context must be in 2…128 tokens, got 1"),
        (IDS, {"context": 129}, ValueError, r"context must be in 2…128 tokens, got 129"),
        (IDS + 200, {}, ValueError, r"vocabulary has 256 entries"),
        (IDS - 1, {}, ValueError, r"lie in -1…254"),
        (IDS.float(), {}, TypeError, r"vector of integers, got shape \(1000,\) and torch.float32"),
        (IDS[None], {}, TypeError, r"got shape \(1, 1000\)"),
    ],
)
def test_perplexity_refuses(ids, options, error, message):
    with pytest.raises(error, match=message):
        perplexity(make_model(), ids, **{"context": 128, **options})


def test_compression_shows_in_perplexity():
    """LLM.int8() stays with the model it came from, on inputs with outliers."""
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] = 40.0  # one feature far above the others
            layer.mlp.gate_proj.weight.mul_(20)
    base = perplexity(model, IDS, context=100)
    mixed = perplexity(pumice.compress(model, pumice.LLMInt8()), IDS, context=100)
    naive = pumice.Int8(activations="per_tensor", weights="per_tensor")
    crushed = perplexity(pumice.compress(model, naive), IDS, context=100)
    error = abs(mixed.relative_to(base)[0] - 1)
    assert error < 0.01
    assert abs(crushed.relative_to(base)[0] - 1) > 3 * error


def test_throughput_counts_tokens_per_second():
    class Slowed(type(make_model())):
        def forward(self, input_ids, **options):
            time.sleep(0.04)
            return super().forward(input_ids, **options)

    model = make_model()
    model.__class__ = Slowed
    calls = []
    speed = throughput(
        model, IDS, prefill=50, decode=4, repeats=3, on_repeat=lambda *call: calls.append(call)
    )
    assert 0 < speed.prefill < 50 / 0.04
    assert 0 < speed.decode < 1 / 0.04
    assert speed.prefill == sorted(speed.prefill_samples)[1]
    assert len(speed.decode_samples) == 3
    assert (speed.prefill_tokens, speed.decode_tokens) == (50, 4)
    assert calls == [(i + 1, 4) for i in range(4)]


def test_decoding_is_greedy_and_uses_the_cache():
    """What is timed is what generate does."""
    seen = []

    class Recorded(type(make_model())):
        def forward(self, input_ids, **options):
            seen.append(input_ids.clone())
            return super().forward(input_ids, **options)

    model = make_model()
    expected = model.generate(
        IDS[None, :20], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    model.__class__ = Recorded
    throughput(model, IDS, prefill=20, decode=5, repeats=1, warmup=0)
    assert [tuple(ids.shape) for ids in seen] == [(1, 20)] + [(1, 1)] * 5
    assert torch.cat(seen, 1)[0].tolist() == expected[0, :25].tolist()


@pytest.mark.parametrize("name", ["prefill", "decode", "repeats"])
def test_throughput_refuses(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        throughput(make_model(), IDS, **{name: 0})
    with pytest.raises(ValueError, match="prefill needs 2000 tokens, got 1000"):
        throughput(make_model(), IDS, prefill=2000)


def test_size_counts_tied_weights_once():
    loose, tied = TinyLm(), TinyLm(tied=True)
    assert model_size(loose) == sum(4 * p.numel() for p in loose.parameters())
    assert model_size(loose) - model_size(tied) == 4 * tied.lm_head.weight.numel()


def test_size_is_of_the_storage_that_is_kept_alive():
    module = nn.Module()
    whole = torch.zeros(100)
    module.register_buffer("slice", whole[:10])
    assert model_size(module) == 400


def test_size_of_a_compressed_model_is_its_report():
    model = pumice.compress(make_model(), pumice.LLMInt8())
    assert model_size(model) == pumice.report(model).model_bytes_after
    assert model_size(model) < model_size(make_model())
