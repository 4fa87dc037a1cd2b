"""The report of compress: sizes, and what calibration measures."""

import gc
import weakref

import pytest
import torch
from torch import nn

import pumice
from tiny_lm import BLOCK_LINEARS, IDS, TinyLm, assert_unchanged, state_of


def test_report_counts_bytes():
    model = TinyLm()
    report = pumice.report(pumice.compress(model, pumice.LLMInt8()))
    up = report.layers[0]
    assert (up.name, up.layer, up.in_features, up.out_features) == (
        "blocks.0.up",
        "Int8MixedLinear",
        24,
        72,
    )
    assert up.bytes_before == (24 * 72 + 72) * 4
    assert up.bytes_after == 24 * 72 + 72 * 4 + 72 * 4
    assert report.bytes_before == sum(layer.bytes_before for layer in report.layers)
    assert report.model_bytes_before == sum(p.numel() * 4 for p in model.parameters())
    saved = report.bytes_before - report.bytes_after
    assert report.model_bytes_after == report.model_bytes_before - saved
    assert up.relative_error is None
    assert up.outlier_columns is None


def test_tied_weights_count_once():
    report = pumice.report(pumice.compress(TinyLm(tied=True), pumice.LLMInt8()))
    untied = pumice.report(pumice.compress(TinyLm(), pumice.LLMInt8()))
    assert untied.model_bytes_before - report.model_bytes_before == 50 * 24 * 4


def test_report_is_a_table_and_plain_data():
    result = pumice.compress(TinyLm(), pumice.LLMInt8(), [IDS])
    report = pumice.report(result)
    text = str(report)
    assert text.splitlines()[0] == "llm_int8(threshold=6.0, per_element=False)"
    for name in BLOCK_LINEARS:
        assert name in text
    assert "lm_head (excluded)" in text
    assert "outlier columns" in text
    assert max(map(len, text.splitlines())) < 120
    assert pumice.Report.from_dict(report.to_dict()) == report
    # Columns that were not measured do not appear.
    assert "error" not in str(pumice.report(pumice.compress(TinyLm(), pumice.LLMInt8())))


def test_report_of_an_uncompressed_model():
    with pytest.raises(ValueError, match="this TinyLm has no report"):
        pumice.report(TinyLm())


def test_compressing_in_two_steps_gives_one_report():
    model = pumice.compress(TinyLm(), pumice.LLMInt8(), include="up")
    model = pumice.compress(model, pumice.Int8(), include="down")
    report = pumice.report(model)
    assert {layer.name: layer.layer for layer in report.layers} == {
        name: "Int8MixedLinear" if name.endswith("up") else "Int8Linear" for name in BLOCK_LINEARS
    }
    assert [recipe["name"] for recipe in report.recipes] == ["llm_int8", "int8"]
    assert (
        report.model_bytes_before
        == pumice.report(pumice.compress(TinyLm(), pumice.LLMInt8())).model_bytes_before
    )


# ---- calibration


@pytest.mark.parametrize("sample", [IDS, (IDS,), [IDS, 2.0], {"ids": IDS, "scale": 2.0}])
def test_calibration_measures_each_layer(sample):
    model = TinyLm()
    before = state_of(model)
    report = pumice.report(pumice.compress(model, pumice.LLMInt8(), [sample, sample]))
    for layer in report.layers:
        assert 1e-4 < layer.relative_error < 0.03
    assert_unchanged(model, before)


def test_relative_error_is_that_of_the_layers_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    inputs = [torch.randn(5, 16), torch.randn(9, 16)]
    result = pumice.compress(model, pumice.Int8(activations="per_tensor"), inputs)
    hidden = [torch.tanh(model[0](x)) for x in inputs]
    exact = torch.cat([model[2](h) for h in hidden])
    measured = torch.cat([result[2](h) for h in hidden])
    expected = ((measured - exact).norm() / exact.norm()).item()
    assert pumice.report(result).layers[1].relative_error == pytest.approx(expected, rel=1e-4)


def test_outlier_columns_are_counted():
    model = nn.Sequential(nn.Linear(20, 4))
    first, second = torch.zeros(3, 20), torch.zeros(2, 20)
    first[0, 4] = 6.0
    first[1, 4] = -9.0
    first[2, 11] = 5.99
    second[0, 4] = 7.0
    second[1, 19] = float("nan")
    layer = pumice.report(pumice.compress(model, pumice.LLMInt8(), [first, second])).layers[0]
    assert layer.outlier_columns == 2  # 4 and 19
    assert layer.outlier_fraction == pytest.approx((1 / 20 + 2 / 20) / 2)
    plain = pumice.report(pumice.compress(model, pumice.Int8(), [first])).layers[0]
    assert plain.outlier_columns is None


def test_calibration_runs_in_evaluation_mode_and_restores_the_mode():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    model[2].eval()
    before = state_of(model)
    pumice.compress(model, pumice.LLMInt8(), [torch.randn(6, 8)])
    assert_unchanged(model, before)  # the running statistics above all
    assert [module.training for module in model] == [True, True, False, True]


def test_calibration_keeps_no_activations():
    alive = []

    def inputs():
        for _ in range(4):
            x = torch.randn(3, 16)
            alive.append(weakref.ref(x))
            yield x
            del x
            gc.collect()
            assert sum(ref() is not None for ref in alive[:-1]) == 0

    pumice.compress(nn.Sequential(nn.Linear(16, 4)), pumice.LLMInt8(), inputs())
    assert len(alive) == 4


def test_layers_that_calibration_never_reaches():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    report = pumice.report(pumice.compress(Half(), pumice.LLMInt8(), [torch.randn(2, 8)]))
    assert [layer.relative_error is None for layer in report.layers] == [False, True]


def test_progress():
    calls = []
    pumice.compress(TinyLm(), pumice.LLMInt8(), progress=lambda *call: calls.append(call))
    assert calls == [(i, 4, name) for i, name in enumerate(BLOCK_LINEARS, start=1)]
