"""The compressed file: what it holds, that it comes back as it was, and that damage is told."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from patch.artefacts import PatchError, read_tensors, write_tensors
from patch.compression.artefact import SCHEMA, CompressedLinear, CompressedSet, StoredMatrix
from patch.compression.compress import compress_weight
from patch.compression.options import Compression
from patch.compression.quantisation import quantise
from patch.sparsity.maskset import LinearMask, fingerprint
from patch.sparsity.patterns import Pattern

SHAPE = (12, 16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(kind: str) -> LinearMask:
    keep = random(*SHAPE, seed=2) > 0
    two_four = (torch.arange(16) % 4 < 2).expand(SHAPE)
    if kind == "dense":
        return LinearMask.dense(SHAPE)
    if kind == "unstructured":
        return LinearMask.from_keep_mask(keep, Pattern("unstructured"))
    if kind == "2:4":
        return LinearMask.from_keep_mask(two_four, Pattern("n:m", 2, 4))
    tiles = torch.tensor([[True, False], [False, True]])
    return LinearMask.from_keep_mask(
        two_four | tiles.repeat_interleave(8, 0)[:12].repeat_interleave(8, 1),
        Pattern.parse("tiles:8x8"), dense_tiles=tiles,
    )  # fmt: skip


def linear(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(16, 12).requires_grad_(False)
    layer.weight.copy_(random(*SHAPE, seed=seed))
    layer.bias.copy_(random(12, seed=seed + 1))
    return layer.to(dtype)


ADAPTERS = Compression(group_size=8, adapter_rank=0.25)
SETTINGS = {
    "plain": Compression(group_size=8),
    "slim_quant": Compression(quantiser="slim_quant"),
    "adapters": ADAPTERS,
    "pruned": Compression(group_size=8, adapter_rank=0.25, adapter_sparsity="2:4"),
    "quantised": Compression(group_size=8, adapter_rank=0.25, adapter_sparsity="2:4", adapter_bits=4),
}


def compressed(mask: str = "2:4", settings: str = "adapters") -> tuple[CompressedSet, dict[str, nn.Linear]]:
    layers = {"a.up": linear(0), "a.up_left": linear(1)}
    made = {
        name: compress_weight(layer.weight, mask_of(mask), torch.linspace(0.5, 2, 16), SETTINGS[settings])
        for name, layer in layers.items()
    }
    return CompressedSet(made, fingerprint(layers), {"by": "hand"}), layers


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("mask", ["dense", "unstructured", "2:4", "tiles"])
def test_what_is_loaded_is_what_was_saved(mask: str, settings: str, tmp_path: Path) -> None:
    weights, layers = compressed(mask, settings)
    checksum = weights.save(tmp_path / "c.safetensors")
    loaded = CompressedSet.load(tmp_path / "c.safetensors")
    assert loaded.checksum == checksum
    assert (loaded.recipe, loaded.base_fingerprint) == ({"by": "hand"}, weights.base_fingerprint)
    assert loaded.bits_per_weight == weights.bits_per_weight
    for name in layers:
        for (suffix, ours), (other, theirs) in zip(
            weights.linears[name].matrices(), loaded.linears[name].matrices(), strict=True
        ):
            assert suffix == other
            assert torch.equal(ours.dense(torch.float32), theirs.dense(torch.float32))
    pruned = ~mask_of(mask).keep_mask()
    assert (loaded.linears["a.up"].weight.dense(torch.float32)[pruned] == 0).all()


@pytest.mark.parametrize("mask", ["dense", "unstructured", "2:4", "tiles"])
def test_codes_of_kept_weights_survive_packing(mask: str) -> None:
    made = quantise(random(*SHAPE), Compression(group_size=8))
    keep = mask_of(mask).keep_mask()
    stored = StoredMatrix.quantised(made, mask_of(mask))
    assert stored.nibbles is not None
    assert stored.nibbles.numel() == (int(keep.sum()) + 1) // 2
    assert torch.equal(stored.dense(torch.float32), made.dequantise() * keep)


@pytest.mark.parametrize(
    ("mask", "settings", "bits"),
    [
        # per weight: codes, masks, and scales of 32 bits (float32 layers) for groups of 8 and, at the edge, 4 outputs
        ("dense", "plain", 4 + 32 * 2 / 12),
        ("2:4", "plain", 2 + 0.75 + 32 * 2 / 12),
        ("unstructured", "slim_quant", None),
        # 3 components of 12 + 16 entries in 16 bits
        ("2:4", "adapters", 2 + 0.75 + 32 * 2 / 12 + 3 * 28 * 16 / 192),
    ],
)
def test_bits_per_weight_count_everything(mask: str, settings: str, bits: float | None, tmp_path: Path) -> None:
    weights, _ = compressed(mask, settings)
    if bits is None:
        kept = int(mask_of(mask).keep_mask().sum())
        bits = (8 * ((kept + 1) // 2) + 32 + 192) / 192
    assert weights.bits_per_weight == pytest.approx(bits)
    weights.save(tmp_path / "c.safetensors")
    tensors, _, _ = read_tensors(tmp_path / "c.safetensors", SCHEMA)
    assert 8 * sum(t.numel() * t.element_size() for t in tensors.values()) == pytest.approx(bits * 2 * 192)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", ["plain", "adapters", "quantised"])
def test_a_compressed_layer_computes_weight_and_adapter(settings: str, dtype: torch.dtype) -> None:
    weights, layers = compressed("2:4", settings)
    layer = layers["a.up"].to(dtype)
    made = weights.linears["a.up"]
    made.apply_(layer)
    assert torch.equal(layer.weight, made.weight.dense(dtype))
    inputs = random(3, 5, 16, seed=9).to(dtype)
    dense = made.weight.dense(torch.float32)
    if made.left and made.right:
        dense = dense + made.right.dense(torch.float32).T @ made.left.dense(torch.float32)
        assert layer.adapter_left.dtype == layer.adapter_right.dtype == dtype
        assert {"adapter_left", "adapter_right"} <= set(layer.state_dict())
    expected = inputs.float() @ dense.T + layer.bias.float()
    output = layer(inputs)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_models_in_float16_have_adapters_in_bfloat16() -> None:
    """Their range would not do for left factors of rarely used inputs."""
    weights, layers = compressed()
    layer = layers["a.up"].half()
    weights.linears["a.up"].apply_(layer)
    assert layer.adapter_left.dtype == torch.bfloat16
    assert layer(torch.ones(1, 16).half()).dtype == torch.float16


def test_a_model_with_other_weights_is_refused_before_anything_changes() -> None:
    weights, _ = compressed()
    others = {"a.up": linear(0), "a.up_left": linear(5)}
    with pytest.raises(PatchError, match="the weights differ"):
        weights.apply_(others)
    assert torch.equal(others["a.up"].weight, linear(0).weight)
    with pytest.raises(PatchError, match="belongs to another model"):
        weights.apply_({"b": linear(0)})


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "a.up.codes"), "layer a.up: its mask is not in the file"),
        (lambda t: without(t, "a.up.nibbles"), "layer a.up: weight: its packed codes do not fit 96 kept weights"),
        (lambda t: t | {"a.up.nibbles": t["a.up.nibbles"][1:]}, "its packed codes do not fit 96 kept weights"),
        (lambda t: t | {"a.up.maxima": t["a.up.maxima"][:1]}, "its maxima do not fit 2 x 16 blocks"),
        (lambda t: t | {"a.up.maxima": t["a.up.maxima"] * torch.nan}, "its maxima hold NaN, Inf or negative numbers"),
        (lambda t: t | {"a.up.maxima": -t["a.up.maxima"]}, "its maxima hold NaN, Inf or negative numbers"),
        (lambda t: t | {"a.up.codes": t["a.up.codes"] | 255}, "a pattern code is not one of the six 2:4 patterns"),
        (lambda t: without(t, "a.up.left.values"), "layer a.up: left: neither values nor codes are in the file"),
        (lambda t: t | {"a.up.left.values": t["a.up.left.values"][1:]}, "left: 47 values for 48 kept weights"),
        (lambda t: t | {"a.up.right.values": t["a.up.right.values"] / 0}, "right: its values hold NaN or Inf"),
    ],
)  # fmt: skip
def test_files_that_contradict_themselves_are_refused(change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    compressed()[0].save(path)
    tensors, metadata, _ = read_tensors(path, SCHEMA)
    write_tensors(path, change(tensors), SCHEMA, metadata)
    with pytest.raises(PatchError, match=message):
        CompressedSet.load(path)


def test_an_adapter_with_one_factor_or_of_another_layer_is_refused(tmp_path: Path) -> None:
    made = compressed()[0].linears["a.up"]
    assert made.right
    for wrong, message in (
        (CompressedLinear(made.weight, made.left), "one factor of its adapter is not in the file"),
        (CompressedLinear(made.weight, made.right, made.left), "factors 3 x 12 and 3 x 16 do not fit 12 x 16"),
    ):
        with pytest.raises(PatchError, match=message):
            CompressedSet({"a.up": wrong}).save(tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


def test_truncated_altered_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    compressed()[0].save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(PatchError, match="truncated or not a safetensors file"):
        CompressedSet.load(path)
    path.write_bytes(whole[:-10] + bytes(byte ^ 1 for byte in whole[-10:]))
    with pytest.raises(PatchError, match="its checksum does not match its content"):
        CompressedSet.load(path)
    write_tensors(path, {}, "patch.compressed/0", {})
    with pytest.raises(PatchError, match=r"written in schema patch\.compressed/0"):
        CompressedSet.load(path)
    with pytest.raises(PatchError, match="no such file"):
        CompressedSet.load(tmp_path / "none.safetensors")
