"""gpt-oss's attention: learned sinks, and a window in every other layer.

``python -m demo.gpt_oss`` builds transformers' GptOssForCausalLM with the published attention of
gpt-oss-20b (64 heads on 8 of key and value, head dim 64, sinks, a window of 128 tokens in every
other layer, yarn) and random weights. What is beside the attention is cut to a size that fits a
laptop: layers, experts, vocabulary. transformers' "eager" attention, plain torch with the whole
matrix of scores, is the reference for ``attn_implementation="pumice"``: the prompt's logits must
agree, and so must every token generated from the cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM

import pumice.integrations.transformers  # noqa: F401  registers attn_implementation="pumice"
from pumice import _console

# https://huggingface.co/openai/gpt-oss-20b/blob/main/config.json
PUBLISHED = {
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
}
CUT = {
    "intermediate_size": 256,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "vocab_size": 1024,
}
TOLERANCE = 1e-4  # of the logits' largest magnitude, in float32


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = GptOssConfig(
        **PUBLISHED, **CUT, num_hidden_layers=options.layers, attn_implementation="eager"
    )
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:  # at its start a sink is near 0: give each another weight
            layer.self_attn.sinks.normal_(0.0, 2.0)
            layer.self_attn.q_proj.weight.mul_(3.0)
    ids = torch.randint(0, config.vocab_size, (1, options.tokens))

    eager, eager_tokens, eager_times = run(model, ids, options.generate)
    model.set_attn_implementation("pumice")
    ours, our_tokens, our_times = run(model, ids, options.generate)

    difference = ((ours - eager).abs().max() / eager.abs().max()).item()
    statements = [
        (
            f"the same logits: largest difference {difference:.1e} of their magnitude (at most "
            f"{TOLERANCE:.0e})",
            difference <= TOLERANCE,  # NaN is a no
        ),
        (
            f"the same {options.generate} tokens from the cache",
            torch.equal(our_tokens, eager_tokens),
        ),
    ]
    console = _console.output()
    console.print(
        f"gpt-oss-20b's attention, random weights, {options.layers} layers, {options.tokens} "
        f"tokens, float32, {torch.get_num_threads()} threads"
    )
    for name, (prompt, generation) in (("eager", eager_times), ("pumice", our_times)):
        console.print(f"{name:>7}: prompt {prompt:6.2f} s, generation {generation:6.2f} s")
    for statement, holds in statements:
        console.print(f"{'yes' if holds else 'NO '}  {statement}")
    return 0 if all(holds for _, holds in statements) else 1


@torch.no_grad()
def run(model: nn.Module, ids: Tensor, count: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """The prompt's logits, the tokens that follow greedily, and the seconds of either."""
    start = time.perf_counter()
    output = model(ids, use_cache=True)
    logits = output.logits
    read = time.perf_counter()
    tokens = [logits[:, -1:].argmax(-1)]
    while len(tokens) < count:
        output = model(tokens[-1], past_key_values=output.past_key_values, use_cache=True)
        tokens.append(output.logits[:, -1:].argmax(-1))
    return logits, torch.cat(tokens, dim=1), (read - start, time.perf_counter() - read)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.gpt_oss", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--generate", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
