"""The CUDA kernels for hybrid-tile weights against float64, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch
from test_hybrid_format import ROWS_OF_A_KIND, random_case, rows_of_a_kind

from patch.artefacts import PatchError
from patch.kernels.hybrid import HybridWeight, decode, pack, prefill, supports, unpack
from patch.kernels.hybrid.hopper import DecodeTuning

pytestmark = pytest.mark.gpu

SHAPES = [(128, 64), (129, 136), (1000, 72), (896, 4864), (4096, 512), (300, 2000)]
TUNINGS = {  # and numbers of tokens that they are compiled for
    DecodeTuning(1, 111): (5, 16),
    DecodeTuning(1, 225): (32, 64, 128),
    DecodeTuning(2, 111): (5, 16, 32, 64),
    DecodeTuning(2, 225): (5, 16, 32, 64),
}


@pytest.fixture(autouse=True)
def _supported():
    reason = supports("cuda", 1, pack(torch.ones(8, 8).bfloat16(), torch.ones(8, 8, dtype=torch.bool)).to("cuda"))
    if reason:
        pytest.skip(reason)


def packed(shape, share, dtype=torch.bfloat16, scale=1.0) -> HybridWeight:
    weight, keep, dense_tiles = random_case(shape, (128, 64), share, dtype)
    return pack(scale * weight.cuda(), keep.cuda(), dense_tiles.cuda(), (128, 64))


def inputs(weight, tokens, seed):
    torch.full((1 << 26,), float("nan"), device="cuda")  # memory handed out next: what is not written shows
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, weight.in_features, generator=generator, device="cuda").to(weight.dtype)
    return x, torch.randn(weight.out_features, generator=generator, device="cuda").to(weight.dtype)


def assert_product(y, x, weight, bias=None):
    expected = x.double() @ unpack(weight).double().T
    expected = expected if bias is None else expected + bias.double()
    assert y.dtype == weight.dtype
    assert (y.double() - expected).norm() <= 5e-3 * expected.norm()  # rounding to bfloat16: 2e-3
    rows = (y.double() - expected).norm(dim=0) / expected.norm(dim=0).clamp(min=1e-6)
    assert rows.max() < 2e-2  # no row of the weight hides behind the others


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(shape, share, dtype):
    weight = packed(shape, share, dtype)
    for tokens in (1, 3, 8, 16, 17, 33, 64, 100, 128):
        x, bias = inputs(weight, tokens, tokens)
        assert_product(decode(x, weight), x, weight)
        assert_product(decode(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_decode_whatever_its_tuning_repeats_bit_for_bit(tuning):
    for shape in [(129, 136), (4096, 512), (896, 4864)]:
        weight = packed(shape, 0.5)
        for tokens in TUNINGS[tuning]:
            x, bias = inputs(weight, tokens, tokens)
            y = decode(x, weight, bias, tuning)
            assert_product(y, x, weight, bias)
            for _ in range(5):
                assert torch.equal(decode(x, weight, bias, tuning), y)


def test_decode_refuses_tunings_that_it_is_not_compiled_for():
    weight = packed((256, 136), 0.5)
    x, _ = inputs(weight, 128, 0)
    for tokens, tuning in [(16, DecodeTuning(1, 225)), (64, DecodeTuning(1, 111)), (128, DecodeTuning(2, 225))]:
        with pytest.raises(PatchError, match="no such tuning"):
            decode(x[:tokens], weight, None, tuning)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] % 8 == 0], ids=str)
def test_prefill(shape, share, dtype):
    weight = packed(shape, share, dtype)
    for tokens in (1, 255, 256, 700, 4500):
        x, bias = inputs(weight, tokens, tokens)
        assert_product(prefill(x, weight), x, weight)
        assert_product(prefill(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dense_rows", ROWS_OF_A_KIND, ids=str)
def test_rows_of_dense_tiles_beside_rows_of_2_4_ones(dense_rows):
    weight, keep, dense_tiles = (tensor.cuda() for tensor in rows_of_a_kind(dense_rows))
    hybrid = pack(weight, keep, dense_tiles, (128, 64))
    for tokens in (1, 16, 64, 128, 300):
        x, bias = inputs(hybrid, tokens, tokens)
        if tokens <= 128:
            assert_product(decode(x, hybrid, bias), x, hybrid, bias)
        assert_product(prefill(x, hybrid, bias), x, hybrid, bias)
    for tuning, counts in TUNINGS.items():
        for tokens in counts:
            x, bias = inputs(hybrid, tokens, tokens)
            assert_product(decode(x, hybrid, bias, tuning), x, hybrid, bias)


def test_decode_calls_that_overlap_give_what_they_give_alone():
    # Three quarters of the weights are left, and so 20 products after one another keep their inputs' size.
    first, second = packed((4096, 512), 0.5, scale=384**-0.5), packed((512, 4096), 0.5, scale=3072**-0.5)
    for tokens in (5, 64):
        x, _ = inputs(first, tokens, 0)
        alone = x
        for _ in range(20):
            alone = decode(decode(alone, first), second)
            torch.cuda.synchronize()
        assert alone.isfinite().all()
        assert alone.float().norm() > 1e-3 * x.float().norm()
        for _ in range(10):
            y = x
            for _ in range(20):
                y = decode(decode(y, first), second)
            assert torch.equal(y, alone)


@pytest.mark.parametrize("kernel", [decode, prefill])
def test_activations_of_any_layout(kernel):
    weight = packed((256, 136), 0.5)
    wide, _ = inputs(packed((256, 272), 0.5), 12, 0)
    for x in (wide[:, :136], wide[:, 136:], wide[:, 1:137], wide[::2, ::2], wide[:, :136].view(3, 4, 136)):
        y = kernel(x, weight)
        assert y.shape == (*x.shape[:-1], 256)
        assert_product(y.flatten(0, -2), x.flatten(0, -2), weight)
    assert kernel(wide[:0, :136], weight).shape == (0, 256)


@pytest.mark.parametrize("kernel", [decode, prefill])
def test_layers_one_after_another_in_a_cuda_graph(kernel):
    first, second = packed((512, 256), 0.5), packed((256, 512), 0.5)
    x, _ = inputs(first, 16, 0)
    for _ in range(2):
        eager = kernel(kernel(x, first), second)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel(kernel(kernel(x, first), second), first)
        z = kernel(y, second)
    x.copy_(inputs(first, 16, 1)[0])
    for _ in range(3):
        graph.replay()
    eager = kernel(kernel(kernel(kernel(x, first), second), first), second)
    assert torch.equal(z, eager)


@pytest.mark.parametrize("kernel", [decode, prefill])
def test_refuses_what_does_not_fit(kernel):
    weight = packed((256, 136), 0.5)
    x, bias = inputs(weight, 4, 0)
    for wrong in (x.half(), x[:, :128], x.cpu()):
        with pytest.raises(PatchError, match=r"256x136.*activations are"):
            kernel(wrong, weight)
    with pytest.raises(PatchError, match="256x136: the bias is"):
        kernel(x, weight, bias[:100])


def test_refuses_shapes_that_the_copy_engine_cannot_address():
    weight = packed((128, 68), 1)
    assert "68 inputs are not a multiple of 8" in supports("cuda", 1, weight)
    with pytest.raises(PatchError, match="68 inputs"):
        decode(torch.zeros(1, 68, dtype=torch.bfloat16, device="cuda"), weight)
    with pytest.raises(PatchError, match="129 tokens are more than 128"):
        decode(torch.zeros(129, 64, dtype=torch.bfloat16, device="cuda"), packed((128, 64), 1))
