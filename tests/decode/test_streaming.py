"""StreamingLLM: the same as the paper's form of it, for ever, in the same memory."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from forward_passes import alone, prompts
from plain_models import PlainLm
from streaming_cases import TOKENS, assert_close, of_family, of_the_paper, rope, stream_of

from decoders import GPT_OSS, build
from pumice.decode import CachePool
from pumice.decode.model import PagedModel
from pumice.decode.request import SamplingParams
from pumice.decode.rotary import Rotary, find_rotary
from pumice.decode.stream_perplexity import recomputed_perplexity, stream_perplexity
from pumice.decode.streaming import StreamingModel
from pumice.evaluate import perplexity

# Pairs apart and side by side; all of a head or a part of it; sinks that were learned, softcap;
# frequencies that are scaled, by what does not depend on the length of the text.
FAMILIES = {
    "llama": lambda: build("llama"),
    "qwen2": lambda: build("qwen2"),
    "pythia": lambda: build("pythia"),
    "cohere": lambda: of_family("Cohere"),
    "gpt-oss": lambda: of_family("GptOss", **GPT_OSS, layer_types=["full_attention"] * 2),
    "yarn": lambda: of_family(
        "Llama", **rope("yarn", factor=4.0, original_max_position_embeddings=32)
    ),
}
# sinks, window, block_size, chunk
SHAPES = [
    (4, 12, 4, 7),
    (0, 5, 3, 1),
    (3, 8, 16, 100),
    (5, 1, 2, 9),
    (4, 200, 16, 33),
    (9, 4, 1, 3),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_keys_turned_once_are_keys_turned_by_their_place(name, shape):
    model = FAMILIES[name]()
    stream = stream_of(model, *shape)
    ours = [stream.forward(TOKENS[a:b]) for a, b in ((0, 50), (50, 53), (53, 54), (54, 90))]
    assert_close(torch.cat(ours), of_the_paper(model, *shape[:2], TOKENS, name == "cohere"))
    assert stream.length == 90


def test_as_long_as_everything_fits_it_is_dense():
    model = build("llama")
    expected = alone(model, TOKENS)
    out = stream_of(model, 4, 30).forward(TOKENS)
    assert_close(out[:34], expected[:34])
    assert not torch.allclose(out[34:], expected[34:], rtol=1e-3, atol=1e-3)
    assert_close(stream_of(model, 4, 86).forward(TOKENS), expected)
    assert_close(stream_of(model, 0, 90).forward(TOKENS), expected)


def test_only_the_last_logits():
    model = build("qwen2")
    whole, last = (stream_of(model, 2, 9, chunk=chunk) for chunk in (5, 8))
    expected = whole.forward(TOKENS[:40])[-1:]
    assert_close(last.forward(TOKENS[:40], last=True), expected)
    assert_close(last.forward(TOKENS[40:41], last=True), whole.forward(TOKENS[40:41]))


@pytest.mark.parametrize("start", [10**5, 10**7, 10**9])
def test_far_away_is_as_good_as_near(start):
    """Once the cache is full the logits depend on what is in it, not on how far the text is."""
    model = build("llama")
    near, far = stream_of(model, 4, 8), stream_of(model, 4, 8)
    for stream in (near, far):
        stream.forward(TOKENS[:4])
    far.length += start
    poison_free = far.pool.key_caches + far.pool.value_caches
    for cache in poison_free:  # the place that a stream so long would have filled long ago
        cache.nan_to_num_(0)
    # What was computed while the windows filled is forgotten after as many windows as layers.
    ours, theirs = far.forward(TOKENS[4:]), near.forward(TOKENS[4:])
    assert_close(ours[40:], theirs[40:])


def test_angles_far_away():
    inv_freq = 1.0 / 10000.0 ** (torch.arange(32, dtype=torch.float64) / 32)
    turn = Rotary(inv_freq, interleaved=False)
    base = 10_000_019
    q, k = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).unbind()
    at = torch.tensor([base, base - 1000, base - 5])
    back = at - base + 2000
    far = turn.rotate(q[:, None], turn.angles(at)), turn.rotate(k[:, None], turn.angles(at))
    near = (
        turn.rotate(q[:, None], turn.angles(back)),
        turn.rotate(k[:, None], turn.angles(back)),
    )
    scores = [torch.einsum("qhd,khd->qk", *pair) for pair in (far, near)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-4)
    # In float32 the angles themselves are off by more than that.
    single = at.float()[:, None] * inv_freq.float()
    assert (single.double() - at.double()[:, None] * inv_freq).abs().max() > 1e-2


def test_memory_and_work_do_not_grow():
    model = build("llama")
    stream = stream_of(model, 4, 20, block_size=4, chunk=6)
    blocks = 1 + (20 + 6 - 2) // 4 + 2
    assert stream.pool.num_blocks == blocks
    bytes_before = stream.pool.nbytes
    widths, lengths = set(), set()
    batch_of = stream._batch

    def noting(ids):
        batch = batch_of(ids)
        widths.add(batch.block_table.shape[1])
        lengths.add(int(batch.seq_lens))
        assert int(batch.slot_mapping.max()) < blocks * 4
        assert int(batch.block_table.max()) < blocks
        return batch

    stream._batch = noting
    for piece in itertools.islice(itertools.cycle(prompts(6, 1, 3, 11, 6)), 100):
        assert stream.forward(piece).isfinite().all()
    assert stream.length == 20 * 27
    assert max(widths) <= blocks - 1
    assert max(lengths) <= (blocks - 1) * 4
    assert stream.pool.nbytes == bytes_before


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_cache_of_bytes(cache_dtype):
    model = build("llama")
    stream = stream_of(model, 4, 12, cache_dtype=cache_dtype)
    expected = of_the_paper(model, 4, 12, TOKENS)
    error = stream.forward(TOKENS).double() - expected
    assert 1e-4 * expected.norm() < error.norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype):
    model = build("llama")
    expected = of_the_paper(model, 4, 12, TOKENS)
    ours = stream_of(copy.deepcopy(model).to(dtype), 4, 12).forward(TOKENS)
    # As far from exact as a dense pass in these bits is from an exact dense pass.
    dense = alone(copy.deepcopy(model).to(dtype), TOKENS).double()
    allowed = (dense - alone(model, TOKENS).double()).norm()
    assert (ours.double() - expected).norm() < 2 * allowed


def test_plain_torch():
    model = PlainLm()
    assert_close(stream_of(model, 4, 86).forward(TOKENS), model.alone(TOKENS), 1e-4)
    rotaries = find_rotary(PagedModel(model), 90)
    assert all(found.interleaved for found in rotaries)


def test_layers_without_positions():
    model = of_family("SmolLM3", no_rope_layers=[1, 0])
    rotaries = find_rotary(PagedModel(model), 90)
    assert rotaries[0] is not None
    assert rotaries[1] is None
    assert_close(stream_of(model, 4, 86).forward(TOKENS), alone(model, TOKENS))


def test_generation_without_end():
    model = build("llama")
    params = SamplingParams(temperature=0.8, top_k=20, seed=5)
    stream = stream_of(model, 4, 12)
    tokens = list(itertools.islice(stream.generate(TOKENS[:9], params), 60))
    again = stream_of(model, 4, 12)
    assert list(itertools.islice(again.generate(TOKENS[:9], params), 60)) == tokens
    assert stream.length == 9 + 59  # the last one was given, not read
    greedy = stream_of(model, 4, 12)
    told = list(itertools.islice(greedy.generate(TOKENS[:9]), 40))
    expected = of_the_paper(model, 4, 12, TOKENS[:9] + told[:-1])[8:].argmax(-1)
    assert told == expected.tolist()
    assert len(set(tokens)) > 5


def test_an_error_leaves_the_stream_as_it_was():
    model = build("llama")
    stream = stream_of(model, 4, 12)
    stream.forward(TOKENS[:20])
    with pytest.raises(IndexError):
        stream.forward([3, 61])
    assert stream.length == 20
    assert_close(stream.forward(TOKENS[20:30]), of_the_paper(model, 4, 12, TOKENS[:30])[20:])
    stream.reset()
    assert_close(stream.forward(TOKENS[:20]), of_the_paper(model, 4, 12, TOKENS[:20]))


def alibi_like():
    """A model whose keys carry their position in another way: a bias that grows."""

    class Growing(PlainLm):
        def rotate(self, states, positions):
            return states * (1 + 0.01 * positions[:, None, None])

    return Growing()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("gpt2"), "GPT2LMHeadModel: queries and keys of layer 0 at other positions"),
        (alibi_like, "Growing: queries and keys of layer 0"),
    ],
)
def test_models_that_cannot_stream(make, message):
    with pytest.raises(NotImplementedError, match=message):
        StreamingModel(make(), sinks=4, window=12)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sinks": -1}, "sinks must be at least 0, not -1"),
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"chunk": 0}, "chunk must be at least 1, not 0"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        StreamingModel(build("llama"), **sizes)


def test_bad_tokens():
    stream = stream_of(build("llama"), 4, 12)
    for tokens in ([], [[1, 2]]):
        with pytest.raises(ValueError, match=r"tokens must be one or more, \[n\], not"):
            stream.forward(tokens)
    with pytest.raises(ValueError, match="tokens must be one or more"):
        next(stream.generate([]))


def test_perplexity_of_a_stream():
    model = build("llama")
    dense = stream_perplexity(model, TOKENS, window=None, chunk=16)
    exact = perplexity(model, TOKENS, context=90)
    assert dense.mean_nll == pytest.approx(exact.mean_nll, rel=1e-5)
    assert dense.tokens == 89
    assert dense.places.tolist() == list(range(1, 90))
    assert dense.seconds > 0
    ours = stream_perplexity(model, TOKENS, sinks=4, window=12, chunk=16)
    logits = of_the_paper(model, 4, 12, TOKENS[:-1])
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(TOKENS[1:]), reduction="none")
    torch.testing.assert_close(ours.token_nll, losses.float(), rtol=1e-4, atol=1e-4)
    assert ours.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert ours.between(20, 31) == pytest.approx(losses[19:30].mean().exp().item(), rel=1e-5)
    assert ours.at(torch.tensor([1, 89])) == pytest.approx(
        losses[[0, 88]].mean().exp().item(), rel=1e-5
    )
    assert ours.cache_bytes < dense.cache_bytes
    assert ours.cache_bytes == CachePool.bytes_per_block(model) * (1 + (12 + 16 - 2) // 16 + 2)


def test_perplexity_with_recomputation():
    model = build("llama")
    ours = recomputed_perplexity(model, TOKENS, window=20, every=7)
    places = range(20, 90, 7)
    losses = [
        -alone(model, TOKENS[i - 20 : i])[-1].log_softmax(-1)[TOKENS[i]].item() for i in places
    ]
    assert ours.token_nll.tolist() == pytest.approx(losses, rel=1e-4)
    assert ours.places.tolist() == list(places)
    with pytest.raises(ValueError, match="more than window = 90"):
        recomputed_perplexity(model, TOKENS, window=90)
    with pytest.raises(ValueError, match="tokens must be two or more"):
        stream_perplexity(model, [1])
