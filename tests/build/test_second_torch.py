"""The same built libraries under another torch.

Another torch is a download of gigabytes, so this runs only when asked:

    PUMICE_SECOND_TORCH=torch==2.14.1 pytest tests/build/test_second_torch.py
"""

from __future__ import annotations

import os
import subprocess
import venv

import pytest

WANTED = os.environ.get("PUMICE_SECOND_TORCH")

PROGRAM = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import pumice
x = torch.randn(40, 96)
q, scale, _ = pumice.ops.int8_quantize(torch.randn(24, 96))
y = pumice.ops.int8_mixed_linear(x, q, scale)
assert (y - x @ (q * scale[:, None]).t()).norm() / y.norm() < 0.02
fused = torch.compile(pumice.ops.int8_mixed_linear, fullgraph=True, backend="aot_eager")
assert torch.equal(fused(x, q, scale), y)
z = torch.randn(2, 9, 4, 16, requires_grad=True)
a = pumice.ops.flash_attention(z, z, z, causal=True)
plain = torch.nn.functional.scaled_dot_product_attention(*[z.transpose(1, 2)] * 3, is_causal=True)
assert torch.allclose(a, plain.transpose(1, 2), atol=1e-5)
a.sum().backward()
assert z.grad is not None
if torch.version.cuda:
    from pumice.ops import _library
    assert "cuda" in _library.devices, _library.cuda_unavailable
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in (
        "int8_quantize", "int8_linear", "int8_mixed_linear", "flash_attention",
        "flash_attention_backward", "merge_attention", "attention_mask_pack",
    ):
        assert registered(f"pumice::{op}", "CUDA"), op
print("ran beside", torch.__version__)
"""


@pytest.mark.skipif(WANTED is None, reason="PUMICE_SECOND_TORCH names no other torch to install")
def test_same_binary_beside_another_torch(tmp_path, module):
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", WANTED, "numpy"], check=True)
    # The package as it is installed: Python files from the tree in an editable install.
    package = tmp_path / "package" / "pumice"
    source = os.path.dirname(__import__("pumice").__file__)
    subprocess.run(["cp", "-r", source, package], check=True)
    subprocess.run(["cp", "-r", module.parent / "lib", module, package], check=True)
    done = subprocess.run(
        [python, "-c", PROGRAM, package.parent], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "ran beside" in done.stdout
