"""Models with the shapes of the paper's, random weights and random text: for timing, nothing has to be downloaded."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from patch.data import TokenSet
from patch.methods import Learned
from patch.models import vocabulary_size

SHAPES: dict[str, PreTrainedConfig] = {
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "llama-2-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    ),
}  # fmt: skip


def random_model(shape: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A causal LM of one of SHAPES, frozen, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype, attn_implementation="sdpa")
    return model.requires_grad_(False).eval()


def random_tokens(model: PreTrainedModel, length: int, samples: int = 8) -> TokenSet:
    """Sequences of random tokens of the model's vocabulary: int32 [samples, length]."""
    ids = torch.randint(vocabulary_size(model), (samples, length), generator=torch.Generator().manual_seed(0))
    return TokenSet(ids.int(), {"source": "random"})


def without_priors(method: Learned) -> Learned:
    """The method from random logits: no one-shot masks have to be made first."""
    strengths = ("pattern_prior_strength", "tile_prior_strength")
    return method.model_copy(update={name: 0.0 for name in strengths if hasattr(method, name)})
