"""The Triton kernels, every choice of dispatch, and whole models on a GPU, against products in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import patch
from patch.benchmarking.decoder import Decoder
from patch.benchmarking.generation import Generator
from patch.benchmarking.shapes import random_mask, random_masks
from patch.kernels.hybrid import dispatch
from patch.kernels.hybrid.format import pack, unpack
from patch.kernels.hybrid.linear import HybridLinear
from patch.models import prunable_linears

pytestmark = pytest.mark.gpu

SHAPES = [(128, 64), (130, 200), (896, 4864), (4096, 1024)]


@pytest.fixture(autouse=True)
def own_times(tmp_path, monkeypatch):
    monkeypatch.setenv("PATCH_LLM_CACHE", str(tmp_path))
    dispatch._times.cache_clear()
    monkeypatch.setattr(dispatch, "_CHOICES", {})
    yield
    dispatch._times.cache_clear()


def make(shape, share, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to("cuda", dtype)
    mask = random_mask(weight, share, (128, 64), generator)
    mask.apply_(weight)
    return pack(weight, mask.to("cuda").keep_mask()), weight


def assert_product(y, x, weight, bias=None):
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    bound = torch.finfo(x.dtype).eps * (x.double().abs() @ weight.double().abs().T + 1)
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.0, 0.35, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_products_and_unpacking(shape, share, dtype):
    triton_matmul = pytest.importorskip("patch.kernels.hybrid.triton_matmul")
    hybrid, weight = make(shape, share, dtype)
    assert torch.equal(triton_matmul.unpack(hybrid), weight)
    assert torch.equal(unpack(hybrid), weight)
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    for tokens in (1, 3, 16, 65, 130):
        x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
        assert_product(triton_matmul.matmul(x, hybrid, bias), x, weight, bias)
        assert_product(triton_matmul.matmul(x, hybrid), x, weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_that_dispatch_may_choose_is_right(shape):
    hybrid, weight = make(shape, 0.35)
    for tokens in (1, 7, 33, 128, 129, 500):
        x = torch.randn(tokens, shape[1], device="cuda").bfloat16()
        for kernel in dispatch.kernels().values():
            if kernel.refusal(x.device, tokens, hybrid) is None:
                assert_product(kernel.multiply(x, hybrid, None), x, weight)
        assert_product(dispatch.matmul(x, hybrid), x, weight)
        assert dispatch.choose(tokens, hybrid).over_dense


def test_layers_in_a_cuda_graph_follow_their_input():
    hybrid, weight = make((4096, 1024), 0.45)
    layer, x = HybridLinear(hybrid), torch.randn(4, 1024, device="cuda").bfloat16()
    for _ in range(2):
        layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert_product(y, x, weight)


def test_compiled_layers():
    hybrid, weight = make((4096, 1024), 0.45)
    compiled = torch.compile(nn.Sequential(HybridLinear(hybrid), nn.SiLU()), fullgraph=True, mode="reduce-overhead")
    x = torch.randn(4, 1024, device="cuda").bfloat16()
    for _ in range(4):
        y = compiled(x)
    torch.testing.assert_close(y, nn.functional.silu(x @ weight.T), rtol=2e-2, atol=2e-1)


def test_generation_by_graphs_is_that_of_the_masked_dense_model(tiny_model):
    model = tiny_model(hidden_size=128, intermediate_size=256).bfloat16().cuda()
    masks = random_masks(model, 0.35, (128, 64))
    dense = copy.deepcopy(model)
    masks.apply_(prunable_linears(dense))
    loaded = patch.load(model, masks, tokens=())
    prompt = torch.randint(3, 256, (2, 9), device="cuda")
    torch.testing.assert_close(loaded(prompt).logits, dense(prompt).logits, rtol=5e-2, atol=5e-1)
    generator = Generator(loaded, prompt, 8, compiled=False)
    eager = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, min_new_tokens=8,
                            do_sample=False)  # fmt: skip
    assert torch.equal(generator()[:, :1], eager[:, 9:10])
    assert torch.equal(generator().clone(), generator())


@pytest.mark.parametrize("hybrid", [False, True], ids=["dense", "hybrid"])
def test_compiled_decoders_give_the_logits_of_transformers(hybrid, tiny_model):
    model = tiny_model(hidden_size=128, intermediate_size=256, num_attention_heads=2).bfloat16().cuda()
    if hybrid:
        model = patch.load(model, random_masks(model, 0.35, (128, 64)), tokens=())
    ids = torch.randint(3, 256, (2, 10), device="cuda")
    expected = [model(ids[:, :9]).logits[:, -1], model(ids).logits[:, -1]]
    decoder = Decoder(model, 2, 16, compiled=True)
    positions = torch.arange(10, device="cuda")
    logits = [decoder(ids[:, :9], positions[:9]), decoder(ids[:, 9:], positions[9:])]
    torch.testing.assert_close(logits, expected, rtol=5e-2, atol=5e-1)
