"""The command line as a user meets it, on a tiny model and text from the standard library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pumice
from pumice import cli
from pumice.integrations.models import load_model
from pumice.nn import Int4Linear, Int8Linear, Int8MixedLinear
from tiny_llama import make_model, make_tokenizer, save_folder

SMALL = ["--text", "pydoc", "--context", "64", "--windows", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_folder(path)
    return path


@pytest.fixture
def run(capsys):
    """Run ``pumice …`` here; returns (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def test_doctor(run):
    code, out, _ = run("doctor")
    assert code == 0
    assert out == f"{pumice.doctor()}\n"


def test_compress_writes_a_checkpoint_that_loads(run, folder, tmp_path):
    out = tmp_path / "small"
    code, printed, _ = run("compress", folder, "--threshold", "2.5", "--out", out)
    assert code == 0
    assert "2 × down_proj" in printed
    assert f"written to {out}" in printed
    model = pumice.load(out)
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(layer, Int8MixedLinear)
    assert layer.threshold == 2.5
    assert isinstance(model.lm_head, torch.nn.Linear)
    _, tokenizer = load_model(out)
    assert tokenizer.decode(tokenizer("naïve text").input_ids) == "naïve text"


def test_settings_of_any_recipe_are_options(run, folder, tmp_path):
    out = tmp_path / "small"
    code, *_ = run(
        *("compress", folder, "--recipe", "int8", "--activations=per_tensor"),
        *("--include", "*.mlp.*", "--exclude", "up_proj", "--exclude", "lm_head", "--out", out),
    )
    assert code == 0
    model = pumice.load(out)
    compressed = {n: m for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    assert {name.rpartition(".")[2] for name in compressed} == {"gate_proj", "down_proj"}
    assert {m.activations for m in compressed.values()} == {"per_tensor"}
    assert run("compress", folder, "--per-element", "--out", tmp_path / "b")[0] == 0
    assert pumice.load(tmp_path / "b").model.layers[0].self_attn.q_proj.per_element is True


@pytest.mark.parametrize(
    ("file_format", "method", "options"),
    [
        ("gptq", "gptq", []),
        ("gptq_v2", "gptq", ["--bits", 8, "--symmetric", "false"]),
        ("awq", "awq", ["--exclude", "*.mlp.*", "--group-size", -1]),
        ("compressed-tensors", "compressed-tensors", ["--group-size", -1]),
    ],
)
def test_formats_of_other_libraries(run, folder, tmp_path, file_format, method, options):
    wide = tmp_path / "wide"  # AWQ needs outputs in eights
    make_model(width=48, head_dim=16).save_pretrained(wide)
    make_tokenizer().save_pretrained(wide)
    settings = ["--recipe", "rtn", "--group-size", 16, *options]
    assert run("compress", wide, *settings, "--out", tmp_path / "ours")[0] == 0
    out = tmp_path / "theirs"
    code, printed, _ = run("compress", wide, *settings, "--format", file_format, "--out", out)
    assert code == 0
    assert f"written to {out}" in printed
    assert not (out / "pumice.json").exists()
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == method
    ours, theirs = pumice.load(tmp_path / "ours"), pumice.load(out)
    assert any(isinstance(layer, Int4Linear) for layer in theirs.modules())
    ids = torch.arange(30).reshape(2, 15)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert run("eval", out, *SMALL)[0] == 0


def test_calibration_shows_in_the_report(run, folder, tmp_path):
    options = ["--calibrate", "pydoc", "--calibration-windows", 1]
    code, out, _ = run("compress", folder, *options, "--out", tmp_path / "a")
    assert code == 0
    assert "outlier columns" in out
    assert "(block " in out
    code, out, _ = run("compress", folder, *options, "--full", "--out", tmp_path / "b")
    assert code == 0
    assert str(pumice.report(pumice.load(tmp_path / "b"))) in out
    layers = pumice.report(pumice.load(tmp_path / "b")).layers
    assert len(layers) == 14
    assert all(layer.relative_error for layer in layers)


def test_a_warning_is_one_line(run, folder, tmp_path):
    options = ["--recipe", "gptq", "--group-size", 16, "--calibrate", "pydoc"]
    code, _, err = run(
        "compress", folder, *options, "--calibration-windows", 1, "--out", tmp_path / "small"
    )
    assert code == 0
    (line,) = [line for line in err.splitlines() if "GPTQ" in line or "Warning" in line]
    assert line.startswith("warning: GPTQ: 128 calibration tokens are few for the 36 inputs of ")
    assert line.endswith("fit the sample less")


def test_eval_prints_what_it_measured(run, folder):
    code, out, err = run("eval", folder, *SMALL)
    assert code == 0
    assert "3 windows of 64 tokens, 189 predicted" in out
    assert "perplexity" in out
    assert "perplexity of" in err  # the bar


def test_eval_json_is_all_there_is_on_standard_output(run, folder, tmp_path):
    assert run("compress", folder, "--out", tmp_path / "small")[0] == 0
    code, out, _ = run("eval", tmp_path / "small", *SMALL, "--baseline", folder, "--json")
    assert code == 0
    base, small = json.loads(out)
    assert base["tokens"] == small["tokens"] == 189
    assert small["bytes"] < base["bytes"]
    assert small["perplexity"] == pytest.approx(base["perplexity"], rel=0.02)
    assert small["perplexity"] != base["perplexity"]


def test_eval_of_one_model_with_speed(run, folder):
    code, out, _ = run("eval", folder, *SMALL, "--speed", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["prefill_tokens_per_second"] > result["decode_tokens_per_second"] > 0
    model, tokenizer = load_model(folder)
    text = pumice.integrations.texts.load_text("pydoc")
    direct = pumice.evaluate.perplexity(model, tokenizer(text).input_ids, context=64, windows=3)
    assert result["perplexity"] == pytest.approx(direct.perplexity)


def test_eval_compares_with_a_baseline(run, folder):
    code, out, _ = run("eval", folder, *SMALL, "--baseline", folder, "--dtype", "bfloat16")
    assert code == 0
    assert "perplexity +0.00% ± 0.00%" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "no-such-model"], "model 'no-such-model' is not a folder"),
        (["eval", "{folder}", "--text", "nowhere.txt"], "text 'nowhere.txt' is neither a file nor"),
        (["eval", "{folder}", "--text", "pydoc", "--context", "1"], "context must be in 2…128"),
        (["eval", "{empty}"], "holds no config.json and 0 .gguf files"),
        (["compress", "{folder}", "--out", "{full}"], "exists and is not empty"),
        (["compress", "{folder}", "--out", "{file}/x"], "cannot write"),
        (["compress", "{folder}", "--out", "x", "--recipe", "gzip"], "unknown recipe 'gzip'"),
        (["compress", "{folder}", "--out", "x", "--treshold", "6"], "has no setting 'treshold'"),
        (["compress", "{folder}", "--out", "x", "--threshold", "-1"], "must be positive"),
        (["compress", "{folder}", "--out", "x", "--threshold", "six"], "threshold"),
        (["compress", "{folder}", "--out", "x", "--include", "*.nope"], "matches none"),
        (["compress", "{folder}", "--out", "x", "--include", "[cli]"], "'[cli]'"),
        (["compress", "{folder}", "--out", "x", "--format", "gptq"], "cannot be written as 'gptq'"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    run, folder, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    names = {"folder": folder, "empty": "empty", "full": "full", "file": "file"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*(argument.format(**names) for argument in arguments))
    lines = [line for line in err.splitlines() if line.startswith("pumice: ")]
    assert code == 1
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_overwrite(run, folder, tmp_path):
    for _ in range(2):
        assert run("compress", folder, "--out", tmp_path / "a", "--overwrite")[0] == 0
    assert run("compress", folder, "--out", tmp_path / "a")[0] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["compress"],
        ["eval"],
        ["eval", "{folder}", "--dtype", "int4"],
        ["compress", "{folder}", "--out", "x", "--format", "gguf"],
    ],
)
def test_a_wrong_command_line_is_exit_code_2(run, folder, arguments):
    code, _, err = run(*(argument.format(folder=folder) for argument in arguments))
    assert code == 2
    assert "Traceback" not in err


def test_help_lists_the_commands_and_recipes(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in ("doctor", "compress", "eval"))
    assert "llm-int8" in run("compress", "--help")[1]


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONUTF8": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra(missing):
    start = f"import sys; sys.modules[{missing!r}] = None; from pumice.cli import main; "
    refused = python(start + "main(['eval', 'x'])")
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        f"pumice: this command needs {missing}, which is not installed"
    )
    assert "pip install 'pumice[cli]'" in refused.stderr
    assert "Traceback" not in refused.stderr
    doctor = python(start + "main(['doctor'])")
    assert doctor.returncode == 0, doctor.stderr
    assert f"pumice        {pumice.__version__}" in doctor.stdout


def test_without_transformers(run, folder, monkeypatch):
    monkeypatch.setattr(pumice.integrations.models.importlib.util, "find_spec", lambda name: None)
    code, _, err = run("eval", folder)
    assert code == 2
    assert "needs transformers: pip install 'pumice[hf]'" in err


def test_as_a_module():
    result = python("import runpy, sys; sys.argv = ['x', 'doctor']; runpy.run_module('pumice')")
    assert result.returncode == 0, result.stderr
    assert f"pumice        {pumice.__version__}" in result.stdout
