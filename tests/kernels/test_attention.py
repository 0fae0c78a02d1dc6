"""Attention over a static cache: the reference against its formula, and the Triton kernel against float64."""

from __future__ import annotations

import pytest
import torch

from patch.kernels import runs_triton
from patch.kernels.attention import decode_attention, reference


def case(batch, heads, key_heads, length, size, *, dtype=torch.float32, device="cpu"):
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(batch, heads, 1, size), *2 * [(batch, key_heads, length, size)]]
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in sizes]


def formula(query, keys, values, position):
    """In float64, sequence by sequence and head by head."""
    output = torch.empty(query.shape, dtype=torch.float64, device=query.device)
    group = query.shape[1] // keys.shape[1]
    for sequence, head in torch.cartesian_prod(torch.arange(query.shape[0]), torch.arange(query.shape[1])).tolist():
        past = slice(0, position + 1)
        k, v = (cache[sequence, head // group, past].double() for cache in (keys, values))
        weights = torch.softmax(k @ query[sequence, head, 0].double() / query.shape[3] ** 0.5, 0)
        output[sequence, head, 0] = weights @ v
    return output


@pytest.mark.parametrize("position", [0, 6, 9])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_only_filled_positions_count(key_heads, position):
    query, keys, values = case(2, 4, key_heads, 10, 8)
    output = decode_attention(query, keys, values, torch.tensor([position]))
    torch.testing.assert_close(output.double(), formula(query, keys, values, position), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [(16, 32, 32, 256, 128), (1, 32, 8, 1200, 128), (2, 14, 2, 130, 64), (3, 2, 2, 70, 16), (1, 40, 2, 100, 32)],
    ids=str,
)
def test_the_kernel_reads_nothing_behind_the_position(sizes, dtype):
    query, keys, values = case(*sizes, dtype=dtype, device="cuda")
    position = torch.zeros(1, dtype=torch.int64, device="cuda")
    for number in {0, 1, 63, 64, 65, sizes[3] // 2, sizes[3] - 1} & set(range(sizes[3])):
        position.fill_(number)
        unfilled = [cache.clone() for cache in (keys, values)]
        if runs_triton(query) and sizes != (1, 40, 2, 100, 32):  # the reference multiplies by zero
            for cache in unfilled:
                cache[:, :, number + 1 :] = float("nan")
        output = decode_attention(query, *unfilled, position)
        expected = formula(query, keys, values, number)
        assert (output.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * values.abs().max()


@pytest.mark.gpu
def test_one_graph_serves_all_positions():
    query, keys, values = case(1, 32, 8, 600, 128, dtype=torch.bfloat16, device="cuda")
    position = torch.zeros(1, dtype=torch.int64, device="cuda")
    decode_attention(query, keys, values, position)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decode_attention(query, keys, values, position)
    for number in (0, 100, 599):
        position.fill_(number)
        graph.replay()
        torch.testing.assert_close(output, reference(query, keys, values, position), rtol=2e-2, atol=2e-2)
