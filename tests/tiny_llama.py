"""A transformers model and tokenizer that are made here in no time: random, byte by byte."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte: any text becomes ids below 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_model(*, width: int = 36, head_dim: int = 12, tied: bool = True) -> nn.Module:
    """Odd sizes on purpose: 36 wide, 69 inner, three heads on one."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=69,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def save_folder(folder: Path) -> nn.Module:
    """A transformers folder with both; returns the model."""
    model = make_model()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model
