"""Exported checkpoints: what transformers loads from them, what stands in them, and what is refused."""

from __future__ import annotations

import json
import os

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import patch
from patch.artefacts import PatchError
from patch.exporting import MASK_FILE, masks_in, verify
from patch.models import load_model, prunable_linears
from patch.records import Metric, Record
from patch.sparsity.maskset import LinearMask, MaskSet, fingerprint
from patch.sparsity.patterns import Pattern, keep_n_of_m
from patch.sparsity.tiles import expand

IDS = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(0))


def tiled(shape, seed: int) -> LinearMask:
    pattern = Pattern.parse("tiles:16x16")
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(-(-shape[0] // 16), -(-shape[1] // 16), generator=generator) < 0.3
    keep = keep_n_of_m(torch.rand(shape, generator=generator), 2, 4) | expand(dense, shape, pattern.tile)
    return LinearMask.from_keep_mask(keep, pattern, dense_tiles=dense)


def tile_masks(directory) -> MaskSet:
    linears = prunable_linears(load_model(str(directory)))
    layers = {name: tiled(tuple(linear.weight.shape), i) for i, (name, linear) in enumerate(linears.items())}
    masks = MaskSet(layers, fingerprint(linears), {"method": "patch_joint", "pattern": "tiles:16x16", "sparsity": 35.0})
    masks.save(directory.parent / MASK_FILE)
    return masks


def masked_logits(directory, masks: MaskSet) -> torch.Tensor:
    model = load_model(str(directory))
    masks.apply_(prunable_linears(model))
    return model(IDS).logits


def evaluation(masks: MaskSet, *, dense: bool = False, value: float = 21.5) -> Record:
    inputs = {"model": masks.base_fingerprint or ""} | ({} if dense else {"mask": masks.checksum})
    metrics = [Metric("own", "perplexity", value, 0.25, 6), Metric("piqa", "acc", 0.625, 0.0125, 100)]
    protocol = {"own": {"source": "/home/me/text.txt", "length": 16}, "piqa": {"shots": 0}}
    provenance = {"commit": "abc", "dirty": False, "gpu": None, "cpu": "a CPU", "versions": {"torch": "2.0"}}
    return Record("evaluate", "", {}, metrics, protocol, inputs, {}, provenance, {"wall_s": 3.0}, "2026-01-02")


def test_transformers_loads_it_and_computes_what_the_masked_model_computes(model_directory, tmp_path):
    masks = tile_masks(model_directory)
    output = patch.export(str(model_directory), masks, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert torch.equal(loaded(IDS).logits, masked_logits(model_directory, masks))
    text = "the mask keeps 2 of 4"
    assert AutoTokenizer.from_pretrained(output)(text) == AutoTokenizer.from_pretrained(model_directory)(text)


def test_every_architecture_survives_the_round_trip(architecture, tiny_model, tokenizer, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    masks = tile_masks(tmp_path / "model")
    output = patch.export(str(tmp_path / "model"), masks, tmp_path / "out")
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(output)(IDS).logits, masked_logits(tmp_path / "model", masks)
    )


def test_the_config_says_nothing_about_sparsity(model_directory, tmp_path):
    output = patch.export(str(model_directory), tile_masks(model_directory), tmp_path / "out")
    before, after = (json.loads((d / "config.json").read_text()) for d in (model_directory, output))
    assert before == after
    assert not [key for key in after if "spars" in key or "quant" in key or "compress" in key]


def test_the_masks_lie_beside_it_and_others_find_them(model_directory, tmp_path):
    masks = tile_masks(model_directory)
    output = patch.export(str(model_directory), model_directory.parent / MASK_FILE, tmp_path / "out")
    found = masks_in(output)
    assert found == output / MASK_FILE
    assert MaskSet.load(found).checksum == masks.checksum
    assert masks_in(model_directory) is None


def test_large_checkpoints_are_several_files(model_directory, tmp_path):
    masks = tile_masks(model_directory)
    output = patch.export(str(model_directory), masks, tmp_path / "out", shard_size="100KB")
    assert len(list(output.glob("model-*-of-*.safetensors"))) > 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(output)(IDS).logits, masked_logits(model_directory, masks))


def test_new_values_of_the_weights_are_in_it_in_the_precision_asked_for(model_directory, tmp_path):
    linears = prunable_linears(load_model(str(model_directory)))
    new = {name: torch.randn(linear.weight.shape) for name, linear in linears.items()}
    pattern = Pattern.parse("2:4")
    layers = {
        name: LinearMask.from_keep_mask(keep_n_of_m(weight.abs(), 2, 4), pattern, new_weight=weight)
        for name, weight in new.items()
    }
    masks = MaskSet(layers, fingerprint(linears))
    output = patch.export(str(model_directory), masks, tmp_path / "out", dtype="bfloat16")
    written = load_file(output / "model.safetensors")
    for name, weight in new.items():
        keep = keep_n_of_m(weight.abs(), 2, 4)
        assert torch.equal(written[f"{name}.weight"], torch.where(keep, weight, 0).bfloat16())
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_earlier_export_is_replaced_and_nothing_else_is(model_directory, tmp_path):
    masks = tile_masks(model_directory)
    output = patch.export(str(model_directory), masks, tmp_path / "out")
    (output / "stale").touch()
    patch.export(str(model_directory), masks, output)
    assert not (output / "stale").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(PatchError, match="other: exists and is no earlier export; choose another directory"):
        patch.export(str(model_directory), masks, other)
    with pytest.raises(PatchError, match="is the model itself"):
        patch.export(str(model_directory), masks, model_directory)
    assert (other / "thesis.tex").read_text() == "years of work"


def test_a_failure_leaves_what_was_there_and_no_rest(model_directory, tmp_path, monkeypatch):
    masks = tile_masks(model_directory)
    output = patch.export(str(model_directory), masks, tmp_path / "out")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in output.iterdir())

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("patch.exporting.verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch.export(str(model_directory), masks, output)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in output.iterdir()) == before
    assert not list(tmp_path.glob(".out*"))


def test_others_may_read_it(model_directory, tmp_path):
    umask = os.umask(0o022)
    try:
        output = patch.export(str(model_directory), tile_masks(model_directory), tmp_path / "out")
    finally:
        os.umask(umask)
    assert output.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o644}


def test_a_mask_of_another_model_is_refused(model_directory, tiny_model, tmp_path):
    masks = tile_masks(model_directory)
    tiny_model("llama", seed=1).save_pretrained(model_directory)
    with pytest.raises(PatchError, match="the mask belongs to another model"):
        patch.export(str(model_directory), masks, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("damage", ["pruned", "group", "shape", "missing", "kept", "truncated"])
def test_verification_finds_damage(damage, model_directory, tmp_path):
    masks = tile_masks(model_directory)
    output = patch.export(str(model_directory), masks, tmp_path / "out")
    model = load_model(str(model_directory))
    masks.apply_(prunable_linears(model))
    verify(output, masks, model)
    path, layer = output / "model.safetensors", "model.layers.0.mlp.up_proj"
    weights = load_file(path)
    weight, keep = weights[f"{layer}.weight"], masks.linears[layer].keep_mask()
    message = f"{layer}.weight: "
    if damage == "pruned":
        weight[~keep] = 1e-20
        message += "weights that the mask prunes are not 0"
    elif damage == "kept":
        weight[keep] += 1
        message += "not the weights that were written"
    elif damage == "shape":
        weights[f"{layer}.weight"] = weight[:-1].clone()
        message += "its shape is"
    elif damage == "missing":
        del weights[f"{layer}.weight"]
        message = f"{layer}.weight is in the mask but not in the checkpoint"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        message = "truncated or not a safetensors file"
    elif damage == "group":  # a mask that lies about its groups: 4 of 4 kept, but said to be 2:4
        lying = LinearMask.from_keep_mask(torch.ones(96, 64, dtype=torch.bool), Pattern("unstructured"))
        object.__setattr__(lying, "keep_mask", lambda: torch.ones(96, 64, dtype=torch.bool))
        object.__setattr__(lying, "pattern", Pattern.parse("2:4"))
        masks.linears[layer] = lying
        message += "a group keeps more than 2 of 4"
    else:
        save_file(weights, path, {"format": "pt"})
    with pytest.raises(PatchError, match=message):
        verify(output, masks, model)


def test_sampling_settings_that_transformers_refuses_to_save_are_mended(model_directory, tmp_path):
    settings = model_directory / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"temperature": 0.6, "top_p": 0.9}))
    output = patch.export(str(model_directory), tile_masks(model_directory), tmp_path / "out")
    assert json.loads((output / "generation_config.json").read_text())["do_sample"] is True


