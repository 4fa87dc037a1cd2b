"""The checker is checked: every planted fault is caught, and the same kernel repaired passes."""

from __future__ import annotations

import re
import threading
import time

import pytest
import torch

from .conftest import Selftest

RACE = "data race on shared memory"
EARLY = "uninitialised shared memory"
IN_FLIGHT = r"cp\.async still in flight"
NO_BARRIER = r"no barrier after the cp\.async wait"

# The name of the kernel in selftest/faults*.cu, and what is said of it. Where the order of threads
# decides what a missing barrier leads to, all of it stands there.
FAULTS = {
    "shared_race": RACE,
    "missing_syncthreads": RACE,
    "overwrite_while_read": RACE,
    "missing_syncwarp": RACE,
    "shuffle_as_barrier": RACE,
    "half_warp_barrier": RACE,
    "read_by_two_warps": RACE,
    "missing_cp_async_wait": IN_FLIGHT,
    "uncommitted_cp_async": IN_FLIGHT,
    "waits_for_too_few_groups": IN_FLIGHT,
    "cp_async_wait_without_barrier": f"{NO_BARRIER}|{RACE}",
    "write_under_cp_async": IN_FLIGHT,
    "cp_async_while_read": f"{RACE}|{IN_FLIGHT}|{NO_BARRIER}",
    "shared_out_of_bounds": "out of bounds of shared memory",
    "uninitialised_shared": EARLY,
    "global_read_out_of_bounds": r"out of bounds of global memory: .* reads 4 bytes at byte 1024",
    "global_read_before_start": r"out of bounds of global memory: .* reads 4 bytes at byte -4",
    "global_write_out_of_bounds": r"out of bounds of global memory: .* writes 4 bytes",
    "cp_async_out_of_bounds": r"out of bounds of global memory: .* reads 16 bytes at byte 1024",
    "write_to_read_only": "write to a read-only tensor",
    "misaligned_vector_load": "misaligned access: 'const struct float4' .* multiple of 16",
    "misaligned_cp_async": r"misaligned access: .* gives cp\.async global memory .* multiple of 16",
    "misaligned_ldmatrix": "misaligned access: .* gives ldmatrix shared memory .* multiple of 16",
    "ldmatrix_of_global": "wrong address space: .* gives ldmatrix",
    "divergent_barrier": r"divergent barrier: .* wait at __syncthreads\(\), threads 5 have left",
    "deadlock": r"deadlock: .* threads 32-47 wait at __syncwarp\(\) with mask 0xffffffff",
    "lane_missing_from_mask": "divergent warp: .* with a mask that does not name its own lane",
    "shuffle_from_absent_lane": "divergent warp: .* from a lane that its mask does not name",
    "mma_in_half_a_warp": r"divergent warp|deadlock: .* wait at mma\.sync",
    "blocks_write_the_same": "data race on global memory",
    "block_reads_what_another_writes": "data race on global memory",
    "block_writes_what_both_read": "data race on global memory",
    "plain_read_beside_atomics": "data race on global memory",
    "last_block_without_acquire": "data race on global memory",
    "last_block_without_fence": "data race on global memory",
    "last_block_without_barrier": "data race on global memory",
    "waits_for_another_block": "deadlock: .* cannot wait for each other",
    "local_array_out_of_bounds": "out of bounds of a local array: index 4",
    "memcpy_out_of_bounds": "out of bounds of shared memory",
    "too_much_shared_memory": "invalid launch",
    "missing_device_guard": "before it opened a DeviceGuard",
    "pointer_of_the_host": "host memory",
}


def run(emulator: Selftest, name: str, repaired: bool) -> torch.Tensor:
    x = torch.arange(1.0, 257.0)
    return emulator("fault", name, repaired, x, torch.zeros(256))


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(emulator: Selftest, seed: int, name: str) -> None:
    with pytest.raises(RuntimeError, match=FAULTS[name]):
        run(emulator, name, repaired=False)


