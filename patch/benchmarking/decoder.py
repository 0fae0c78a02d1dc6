"""A transformers model of the Llama kind over a static cache, with as few and as large kernels as PyTorch makes.

For both sides of a comparison. Linear layers, norms and activations are the model's own modules, and so a dense and a
hybrid model run the same code around their products. What lies between two products is one function each: compiled, one
kernel or two, where transformers' eager model launches a dozen. These functions take tensors only, so that one compiled
version serves all blocks and all models of a shape, where compiling a whole model takes minutes for each. A block is
cut before the sum of its residual stream, which the next norm then belongs to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from patch.artefacts import PatchError
from patch.kernels.attention import decode_attention

MODE = "max-autotune-no-cudagraphs"
"""Of `torch.compile`: dense products by the fastest of cuBLAS and Triton. Graphs are captured by `replay`."""
ARCHITECTURES = ("llama", "qwen2")
VERSIONS = 64
"""Compiled versions of one function: a linear layer has one for every shape and number of tokens."""


class Decoder:
    """Logits of the next token, from tokens at positions whose predecessors the cache holds."""

    def __init__(self, model: PreTrainedModel, batch: int, capacity: int, *, compiled: bool):
        """capacity: positions that the cache has room for. compiled: by `torch.compile`; compiles the model's dense
        linear layers in place. Raises PatchError for models that are built in another way."""
        if model.config.model_type not in ARCHITECTURES:
            raise PatchError(
                f"model {model.name_or_path or type(model).__name__}: generation is timed for "
                f"{' and '.join(ARCHITECTURES)} models, this one is {model.config.model_type}."
            )
        decoder: Any = model.model
        self._model: Any = model
        self._blocks = list(decoder.layers)
        self._embed, self._rotary, self._norm = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
        attention = self._blocks[0].self_attn
        config = model.config
        size = (batch, config.num_key_value_heads, capacity, attention.head_dim)
        self._caches = [
            tuple(torch.zeros(size, dtype=model.dtype, device=model.device) for _ in range(2)) for _ in self._blocks
        ]
        self._add_and_normalise: Callable[..., Any] = add_and_normalise
        self._rotate_and_store: Callable[..., Any] = rotate_and_store
        self._gate: Callable[..., Any] = gate
        if compiled:
            torch._dynamo.config.recompile_limit = VERSIONS
            options: dict[str, Any] = {"mode": MODE, "dynamic": False, "fullgraph": True}
            self._add_and_normalise = torch.compile(add_and_normalise, **options)
            self._rotate_and_store = torch.compile(rotate_and_store, **options)
            self._gate = torch.compile(gate, **options)
            product = torch.compile(multiply, **options)
            for module in model.modules():
                if type(module) is nn.Linear:
                    module.forward = functools.partial(product, module)  # type: ignore[method-assign]

    @torch.no_grad()
    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids: [batch, tokens]; positions: int64 [tokens], one position, or all from 0 -> logits [batch, vocabulary]
        of the last token."""
        residual = self._embed(ids)
        update = torch.zeros_like(residual)
        cos, sin = self._rotary(residual, positions.unsqueeze(0))
        for block, cache in zip(self._blocks, self._caches, strict=True):
            residual, x = self._add_and_normalise(block.input_layernorm, residual, update)
            update = self._attend(block.self_attn, x, cache, positions, cos, sin)
            residual, x = self._add_and_normalise(block.post_attention_layernorm, residual, update)
            mlp = block.mlp
            update = mlp.down_proj(self._gate(mlp.act_fn, mlp.gate_proj(x), mlp.up_proj(x)))
        _, x = self._add_and_normalise(self._norm, residual[:, -1], update[:, -1])
        logits: Tensor = self._model.lm_head(x)
        return logits

    def _attend(
        self, attention: Any, x: Tensor, cache: tuple[Tensor, ...], positions: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        shape = (*x.shape[:2], -1, attention.head_dim)
        query, key, value = (
            project(x).view(shape).transpose(1, 2) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = self._rotate_and_store(query, key, value, cos, sin, positions, *cache)
        if x.shape[1] == 1:
            output = decode_attention(query.contiguous(), cache[0], cache[1], positions)
        else:
            output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        update: Tensor = attention.o_proj(output.transpose(1, 2).flatten(2))
        return update


def add_and_normalise(norm: nn.Module, residual: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream after a layer's output, and what the next layer reads of it."""
    residual = residual + update
    return residual, norm(residual)


def rotate_and_store(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of [batch, heads, tokens, size]; keys and values also go into the cache at `positions`."""
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    keys.index_copy_(2, positions, key)
    values.index_copy_(2, positions, value)
    return query, key


def multiply(linear: nn.Linear, x: Tensor) -> Tensor:
    """What a linear layer does, in a function of ours, since `torch.compile` leaves PyTorch's own modules alone."""
    return F.linear(x, linear.weight, linear.bias)


def gate(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up
