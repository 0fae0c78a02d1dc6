"""The Triton kernels, every choice of dispatch, and whole models on a GPU, against products in float64."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from test_hybrid_format import ROWS_OF_A_KIND, rows_of_a_kind
from torch import nn
from transformers import LlamaConfig

import patch
from patch.artefacts import PatchError
from patch.benchmarking import decoder
from patch.benchmarking.decoder import Decoder
from patch.benchmarking.generation import Generator
from patch.benchmarking.shapes import SHAPES as MODEL_SHAPES
from patch.benchmarking.shapes import random_mask, random_masks, random_model
from patch.evaluation.harness import CausalScorer
from patch.evaluation.zeroshot import TaskLibrary, zero_shot
from patch.inference import TOKENS, hybrid_linears
from patch.kernels.hybrid import dispatch, supports
from patch.kernels.hybrid.format import pack, unpack
from patch.kernels.hybrid.linear import HybridLinear
from patch.models import load_model, load_tokenizer, prunable_linears

pytestmark = pytest.mark.gpu

SHAPES = [(128, 64), (130, 200), (896, 4864), (4096, 1024)]


@pytest.fixture(autouse=True)
def own_times(tmp_path, monkeypatch):
    times = dispatch.Times(tmp_path / "times.json")
    monkeypatch.setattr(dispatch, "_times", lambda device: times)
    monkeypatch.setattr(dispatch, "_CHOICES", {})


def make(shape, share, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to("cuda", dtype)
    mask = random_mask(weight, share, (128, 64), generator)
    mask.apply_(weight)
    return pack(weight, mask.to("cuda").keep_mask()), weight


def assert_product(y, x, weight, bias=None, what="", activation=lambda product: product):
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    bound = torch.finfo(x.dtype).eps * (x.double().abs() @ weight.double().abs().T + 1)
    worst = float(((y.double() - activation(expected)).abs() / bound).max())
    assert worst <= 1, f"{what} {tuple(x.shape)} x {tuple(weight.shape)}: the error is {worst:.3g} of what is allowed"


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
        assert_every_kernel(x, hybrid, weight)
        assert_product(dispatch.matmul(x, hybrid), x, weight)
        assert dispatch.choose(tokens, hybrid).over_dense


def assert_every_kernel(x, hybrid, weight):
    for name, kernel in dispatch.kernels().items():
        if kernel.refusal(x.device, len(x), hybrid) is None:
            assert_product(kernel.multiply(x, hybrid, None), x, weight, what=name)


@pytest.mark.parametrize("dense_rows", ROWS_OF_A_KIND, ids=str)
def test_rows_of_dense_tiles_beside_rows_of_2_4_ones(dense_rows):
    weight, keep, dense_tiles = (tensor.cuda() for tensor in rows_of_a_kind(dense_rows))
    hybrid = pack(weight, keep, dense_tiles, (128, 64))
    for tokens in (1, 5, 64, 128, 300):
        x = torch.randn(tokens, weight.shape[1], device="cuda").bfloat16()
        assert_every_kernel(x, hybrid, weight * keep)


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


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_layers_follow_their_input(mode):
    """The first call measures the kernels and makes their schedules; the graphs of "reduce-overhead" (first call: warm
    up, second: capture, then replays) must not take that memory back."""
    torch.compiler.reset()
    hybrid, weight = make((4096, 1024), 0.45)
    compiled = torch.compile(nn.Sequential(HybridLinear(hybrid), nn.ReLU()), fullgraph=True, mode=mode)
    for call in range(4):
        x = torch.randn(4, 1024, device="cuda").bfloat16()
        y = compiled(x)
        what = f"call {call} by {dispatch.choose(4, hybrid).kernel}"
        assert_product(y, x, weight, what=what, activation=torch.relu)


def test_layers_of_loaded_models_are_not_slower_than_dense_ones(monkeypatch):
    """By the times that loading measured, for a block of LLaMA-2-7B."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32
    )
    monkeypatch.setitem(MODEL_SHAPES, "block", config)
    model = random_model("block", "cuda")
    layers = hybrid_linears(patch.load(model, random_masks(model, 0.45)))
    monkeypatch.setattr(dispatch, "measure", lambda *_: pytest.fail("not measured while loading"))
    for name, layer in layers.items():
        for tokens in TOKENS:
            choice = dispatch.choose(tokens, layer.weight)
            assert choice.over_dense <= dispatch.SLOWER, f"{name}, {tokens} tokens: {choice.reason}"
    if reason := supports("cuda", 1, make((128, 64), 0.5)[0]):
        pytest.skip(f"whether any layer is packed was not looked at: {reason}")
    assert "model.layers.0.mlp.gate_up_proj.linear" in layers


