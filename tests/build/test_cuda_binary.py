"""What nvcc made of the kernels: no spills, and the instructions they are about."""

from __future__ import annotations

import re
import subprocess

import pytest

# kernel name (as in the catalogue) -> instructions its machine code must hold, for sm_80 and up.
EXPECTED = {
    "int8_quantize": ["F2I"],
    "int8_gemm": ["IMMA.16832.S8.S8", "HMMA.16816.F32", "LDGSTS", "LDSM"],
    "int8_small_m": ["HMMA.16816.F32"],
    "int4_weight": ["I2F", "STG.E.128"],
    "int4_prepare": ["SHFL.BFLY"],
    "int4_gemm": ["HMMA.16816.F32", "HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4"],
    "sparse24_weight": ["STG.E.128"],
    "sparse24_gemm": [
        "HMMA.SP.16832.F32 ",
        "HMMA.SP.16832.F32.BF16",
        "IMMA.SP.16864.S8.S8",
        "LDGSTS.E.BYPASS",
        "LDSM.16.M88.4",
        "STG.E.128",
    ],
    "sparse24_fp32": ["FFMA", "LDG.E.128", "LDG.E.64", "SHFL.BFLY"],
    "sparse24_bias": ["STG.E.U16"],
    "flash_forward": [
        "HMMA.16816.F32",
        "HMMA.16816.F32.BF16",
        "LDGSTS.E.BYPASS.128",
        "LDSM.16.M88.4",
        "LDSM.16.MT88.4",
        "MUFU.EX2",
        "STG.E.128",
    ],
    "flash_forward_fp32": ["FFMA", "LDS.128"],
    "paged_forward": ["HMMA.16816.F32", "HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128"],
    "paged_forward_bytes": [
        "HMMA.16816.F32",
        "HMMA.16816.F32.BF16",
        "LDGSTS.E.BYPASS.128",
        "LDSM.16.M88.2",
        "LDSM.16.MT88.2",
        "F2FP.F16.E4M3.UNPACK_B",
    ],
    "cache_append": ["F2I.NTZ", "STG.E.U8", "STG.E.128"],
    "cache_copy_blocks": ["LDG.E.128", "STG.E.128"],
    "flash_merge": ["MUFU.EX2"],
    "merge_attention": ["MUFU.EX2"],
    "attention_mask_pack": ["VOTE", "BAR.RED"],
    "attention_align": ["LDG.E.U16", "STG.E.U16"],
    "flash_backward_rows": ["SHFL.BFLY"],
    "flash_backward_keys": [
        "HMMA.16816.F32",
        "HMMA.16816.F32.BF16",
        "LDGSTS.E.BYPASS.128",
        "LDSM.16.M88.4",
        "LDSM.16.MT88.4",
        "MUFU.EX2",
    ],
    "flash_backward_queries": [
        "HMMA.16816.F32",
        "HMMA.16816.F32.BF16",
        "LDGSTS.E.BYPASS.128",
        "LDSM.16.M88.4",
        "LDSM.16.MT88.4",
        "MUFU.EX2",
    ],
    "flash_backward_fp32": ["FFMA", "LDS.128"],
    "sampling": ["LDG.E.128", "ATOMS.ADD", "F2F.F64.F32"],
    "speculative_verify": ["LDG.E.128", "F2F.F64.F32"],
}


# Where functions are not named after the kernel: what their names hold instead.
FUNCTIONS = {"paged_forward": "PagedKeys", "paged_forward_bytes": "PagedBytes"}


def dump(cuobjdump, option, library) -> str:
    return subprocess.run(
        [cuobjdump, option, library], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module")
def machine_code(cuobjdump, cuda_library) -> dict[str, str]:
    """The machine code of each function, by its mangled name, all architectures together."""
    functions: dict[str, list[str]] = {}
    for part in dump(cuobjdump, "-sass", cuda_library).split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        functions.setdefault(name.strip(), []).append(code)
    assert functions
    return {name: "\n".join(parts) for name, parts in functions.items()}


def test_no_kernel_spills(cuobjdump, cuda_library):
    """Neither spills to local memory nor arrays that landed there: STACK and LOCAL are 0."""
    text = dump(cuobjdump, "-res-usage", cuda_library)
    usage = re.findall(r"Function (\S+):\s*\n\s*(.*)", text)
    assert usage
    for name, line in usage:
        values = dict(re.findall(r"(STACK|LOCAL):(\d+)", line))
        assert values == {"STACK": "0", "LOCAL": "0"}, f"{name}: {line}"


def test_every_architecture_is_there(cuobjdump, cuda_library):
    from pumice import _C

    elf = dump(cuobjdump, "-lelf", cuda_library)
    ptx = dump(cuobjdump, "-lptx", cuda_library)
    for architecture in _C.build_info()["cuda_architectures"]:
        number, _, kind = architecture.partition("-")
        assert f"sm_{number}" in (ptx if kind == "virtual" else elf), architecture
        if not kind:  # like "90": machine code and PTX
            assert f"sm_{number}" in ptx or f"compute_{number}" in ptx


@pytest.mark.parametrize("kernel", sorted(EXPECTED))
def test_instructions(machine_code, kernel):
    part = FUNCTIONS.get(kernel, kernel)
    code = "\n".join(text for name, text in machine_code.items() if part in name)
    assert code, f"no function of kernel {kernel} in the library"
    missing = [opcode for opcode in EXPECTED[kernel] if opcode not in code]
    assert not missing, f"{kernel} lacks {missing}"


def test_every_cuda_kernel_has_an_expectation():
    from pumice import _C

    names = {k["name"] for k in _C.kernels() if k["device"] == "cuda"}
    assert names <= set(EXPECTED), f"say in EXPECTED what {names - set(EXPECTED)} must compile to"