@pytest.mark.parametrize("name", FAULTS)
def test_repaired_kernel_passes(emulator: Selftest, seed: int, name: str) -> None:
    y = run(emulator, name, repaired=True)
    assert y.isfinite().all()  # poison would be NaN
    assert y.any()


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("missing_syncthreads", ["reads .* wrote", "writes .* read"]),
        ("half_warp_barrier", ["reads .* wrote"]),
        ("read_by_two_warps", ["reads .* wrote", "writes .* read"]),
        ("block_writes_what_both_read", ["reads .* wrote", "writes .* read"]),
        ("plain_read_beside_atomics", ["reads .* updated", "updates .* read"]),
        ("cp_async_wait_without_barrier", [NO_BARRIER, r"starts a cp\.async .* read"]),
    ],
)
def test_caught_in_every_order(
    emulator: Selftest, monkeypatch: pytest.MonkeyPatch, name: str, sides: list[str]
) -> None:
    messages = []
    for seed in range(30):
        monkeypatch.setenv("PUMICE_EMULATOR_SEED", str(seed))
        with pytest.raises(RuntimeError) as caught:
            run(emulator, name, repaired=False)
        messages.append(str(caught.value))
    for side in sides:
        assert any(re.search(side, text) for text in messages), side


def test_report_names_both_sides(emulator: Selftest) -> None:
    with pytest.raises(RuntimeError) as caught:
        run(emulator, "overwrite_while_read", repaired=False)
    text = str(caught.value)
    assert len(set(re.findall(r"thread \(\d+,0,0\) of block \(\d,0,0\)", text))) == 2
    assert "overwrite_while_read" in text  # the kernel
    lines = {int(n) for n in re.findall(r"tests/emulator/selftest/faults_threads\.cu:(\d+)", text)}
    assert len(lines) == 2


def test_a_view_ends_where_it_ends(emulator: Selftest) -> None:
    """Though its storage goes on."""
    base, y = torch.arange(1000.0), torch.zeros(256)
    for name, view in [
        ("global_read_before_start", base[64:320]),
        ("global_read_out_of_bounds", base[64:320]),
    ]:
        with pytest.raises(RuntimeError, match=FAULTS[name]):
            emulator.ops.fault(name, False, view, y)
    with pytest.raises(RuntimeError, match="misaligned access"):
        emulator.ops.fault("missing_cp_async_wait", True, base[1:257], y)
    emulator.ops.fault("missing_cp_async_wait", True, base[4:260], y)
    assert torch.equal(y[:64], base[4:260:4])


def test_input_and_output_may_share_a_storage(emulator: Selftest) -> None:
    base = torch.arange(1.0, 513.0)
    emulator.ops.fault("global_write_out_of_bounds", True, base[:256], base[256:])
    assert torch.equal(base[256:384], torch.arange(1.0, 65.0).repeat(2))
    assert torch.equal(base[384:], torch.arange(385.0, 513.0))


def test_tensors_are_untouched_by_a_failed_launch(emulator: Selftest) -> None:
    x, y = torch.arange(256.0), torch.zeros(256)
    with pytest.raises(RuntimeError):
        emulator.ops.fault("global_write_out_of_bounds", False, x, y)
    assert not y.any()
    emulator.ops.fault("global_write_out_of_bounds", True, x, y)
    assert torch.equal(y[:128], torch.arange(64.0).repeat(2))


def test_operating_system_threads_take_turns(emulator: Selftest) -> None:
    """Some run a faulty kernel, some a sound one; each gets its own result."""
    outcomes: list[str] = []

    def work(index: int) -> None:
        for _ in range(5):
            try:
                run(emulator, "shared_race", repaired=index % 2 == 0)
                outcomes.append("sound")
            except RuntimeError as error:
                outcomes.append("caught" if RACE in str(error) else str(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["caught"] * 10 + ["sound"] * 10


def test_speed(emulator: Selftest) -> None:
    """A 256³ product, 256 threads a block, checked access by access."""
    a = torch.randint(-128, 128, (256, 256), dtype=torch.int8)
    y = torch.empty(256, 256, dtype=torch.int32)
    start = time.perf_counter()
    emulator.ops.gemm(a, a, y)
    assert time.perf_counter() - start < 2.0  # 0.05 s on a 2025 server core
    assert torch.equal(y, a.int() @ a.int().T)
