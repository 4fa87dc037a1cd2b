"""Checkpoints appear whole or not at all."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
from torch import nn

import pumice
from pumice import _files, _tensors
from saved_model import assert_same_bits, make_model, save_model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parents_are_created_and_the_mode_is_the_usual_one(tmp_path):
    save_model(tmp_path / "a/b/m")
    (tmp_path / "ordinary").mkdir()
    assert (tmp_path / "a/b/m").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["m"]


def test_an_empty_folder_is_fine_and_a_full_one_needs_overwrite(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    save_model(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("left over")
    model = pumice.compress(make_model(), pumice.Int8())
    with pytest.raises(FileExistsError, match=r"m exists and is not empty.*overwrite=True"):
        pumice.save(model, folder)
    pumice.save(model, folder, overwrite=True)
    assert set(contents(folder)) == {"model.safetensors", "pumice.json", "notes.txt"}
    assert_same_bits(pumice.load(folder, make_model()), model)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "m").write_text("a file")
    with pytest.raises(FileExistsError, match="m is a file; pass the name of a folder"):
        save_model(tmp_path / "m")
    with pytest.raises(OSError, match=r"cannot write .*m/below"):
        save_model(tmp_path / "m/below")
    assert (tmp_path / "m").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match=r"cannot write .*locked/m"):
        save_model(tmp_path / "locked/m")


def test_a_file_system_that_takes_no_folders():
    with pytest.raises(OSError, match=r"cannot write /proc/pumice/m"):
        save_model(Path("/proc/pumice/m"))


FAILURES = {
    "disk full while writing tensors": (safetensors.torch, "save_file"),
    "no rename": (os, "rename"),
    "no sync": (os, "fsync"),
    "no digest": (_tensors, "sha256_of"),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch, failure, existing):
    folder = tmp_path / "parent/m"
    model = pumice.compress(make_model(), pumice.LLMInt8())
    if existing:
        pumice.save(model, folder)
        before = contents(folder)

    def fail(*args, **kwargs):
        if failure.startswith("disk full"):
            Path(args[1]).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*FAILURES[failure], fail)
        with pytest.raises(OSError, match=r"cannot write .*/m: No space left on device"):
            pumice.save(pumice.compress(make_model(), pumice.Int8()), folder, overwrite=True)
    if existing:
        assert contents(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == ["m"]
    else:
        assert list(tmp_path.iterdir()) == []


def test_the_old_checkpoint_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    save_model(folder)
    before = contents(folder)
    real_rename = os.rename

    def rename(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        pumice.save(pumice.compress(make_model(), pumice.Int8()), folder, overwrite=True)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_process_killed_while_saving_leaves_no_checkpoint(tmp_path):
    script = """
        import os, signal, sys, torch, pumice, safetensors.torch
        from torch import nn
        write = safetensors.torch.save_file
        def killed(*args, **kwargs):
            write(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        safetensors.torch.save_file = killed
        pumice.save(pumice.compress(nn.Linear(4, 4), pumice.LLMInt8()), sys.argv[1])
    """
    folder = tmp_path / "m"
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)], check=False
    )
    assert process.returncode == -9
    assert not folder.exists()


def test_the_tokenizer_is_saved_along(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")

    pumice.save(
        pumice.compress(make_model(), pumice.LLMInt8()), tmp_path / "m", tokenizer=Tokenizer()
    )
    assert (tmp_path / "m/tokenizer.json").exists()


def test_what_cannot_be_stored_is_named(tmp_path):
    model = make_model(device="meta")
    with pytest.raises(ValueError, match=r"'0\.weight' is on 'meta'"):
        pumice.save(model, tmp_path / "m")

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"step": 3}

    with pytest.raises(ValueError, match=r"'_extra_state' is a dict, not a tensor"):
        pumice.save(Extra(3, 3), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_new_folder_keeps_links(tmp_path):
    """A link to a folder stays a link; what it points to is replaced."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with _files.new_folder(tmp_path / "link", overwrite=False) as draft:
        (draft / "x").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/x").read_text() == "1"
