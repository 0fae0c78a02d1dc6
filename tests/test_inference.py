"""Whole pruned models with packed layers: the same logits, tokens and scores as the masked dense model."""

from __future__ import annotations

import copy

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import patch
from patch.artefacts import PatchError
from patch.benchmarking.shapes import random_masks
from patch.evaluation.zeroshot import harness_model
from patch.inference import hybrid_linears, load_state
from patch.kernels.hybrid import dispatch
from patch.kernels.hybrid.fusion import FusedLinear
from patch.models import load_model, prunable_linears
from patch.sparsity.maskset import LinearMask, MaskSet, fingerprint
from patch.sparsity.patterns import Pattern, keep_n_of_m

IDS = torch.randint(3, 256, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def wide_model(tiny_model):
    """Bfloat16 models wide enough for several tiles of the format."""

    def make(architecture="llama", **changes):
        sizes = {"ffn_dim": 256, "word_embed_proj_dim": 128} if architecture == "opt" else {"intermediate_size": 256}
        return tiny_model(architecture, **{"hidden_size": 128} | sizes | changes).bfloat16()

    return make


def masked(model, masks):
    model = copy.deepcopy(model)
    masks.apply_(prunable_linears(model))
    return model


def logits(model):
    return model(IDS).logits


def generated(model):
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("fuse", [True, False])
def test_logits_and_tokens_are_those_of_the_masked_dense_model(architecture, fuse, wide_model):
    model = wide_model(architecture)
    masks = random_masks(model, 0.35, (64, 64))
    dense = masked(model, masks)
    loaded = patch.load(model, masks, fuse=fuse)
    assert loaded is model
    torch.testing.assert_close(logits(loaded), logits(dense))
    assert torch.equal(generated(loaded), generated(dense))
    assert hybrid_linears(loaded)
    assert any(isinstance(module, FusedLinear) for module in loaded.modules()) == fuse


def test_models_compile_into_one_graph_that_serves_every_call(wide_model):
    model = wide_model()
    masks = random_masks(model, 0.35, (64, 64))
    dense, loaded = masked(model, masks), patch.load(model, masks)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loaded.forward, fullgraph=True, backend=counter)
    for shift in range(3):
        ids = (IDS + shift) % 256
        found = compiled(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, dense(ids).logits)
    assert counter.frame_count == 1


def test_accuracies_are_those_of_the_masked_dense_model(wide_model, tokenizer):
    """As lm-evaluation-harness scores them: log-likelihoods of continuations in padded batches."""
    model = wide_model(vocab_size=max(256, len(tokenizer)))
    masks = random_masks(model, 0.45, (64, 64))
    dense = masked(model, masks)
    texts = [("the river", " keeps the mountain"), ("a mask", " prunes"), ("seven", " while the text again")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(texts)]
    scores = [harness_model(m, tokenizer, 2).loglikelihood(requests) for m in (patch.load(model, masks), dense)]
    assert scores[0] == scores[1]


def test_tiles_that_the_format_cannot_hold_cost_memory_but_no_accuracy(wide_model):
    model = wide_model()
    masks = random_masks(model, 0.25, (16, 16))
    dense = masked(model, masks)
    torch.testing.assert_close(logits(patch.load(model, masks)), logits(dense))


@pytest.mark.parametrize("pattern", ["unstructured", "1:4"])
def test_layers_without_tiles_stay_dense_and_are_masked(pattern, wide_model):
    model = wide_model()
    linears, parsed = prunable_linears(model), Pattern.parse(pattern)
    masks = MaskSet(
        {
            name: LinearMask.from_keep_mask(keep_n_of_m(linear.weight.abs(), 1, 4), parsed)
            for name, linear in linears.items()
        },
        fingerprint(linears),
    )
    loaded = patch.load(model, masks, fuse=False)
    assert not hybrid_linears(loaded)
    assert all((linear.weight == 0).float().mean() == 0.75 for linear in prunable_linears(loaded).values())


@pytest.mark.parametrize("slow_at", [1, 16, 64, 2048])
def test_layers_that_would_be_slower_in_decoding_or_a_prompt_stay_dense(slow_at, wide_model, monkeypatch):
    """As if measured: gate and up as one are slow at some number of tokens."""

    def choose(tokens, weight):
        slow = tokens == slow_at and weight.out_features == 512
        return dispatch.Choice("decode", "measured", {"decode": 1.1 if slow else 0.7, "dense": 1.0})

    monkeypatch.setattr(dispatch, "choose", choose)
    model = wide_model()
    loaded = patch.load(model, random_masks(model, 0.5, (64, 64)))
    packed = {name.split(".")[-2 if name.endswith("linear") else -1] for name in hybrid_linears(loaded)}
    assert packed == {"qkv_proj", "o_proj", "down_proj"}
    assert isinstance(loaded.model.layers[0].mlp.gate_up_proj.linear, nn.Linear)
    again, others = wide_model(), {1, 16, 64, 2048} - {slow_at}
    layers = hybrid_linears(patch.load(again, random_masks(again, 0.5), tokens=tuple(others)))
    assert any("gate_up" in name for name in layers)


