"""Published masks: files in the release's layout, made for a tiny model, whole, damaged, and of something else."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from patch.artefacts import PatchError
from patch.methods import make_method
from patch.models import prunable_linears
from patch.pruning.released import ReleasedFile, fetch, released_masks
from patch.sparsity.maskset import MaskSet, fingerprint
from patch.sparsity.patterns import Pattern

TILES = Pattern.parse("tiles:16x16")
LAYER = "model.layers.0.mlp.up_proj"


def keep_masks(model, dense_share: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Tiles of 16 x 16, of which each `1 / dense_share`-th is dense, the others 2:4, by plain loops."""
    generator, masks = np.random.default_rng(seed), {}
    every, count = round(1 / dense_share), 0
    for name, linear in prunable_linears(model).items():
        rows, columns = linear.weight.shape
        keep = np.zeros((rows, columns), bool)
        for top in range(0, rows, 16):
            for left in range(0, columns, 16):
                count += 1
                for row in range(top, min(top + 16, rows)):
                    for group in range(left, min(left + 16, columns), 4):
                        kept = range(4) if count % every == 0 else generator.choice(4, 2, replace=False)
                        keep[row, [group + place for place in kept]] = True
        masks[name] = keep
    return masks


def write(path, masks: dict[str, np.ndarray], meta: dict | None = None) -> None:
    arrays = {}
    for name, keep in masks.items():
        arrays[f"{name}.weight"] = np.packbits(keep)
        arrays[f"{name}.weight.__shape__"] = np.array(keep.shape)
    np.savez(path, **arrays, __meta__=np.array(json.dumps(meta or {})))


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama")


def read(path, model, pattern: Pattern = TILES, sparsity: float = 0.4) -> MaskSet:
    return released_masks(fetch(str(path)), prunable_linears(model), pattern, sparsity)


def test_a_published_mask_becomes_a_mask_set_of_the_model(model, tmp_path):
    expected = keep_masks(model, 0.2)
    write(tmp_path / "mask.npz", expected, {"measured_sparsity": 0.4})
    masks = read(tmp_path, model)  # a directory that holds mask.npz
    assert list(masks.linears) == list(prunable_linears(model))
    for name, keep in expected.items():
        assert masks.linears[name].pattern == TILES
        assert masks.linears[name].keep_mask().tolist() == keep.tolist()
    assert masks.base_fingerprint == fingerprint(prunable_linears(model))
    assert masks.recipe["released"]["claimed_sparsity"] == 0.4
    masks.save(tmp_path / "mask.safetensors")
    MaskSet.load(tmp_path / "mask.safetensors").apply_(prunable_linears(model))
    pruned = sum(int((linear.weight == 0).sum()) for linear in prunable_linears(model).values())
    assert pruned == sum(int((~keep).sum()) for keep in expected.values())


def test_weights_that_were_zero_before_do_not_break_the_pattern(model, tmp_path):
    expected = keep_masks(model, 0.2)
    weight = prunable_linears(model)[LAYER].weight
    flat = expected[LAYER].reshape(-1, 4)
    dense_group, sparse_group = int(np.argmax(flat.all(1))), int(np.argmin(flat.all(1)))
    published = {name: keep.copy() for name, keep in expected.items()}
    for group, value in ((dense_group, 0.0), (sparse_group, 1e-9)):  # 1e-9 is 0 in float16
        place = int(np.argmax(flat[group]))
        weight.view(-1, 4)[group, place] = value
        published[LAYER].reshape(-1, 4)[group, place] = False
    write(tmp_path / "mask.npz", published)
    mask = read(tmp_path, model).linears[LAYER]
    assert mask.keep_mask().tolist() == expected[LAYER].tolist()
    assert mask.pattern == TILES


def test_a_mask_that_is_2_4_everywhere(model, tmp_path):
    expected = keep_masks(model, 1e-6)
    write(tmp_path / "mask.npz", expected)
    masks = read(tmp_path, model, Pattern.parse("2:4"), 0.5)
    assert masks.sparsity == 0.5
    assert str(masks.linears[LAYER].pattern) == "2:4"


def test_a_group_that_breaks_the_pattern_is_named(model, tmp_path):
    published = keep_masks(model, 0.2)
    groups = published[LAYER].reshape(published[LAYER].shape[0], -1, 4)
    groups[0, 1] = [True, True, True, False]
    write(tmp_path / "mask.npz", published)
    with pytest.raises(PatchError, match=rf"layer {LAYER}: 1 groups break .* row 0, columns 4 to 7: it keeps 3 of 4"):
        read(tmp_path, model)