def masked(model, masks):
    """A pruned dense copy, and one in float32, of which the other is a rounding."""
    dense = copy.deepcopy(model)
    if masks is not None:
        masks.apply_(prunable_linears(dense))
    return dense, copy.deepcopy(dense).float()


def assert_rounds_like(logits, dense, exact):
    """`logits` are as near to those of float32 as the logits of the dense model in bfloat16 are, within a factor."""
    errors = [float((found.double() - exact.double()).norm() / exact.double().norm()) for found in (logits, dense)]
    assert 0 < errors[1] < 0.1
    assert errors[0] <= 2 * errors[1], f"off by {errors[0]:.2g}, the dense model by {errors[1]:.2g}"


def test_generation_by_graphs_is_that_of_the_masked_dense_model(tiny_model):
    model = tiny_model(hidden_size=128, intermediate_size=256).bfloat16().cuda()
    masks = random_masks(model, 0.35, (128, 64))
    dense, exact = masked(model, masks)
    loaded = patch.load(model, masks, tokens=())
    prompt = torch.randint(3, 256, (2, 9), device="cuda")
    assert_rounds_like(loaded(prompt).logits, dense(prompt).logits, exact(prompt).logits)
    generator = Generator(loaded, prompt, 8, compiled=False)
    eager = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, min_new_tokens=8,
                            do_sample=False)  # fmt: skip
    assert torch.equal(generator()[:, :1], eager[:, 9:10])
    assert torch.equal(generator().clone(), generator())


@pytest.mark.parametrize("hybrid", [False, True], ids=["dense", "hybrid"])
def test_compiled_decoders_give_the_logits_of_transformers(hybrid, tiny_model, monkeypatch):
    """Without the search for the fastest dense product, which takes minutes."""
    monkeypatch.setattr(decoder, "MODE", "default")
    torch.compiler.reset()
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = tiny_model(**sizes).bfloat16().cuda()
    masks = random_masks(model, 0.35, (128, 64)) if hybrid else None
    dense, exact = masked(model, masks)
    if masks is not None:
        model = patch.load(model, masks, tokens=())
    ids = torch.randint(3, 256, (2, 10), device="cuda")
    positions = torch.arange(10, device="cuda")
    decode = Decoder(model, 2, 16, compiled=True)
    for given, where in ((9, slice(0, 9)), (10, slice(9, 10))):
        expected = [reference(ids[:, :given]).logits[:, -1] for reference in (dense, exact)]
        assert_rounds_like(decode(ids[:, where], positions[where]), *expected)


@pytest.mark.integration
def test_a_task_is_scored_like_by_the_masked_dense_model(monkeypatch):
    """Answers differ only where the float32 model's best two are as close as bfloat16 rounds."""
    try:
        source, library = "embedded:smollm2-135m", TaskLibrary(["arc_easy"], "embedded")
        model, tokenizer = load_model(source, dtype="bfloat16").cuda(), load_tokenizer(source)
    except PatchError as error:
        pytest.skip(str(error))
    masks = random_masks(model, 0.25)
    dense, exact = masked(model, masks)
    loaded = patch.load(model, masks, tokens=())
    assert hybrid_linears(loaded)
    loglikelihood, scores = CausalScorer.loglikelihood, []

    def kept(scorer, requests, disable_tqdm=True):
        answers = loglikelihood(scorer, requests, disable_tqdm)
        scores.append({(r.doc_id, r.idx): score for r, (score, _) in zip(requests, answers, strict=True)})
        return answers

    monkeypatch.setattr(CausalScorer, "loglikelihood", kept)
    limit = 50
    results = [zero_shot(each, tokenizer, library, "arc_easy", limit, 16) for each in (loaded, dense, exact)]
    right = [{item["item"]: item["value"] for item in run.items if item["metric"] == "acc"} for run in results]
    of_hybrid, of_dense, of_exact = (torch.tensor([run[key] for key in sorted(scores[2])]) for run in scores)
    assert_rounds_like(of_hybrid, of_dense, of_exact)
    answers = defaultdict(list)
    for (question, _), score in scores[2].items():
        answers[question].append(score)
    noise = float((of_dense - of_exact).abs().max())
    ties = set()
    for question, of_question in answers.items():
        second, best = sorted(of_question)[-2:]
        if best - second <= 2 * noise:
            ties.add(question)
    assert len(right[0]) == limit
    assert len(ties) < limit / 2
    assert {question for question in right[0] if right[0][question] != right[1][question]} <= ties
