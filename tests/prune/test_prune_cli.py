"""Pruning from the command line."""

import pytest
import torch
from torch import nn

import pumice
from pumice import cli

pytest.importorskip("typer", reason="pumice[cli] is not installed")
pytest.importorskip("transformers", reason="pumice[hf] is not installed")
from tiny_llama import save_folder

CALIBRATE = ["--calibrate", "pydoc", "--calibration-windows", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_folder(path)
    return path


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


@pytest.mark.parametrize(
    ("options", "share"),
    [
        (["--recipe", "magnitude", "--ratio", 0.3], 0.3),
        (["--recipe", "wanda", "--ratio", 0.6, *CALIBRATE], 0.6),
        (["--recipe", "sparsegpt", *CALIBRATE], 0.5),
        (
            ["--recipe", "prune-and-tune", "--ratio", 0.7, "--rounds", 1, "--steps", 1, *CALIBRATE],
            0.7,
        ),
    ],
)
def test_a_ratio(run, folder, tmp_path, options, share):
    out = tmp_path / "pruned"
    code, printed, error = run("compress", folder, *options, "--out", out)
    assert code == 0, error
    assert "zeros" in printed
    model = pumice.load(out)
    weight = model.get_submodule("model.layers.1.mlp.down_proj").weight
    assert float((weight == 0).float().mean()) == pytest.approx(share, abs=0.02)
    assert all(
        row.sparsity == pytest.approx(share, abs=0.02) for row in pumice.report(model).layers
    )


def test_ratios_by_name(run, folder, tmp_path):
    out = tmp_path / "pruned"
    ratios = "{'*.mlp.*': 0.2, '*': 0.8}"
    code, *_ = run("compress", folder, "--recipe", "magnitude", "--ratio", ratios, "--out", out)
    assert code == 0
    for row in pumice.report(pumice.load(out)).layers:
        assert row.sparsity == pytest.approx(0.2 if ".mlp." in row.name else 0.8, abs=0.01)


def test_a_pattern_kept_dense(run, folder, tmp_path):
    out = tmp_path / "pruned"
    options = ["--pattern", "2:3", "--store", "dense", *CALIBRATE]
    code, *_ = run("compress", folder, "--recipe", "wanda", *options, "--out", out)
    assert code == 0
    layer = pumice.load(out).get_submodule("model.layers.0.mlp.up_proj")
    assert type(layer) is nn.Linear
    assert bool(((layer.weight != 0).unflatten(1, (-1, 3)).sum(2) == 2).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "wanda", "--ratio", "1.5", *CALIBRATE], r"must be in [0, 1), not 1.5"),
        (["--recipe", "wanda", "--pattern", "2:5", *CALIBRATE], "needs a multiple of 5 inputs"),
        (["--recipe", "sparsegpt"], "needs calibration data"),
        (["--recipe", "sparsegpt", "--share", "0.5"], "has no setting 'share'"),
    ],
)
def test_refusals_are_one_line(run, folder, tmp_path, options, message):
    code, _, error = run("compress", folder, *options, "--out", tmp_path / "pruned")
    assert code == 1
    assert message in " ".join(error.split())
    assert not (tmp_path / "pruned").exists()


def test_the_pruned_model_answers(run, folder, tmp_path):
    out = tmp_path / "pruned"
    assert run("compress", folder, "--recipe", "magnitude", "--out", out)[0] == 0
    code, printed, _ = run("eval", out, "--text", "pydoc", "--context", 64, "--windows", 2)
    assert code == 0
    assert "perplexity" in printed
    assert torch.isfinite(pumice.load(out)(torch.arange(12)[None]).logits).all()