def test_a_mask_of_another_sparsity_is_refused(model, tmp_path):
    write(tmp_path / "mask.npz", keep_masks(model, 0.2))
    with pytest.raises(PatchError, match=r"prunes (39|40)\.\d\d %, not 25 %"):
        read(tmp_path, model, sparsity=0.25)


def test_a_wrong_claim_is_told(model, tmp_path, caplog):
    write(tmp_path / "mask.npz", keep_masks(model, 0.2), {"measured_sparsity": 45.0})
    read(tmp_path, model)
    assert "says that it prunes 45.00 %" in caplog.text


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("llama", {"intermediate_size": 64}, r"layer .*\(96, 64\): the model has \(64, 64\)"),
        ("opt", {}, "the model has no such layer"),
        ("llama", {"num_hidden_layers": 3}, "has no mask of 7 of the model's layers"),
    ],
)
def test_a_mask_of_another_model_is_refused(architecture, changes, message, model, tiny_model, tmp_path):
    write(tmp_path / "mask.npz", keep_masks(model, 0.2))
    with pytest.raises(PatchError, match=message):
        read(tmp_path, tiny_model(architecture, **changes))


def test_a_truncated_file_is_refused(model, tmp_path):
    write(tmp_path / "mask.npz", keep_masks(model, 0.2))
    content = (tmp_path / "mask.npz").read_bytes()
    (tmp_path / "mask.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(PatchError, match=r"not a mask\.npz of the official release"):
        read(tmp_path, model)


SPRUNG: list[int] = []


def spring() -> None:
    SPRUNG.append(1)


class Trap:
    """Unpickling it would leave a trace."""

    def __reduce__(self):
        return spring, ()


def test_pickled_objects_are_refused_without_running_them(model, tmp_path):
    shape = np.array([1, 1])
    np.savez(tmp_path / "mask.npz", **{"a.weight": np.array([Trap()], object), "a.weight.__shape__": shape})
    with pytest.raises(PatchError, match="Object arrays cannot be loaded"):
        read(tmp_path, model)
    assert not SPRUNG


def test_a_file_that_changed_since_it_was_fetched_is_refused(model, tmp_path):
    write(tmp_path / "mask.npz", keep_masks(model, 0.2))
    released = fetch(str(tmp_path))
    released.write(tmp_path / "released.json")
    assert ReleasedFile.read(tmp_path / "released.json") == released
    write(tmp_path / "mask.npz", keep_masks(model, 0.2, seed=1))
    with pytest.raises(PatchError, match="not the file that was fetched; prepare it again"):
        released_masks(released, prunable_linears(model), TILES, 0.4)


def test_what_is_not_there_ends_in_one_clear_line(tmp_path):
    with pytest.raises(PatchError, match=r"released mask .*mask\.npz: no such file"):
        fetch(str(tmp_path))
    with pytest.raises(PatchError, match="not in the local cache and the hub cannot be reached"):
        fetch("nobody/nothing-PATCH-45Sparse")


def test_the_source_is_filled_in(tmp_path):
    method = make_method("released", {"name": "gemma_3_1b", "recipe": "MaskLLM"})
    assert method.location(50.0) == "mohammad-mozaffari/gemma_3_1b-MaskLLM-50Sparse"
    assert make_method("released", {"source": "./{sparsity}/mask.npz"}).location(45.0) == "./45/mask.npz"
    with pytest.raises(PatchError, match="set its option `name`"):
        make_method("released", {}).location(45.0)


def test_the_command_takes_it_with_and_without_preparing(model_directory, model, tmp_path):
    write(tmp_path / "40.npz", keep_masks(model, 0.2))
    prune = [
        "prune", "--model", model_directory, "--method", "released", "--pattern", "tiles:16x16", "--sparsity", "40",
        "--set", f"source={tmp_path}/{{sparsity}}.npz", "--output",
    ]  # fmt: skip
    prepare = ["prepare", "released", "--source", tmp_path / "40.npz", "--output", tmp_path / "released.json"]
    prepared = [*prune, tmp_path / "b", "--released", tmp_path / "released.json"]
    for arguments in ([*prune, tmp_path / "a"], prepare, prepared):
        done = subprocess.run([sys.executable, "-m", "patch", *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    records = [json.loads((tmp_path / name / "record.json").read_text()) for name in "ab"]
    assert records[0]["outputs"].keys() == {"mask.safetensors"}
    assert records[0]["inputs"] == records[1]["inputs"]
    assert records[0]["inputs"]["released"] == ReleasedFile.read(tmp_path / "released.json").checksum
    masks = MaskSet.load(tmp_path / "a" / "mask.safetensors")
    assert torch.equal(
        masks.linears[LAYER].keep_mask(), torch.from_numpy(keep_masks(model, 0.2)[LAYER])
    )  # fmt: skip