# from files


def test_a_model_and_its_mask_load_from_their_files(wide_model, tmp_path):
    model = wide_model()
    masks = random_masks(model, 0.35, (64, 64))
    model.save_pretrained(tmp_path / "model")
    masks.save(tmp_path / "some.safetensors")
    loaded = patch.load(str(tmp_path / "model"), tmp_path / "some.safetensors")
    torch.testing.assert_close(logits(loaded), logits(masked(load_model(str(tmp_path / "model")), masks)))
    assert hybrid_linears(loaded)


@pytest.mark.parametrize("new_values", [True, False])
def test_an_export_loads_from_its_directory_alone(new_values, wide_model, tmp_path):
    """Its weights are pruned, and perhaps updated: not those that the mask's fingerprint is of."""
    model = wide_model()
    masks = random_masks(model, 0.35, (64, 64))
    if new_values:
        for name, linear in prunable_linears(model).items():
            mask = masks.linears[name]
            masks.linears[name] = LinearMask.from_keep_mask(
                mask.keep_mask(), mask.pattern, dense_tiles=mask.dense_tiles(), new_weight=2 * linear.weight
            )
    masked(model, masks).save_pretrained(tmp_path)
    masks.save(tmp_path / "mask.safetensors")
    loaded = patch.load(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(load_model(str(tmp_path))))
    assert hybrid_linears(loaded)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_state_makes_the_same_model_again(fuse, wide_model, tmp_path):
    model = wide_model("qwen2")
    loaded = patch.load(model, random_masks(model, 0.35, (64, 64)), fuse=fuse)
    save_file({name: tensor.clone() for name, tensor in loaded.state_dict().items()}, tmp_path / "state.safetensors")
    fresh = load_state(wide_model("qwen2", seed=7), load_file(tmp_path / "state.safetensors"))
    torch.testing.assert_close(logits(fresh), logits(loaded))
    assert hybrid_linears(fresh).keys() == hybrid_linears(loaded).keys()


def test_a_state_goes_into_a_model_prepared_from_another_mask(wide_model):
    model, other = wide_model(), wide_model(seed=3)
    loaded = patch.load(model, random_masks(model, 0.5, (128, 64)))
    prepared = patch.load(other, random_masks(other, 0.5, (64, 64)))
    prepared.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(logits(prepared), logits(loaded))


def test_a_state_of_another_model_is_refused(wide_model):
    model = wide_model()
    state = patch.load(model, random_masks(model, 0.5)).state_dict()
    with pytest.raises(PatchError, match="they belong to different models"):
        load_state(wide_model(intermediate_size=128), state)
    with pytest.raises(PatchError, match="the state does not belong to this model, LlamaForCausalLM"):
        load_state(wide_model(num_hidden_layers=1), state)


# what cannot be


def test_masks_of_another_model_are_refused(wide_model):
    masks = random_masks(wide_model(), 0.35)
    with pytest.raises(PatchError, match="the mask belongs to another model"):
        patch.load(wide_model(seed=1), masks)


def test_weights_with_nan_are_refused_by_name(wide_model):
    model = wide_model()
    model.model.layers[1].mlp.down_proj.weight[5, 5] = float("nan")
    with pytest.raises(PatchError, match=r"layer model\.layers\.1\.mlp\.down_proj: .* NaN"):
        patch.load(model, random_masks(model, 0.5))


@pytest.mark.parametrize("tokens", [(), (1, 16)])
def test_devices_without_a_kernel_are_refused_while_loading(tokens, wide_model, monkeypatch):
    refusing = {"triton": dispatch.Kernel(lambda *_: "bfloat16 needs compute capability 8.0", lambda *_: None)}
    monkeypatch.setattr(dispatch, "kernels", lambda: refusing)
    model = wide_model()
    with pytest.raises(PatchError, match=r"layer model.layers.0.*qkv_proj.*no kernel runs on cpu .*8\.0.*float16"):
        patch.load(model, random_masks(model, 0.5), tokens=tokens)


def test_float32_models_are_refused_with_the_way_out(tiny_model):
    model = tiny_model()
    with pytest.raises(PatchError, match=r'it is torch\.float32, .*dtype="bfloat16"'):
        patch.load(model, random_masks(model, 0.5))


def test_without_a_mask_there_has_to_be_one_in_the_directory(wide_model, tmp_path):
    with pytest.raises(PatchError, match=r"give a mask; only a directory with a mask\.safetensors"):
        patch.load(tmp_path)
    with pytest.raises(PatchError, match="model LlamaForCausalLM: give a mask"):
        patch.load(wide_model())
