"""The benchmark package: what it measures, keeps and says of it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from bench import attention, cache, int4, int8, outlier_weights, paged, readme, results, sparse24
from bench.cases import Linear, UnavailableError
from bench.machine import Machine, describe
from bench.timing import Timing, copies_beyond_cache, measure

MACHINE = Machine("cpu", "Test CPU 2 threads", 2, 10e9, 1 << 20, None, None)


def row(contender: str, median: float, baseline: float = 8.0) -> results.Row:
    return results.Row("int8", "M=1", contender, median, median, median, 1.0, baseline, ("int8_x",))


def test_timing_orders_fast_and_slow():
    small, large = torch.randn(8, 8), torch.randn(384, 384)
    timings = measure(
        {"slow": lambda i: large @ large, "fast": lambda i: small @ small},
        torch.device("cpu"),
        seconds=0.05,
    )
    assert timings["fast"].median < timings["slow"].median
    for timing in timings.values():
        assert timing.low <= timing.median <= timing.high
        assert timing.calls >= 5


def test_timing_rotates_the_inputs():
    seen: set[int] = set()
    measure({"a": lambda i: seen.add(i)}, torch.device("cpu"), seconds=0.001)
    assert {0, 1, 2, 3, 4} <= seen


def test_median_is_not_the_mean():
    assert Timing.of([1.0, 1.0, 1.0, 100.0, 1.0], 5).median == 1.0


def test_copies_exceed_the_cache():
    assert copies_beyond_cache(16 << 20, 32 << 20) * (16 << 20) >= 2 * (32 << 20)
    assert copies_beyond_cache(1 << 40, 1) == 2


def test_floor_is_the_longer_of_bytes_and_operations():
    gpu = Machine("cuda", "Test", 0, 4e12, 1, 1e15, 2e15)
    assert gpu.floor_us(4_000_000, 0, int8=True) == pytest.approx(1.0)
    assert gpu.floor_us(0, 2_000_000_000, int8=True) == pytest.approx(1.0)
    assert gpu.floor_us(0, 2_000_000_000, int8=False) == pytest.approx(2.0)


def test_this_machine_is_described():
    machine = describe(torch.device("cpu"))
    assert machine.bandwidth > 1e8
    assert machine.cache_bytes > 1 << 15
    assert machine.slug().replace("-", "").isalnum()


def test_int8_bench_measures_every_available_peer():
    told: list[str] = []
    case = Linear(3, 40, 48)
    rows = list(
        int8.BENCH.run([case], MACHINE, torch.device("cpu"), torch.float32, 0.01, told.append)
    )
    names = {r.contender for r in rows}
    assert {"torch", "pumice W8A8", "pumice mixed", "pumice mixed, 0.5 % outliers"} <= names
    assert names | {line.split(" skipped")[0] for line in told} == set(int8.PEERS)
    moved = 40 * 48 + 3 * (40 + 48) * 4
    assert all(r.floor_us == pytest.approx(moved / 10e9 * 1e6) for r in rows)
    for r in rows:
        assert (r.kernels != ()) == r.contender.startswith("pumice")


def test_contenders_compute_the_same_product():
    inputs = int8.make_inputs(Linear(20, 64, 96), MACHINE, torch.device("cpu"), torch.float32)
    reference = int8.PEERS["torch"](inputs)(1)
    for name in ("fbgemm dynamic", "pumice W8A8", "pumice mixed"):
        y = int8.PEERS[name](inputs)(1)
        assert (y - reference).norm() < 0.03 * reference.norm(), name


def test_int4_contenders_compute_the_same_product():
    inputs = int4.make_inputs(Linear(5, 32, 256), MACHINE, torch.device("cpu"), torch.float32)
    scale = inputs.scales[1].repeat_interleave(int4.GROUP, dim=1)
    reference = inputs.x @ ((inputs.q[1].float() - 8) * scale).t()
    compared = 0
    for name in set(int4.PEERS) - {"torch"}:
        try:
            y = torch.as_tensor(int4.PEERS[name](inputs)(1)).reshape(5, 32)
        except UnavailableError:
            continue
        # ggml rounds the weights once more, into groups of its own.
        limit = 0.12 if name.startswith("ggml") else 0.02
        assert (y - reference).norm() < limit * reference.norm(), name
        compared += 1
    assert compared >= 3


ATTENTION = [
    attention.Attention(2, 4, 2, 9, 9, 16, causal=True),
    attention.Attention(1, 2, 2, 1, 40, 16),
    attention.Attention(1, 2, 2, 30, 70, 16, causal=True),
    attention.Attention(1, 4, 4, 70, 70, 16, causal=True, window=5),
    attention.Attention(1, 4, 1, 33, 33, 16, causal=True, backward=True),
]


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_contenders_compute_the_same(case):
    inputs = attention.make_inputs(case, MACHINE, torch.device("cpu"), torch.float32)
    reference = attention.PEERS["torch"](inputs)(1)
    compared = set()
    for name in set(attention.PEERS) - {"torch"}:
        try:
            result = attention.PEERS[name](inputs)(1)
        except UnavailableError:
            continue
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5)
        compared.add(name)
    assert {"pumice", "torch math"} <= compared


def test_attention_counts_what_is_visible():
    case = attention.Attention(2, 8, 4, 5, 9, 16, causal=True, window=2)
    assert str(case) == "B=2 H=8/4 S=5/9 D=16 causal window 2 forward"
    assert case.visible == int(case.mask().sum()) == 5 * 3
    assert case.operations == 2 * 8 * 4 * 16 * 15
    square = attention.Attention(1, 1, 1, 6, 6, 8, causal=True)
    assert square.visible == 21
    assert square.mask() is None  # is_causal says it
    full = attention.Attention(1, 1, 1, 6, 6, 8, backward=True)
    assert full.operations == 4 * 8 * 36 * 3.5


def test_attention_floor_is_that_of_the_peak_or_the_bandwidth():
    gpu = Machine("cuda", "Test", 0, 1e12, 1, 1e15, None)
    long = attention.Attention(1, 16, 16, 16384, 16384, 128)
    assert attention.floor_us(long, gpu, torch.bfloat16) == pytest.approx(long.operations / 1e9)
    decode = attention.Attention(1, 1, 1, 1, 4096, 128)
    moved = 2 * 128 * (1 + 4096) * 2
    assert attention.floor_us(decode, gpu, torch.bfloat16) == pytest.approx(moved / 1e6)


def test_attention_bench_prints_rates(tmp_path):
    told: list[str] = []
    cpu = torch.device("cpu")
    rows = list(attention.BENCH.run(ATTENTION[:1], MACHINE, cpu, torch.float32, 0.01, told.append))
    names = {r.contender for r in rows}
    assert {"torch", "torch math", "pumice"} <= names
    assert names | {line.split(" skipped")[0] for line in told} == set(attention.PEERS)
    for r in rows:
        assert r.tflops == pytest.approx(ATTENTION[0].operations / r.median_us / 1e6)
        assert (r.kernels != ()) == (r.contender == "pumice")
    table = results.markdown(rows)
    assert table.startswith("| TFLOP/s (% of bound, × baseline) | bound | torch |")
    assert f"| {ATTENTION[0]} float32 |" in table
    results.plot(rows, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    path = results.record(MACHINE, "attention", rows, tmp_path)
    assert results.rows_of(results.load(path)[1]["attention"]) == rows


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_attention_cases_have_names_of_their_own(device):
    cases = attention.CASES[device]()
    assert len({str(case) for case in cases}) == len(cases)
    assert any(case.backward for case in cases)
    assert any(case.window >= 0 for case in cases)


def test_record_replaces_only_its_op(tmp_path):
    path = results.record(MACHINE, "int8", [row("torch", 8.0)], tmp_path)
    stored = json.loads(path.read_text())
    stored["ops"]["other"] = stored["ops"]["int8"]
    path.write_text(json.dumps(stored))
    results.record(MACHINE, "int8", [row("pumice", 4.0)], tmp_path)
    _, ops = results.load(path)
    assert [r.contender for r in results.rows_of(ops["int8"])] == ["pumice"]
    assert [r.contender for r in results.rows_of(ops["other"])] == ["torch"]
    assert not list(tmp_path.glob("*.tmp"))


def test_record_keeps_the_digests_of_its_device(tmp_path):
    """CPU and CUDA kernels share names."""
    from pumice import _C

    ran = results.Row("int8", "M=1", "pumice", 1.0, 1.0, 1.0, 1.0, 1.0, ("int8_gemm",))
    _, ops = results.load(results.record(MACHINE, "int8", [ran], tmp_path))
    (cpu,) = (k["digest"] for k in _C.kernels() if (k["name"], k["device"]) == ("int8_gemm", "cpu"))
    assert ops["int8"]["digests"] == {"int8_gemm": cpu}


def test_markdown_and_plot(tmp_path):
    rows = [row("torch", 8.0), row("pumice", 4.0)]
    assert "| M=1 | 1 | 8 (1.00) | 4 (2.00) |" in results.markdown(rows)
    results.plot(rows, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_kernel_changed_since_is_named():
    recorded = {"same": "1", "changed": "2", "gone": "3"}
    present = {"same": "1", "changed": "9"}
    assert readme.changed_kernels(recorded, present) == ["changed", "gone"]


def test_readme_tables_are_those_of_the_recorded_results():
    """After a change to a kernel or a new record: python -m bench readme."""
    assert readme.rewrite(readme.ROOT / "README.md", check=True)


def test_headlines_show_the_best_peer_or_the_rival():
    rows = [row("torch", 8.0), row("slow", 6.0), row("fast", 4.0), row("pumice mixed", 2.0)]
    rows = [dataclasses.replace(r, case="M=1 N=8 K=8 float32") for r in rows]
    others = [dataclasses.replace(r, case="M=2 N=8 K=8 float32") for r in rows]
    (line,) = readme.headlines(rows + others, "int8")  # M=2 is none of the headlines
    assert line == "| int8 mixed, M=1 N=8 K=8 float32 | 1 | 8 | 4 fast | **2** (4.00×) |"
    rows += [
        dataclasses.replace(rows[0], contender="pumice int4", median_us=2.0),
        dataclasses.replace(rows[0], contender="pumice int4 dense", median_us=3.0),
    ]
    (line,) = readme.headlines(rows, "sparse24")
    assert line == (
        "| sparse24 int4, M=1 N=8 K=8 float32 | 1 | 8 | 3 pumice int4 dense | **2** (4.00×) |"
    )


def test_what_the_readme_shows_is_measured():
    """A headline whose cases were renamed would vanish in silence."""
    _, ops = results.load(results.RESULTS / "amd-epyc-2-threads-avx512bf16.json")
    assert set(readme.HEADLINES) == set(ops)
    for op, entry in ops.items():
        rows = results.rows_of(entry)
        for headline in readme.HEADLINES[op]:
            assert any(r.contender == headline.contender for r in rows), (op, headline)
        assert len(list(readme.headlines(rows, op))) >= 4


def test_contenders_that_read_less_have_floors_of_their_own():
    case, machine = Linear(1, 256, 512), MACHINE
    moved = 256 * 512 // 2 + 256 * 4 + 256 * 512 // 8 + 512 + 256 * 4
    assert sparse24.int8_floor_us(case, machine, torch.float32) == pytest.approx(moved / 1e4)
    floors = [
        floor(case, machine, torch.float32)
        for floor in (sparse24.int4_floor_us, sparse24.int8_floor_us, sparse24.floor_us)
    ]
    assert floors == sorted(floors)
    names = {
        r.contender: r.floor_us
        for r in sparse24.BENCH.run(
            [case], machine, torch.device("cpu"), torch.float32, 0.01, lambda _: None
        )
    }
    assert [names[n] for n in ("pumice int4", "pumice int8", "pumice")] == floors


def test_kept_weights_buy_accuracy_and_decomposition_buys_more():
    dequantized, kept, plain = outlier_weights.errors(30.0)
    assert kept < dequantized < plain / 2


@pytest.mark.parametrize(
    "case",
    [
        paged.Paged(2, 4, 2, 48, 16),
        paged.Paged(2, 4, 4, 40, 16, block_size=5),
        paged.Paged(1, 8, 2, 32, 16, stored="fp8"),
        paged.Paged(3, 2, 2, 32, 16, stored="int8"),
    ],
    ids=str,
)
def test_paged_contenders_compute_the_same(case):
    inputs = paged.make_inputs(case, MACHINE, torch.device("cpu"), torch.float32)
    results = {}
    for name, peer in paged.PEERS.items():
        try:
            results[name] = peer(inputs)(1)
        except UnavailableError:
            assert case.stored
    assert len(results) == (2 if case.stored else 3)
    for result in results.values():
        torch.testing.assert_close(result, results["torch"], rtol=1e-4, atol=1e-5)
    assert paged.floor_us(case, MACHINE, torch.float32) == pytest.approx(
        2 * case.batch * case.keys * case.kv_heads * 16 * (1 if case.stored else 4) / 10e9 * 1e6
    )


@pytest.mark.parametrize(
    "case",
    [
        cache.Append(20, 2, 16),
        cache.Append(7, 2, 16, block_size=3, rotary=True),
        cache.Append(20, 2, 16, stored="fp8"),
        cache.Append(20, 2, 16, stored="int8", rotary=True),
        cache.CopyBlocks(3, 4, 2, 8),
        cache.Merge(3, 5, 2, 16),
        cache.MaskPack(2, 128),
    ],
    ids=str,
)
def test_cache_contenders_compute_the_same(case):
    results = []
    for name in cache.PEERS:
        calls = case.make(2, torch.device("cpu"), torch.bfloat16)  # each has caches of its own
        results.append(cache.PEERS[name](calls)(1))
    assert any(x.any() for x in results[0])
    for plain, ours in zip(*results, strict=True):
        tolerance = 0.02 if plain.is_floating_point() else 0  # bytes, bits: equal
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


def test_cache_floors_count_bytes():
    assert cache.Append(4, 2, 16, stored="fp8").moved(torch.bfloat16) == 2 * 4 * 32 * 3 + 8 * 4
    assert cache.CopyBlocks(3, 4, 2, 8).moved(torch.float32) == 4 * 3 * 4 * 16 * 4
    assert cache.MaskPack(1, 128).moved(torch.float32) == 128 * 128 + 128 * 16 + 4
    copy = cache.CopyBlocks(3, 4, 2, 8)
    assert cache.floor_us(copy, MACHINE, torch.float32) == pytest.approx(3072 / 10e9 * 1e6)