def test_the_card_holds_the_records_numbers_beside_the_dense_models(model_directory, tmp_path):
    masks = tile_masks(model_directory)
    making = Record("prune", "", {}, outputs={MASK_FILE: masks.checksum}, cost={"wall_s": 7.0}, date="2026-01-01")
    records = [making, evaluation(masks), evaluation(masks, dense=True, value=11.25)]
    output = patch.export(str(model_directory), masks, tmp_path / "out", records=records)
    card = (output / "README.md").read_text()
    assert "| own, perplexity | 11.25 ± 0.25 | 21.50 ± 0.25 |" in card
    assert "| piqa, acc | 62.50 ± 1.25 | 62.50 ± 1.25 |" in card
    assert f"PATCH-Joint to {100 * masks.sparsity:.2f} % zeros in the 14 linear layers" in card
    assert "source text.txt, length 16" in card  # not whose home it lay in
    assert str(tmp_path) not in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers"
    assert "base_model" not in header  # a directory is none on the hub
    (result,) = header["model-index"][0]["results"][:1]
    assert result["metrics"][0] == {"type": "perplexity", "value": 21.5}


def test_the_card_names_the_base_model_on_the_hub():
    from patch.model_card import model_card

    masks = MaskSet({"a": LinearMask.dense((4, 4))}, "f", {})
    card = model_card(masks, [], "Qwen/Qwen2.5-0.5B", "abc")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "Qwen/Qwen2.5-0.5B"
    assert "Qwen/Qwen2.5-0.5B (revision abc), pruned" in card
    assert "## Results" not in card


@pytest.mark.parametrize(("part", "what"), [("mask", "mask"), ("model", "model")])
def test_records_of_something_else_are_refused(part, what, model_directory, tmp_path):
    masks = tile_masks(model_directory)
    record = evaluation(masks, dense=part == "model")
    record.inputs[part] = "another"
    with pytest.raises(PatchError, match=f"it is of another {what} than the one to export"):
        patch.export(str(model_directory), masks, tmp_path / "out", records=[record])
    assert not (tmp_path / "out").exists()


def test_our_own_loader_packs_it_without_being_told_the_mask(model_directory, tmp_path):
    masks = tile_masks(model_directory)
    output = patch.export(str(model_directory), masks, tmp_path / "out", dtype="bfloat16")
    dense = load_model(str(model_directory), dtype="bfloat16")
    masks.apply_(prunable_linears(dense))
    torch.testing.assert_close(patch.load(str(output))(IDS).logits, dense(IDS).logits)
