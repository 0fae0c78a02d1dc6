"""The CompressedSet artefact: a model's weights after pruning and quantisation, with their adapters, in a few bits.

One safetensors file of matrices: per linear `NAME` its weight [out, in], and where there are adapters NAME.left
[rank, in], the left factor transposed, and NAME.right [rank, out]. Of every matrix M it holds

    M.keep, M.codes, M.tiles   which entries are kept, as in a MaskSet (`patch.sparsity.maskset`)
    M.nibbles, M.maxima        4-bit codes of the kept entries, two to a byte, row-major, and a maximum per block,
    M.values                   or else the kept entries themselves

and in its header the schema version, a checksum, every matrix' pattern, shape and block, and the identity of the base
model. It needs no mask file beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patch.artefacts import PatchError, read_tensors, write_tensors
from patch.compression.quantisation import Quantised, pack_nibbles, unpack_nibbles
from patch.sparsity.maskset import LinearMask, check_model

SCHEMA = "patch.compressed/1"


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [rows, columns] of which only the kept entries are stored, as 4-bit codes or as they are. Immutable."""

    mask: LinearMask
    """With `values`, unless there are codes."""
    nibbles: Tensor | None = None
    """uint8 [ceil(kept / 2)]"""
    maxima: Tensor | None = None
    """[row blocks, column blocks]; None without codes, as is `block`."""
    block: tuple[int, int] | None = None

    @classmethod
    def quantised(cls, matrix: Quantised, mask: LinearMask | None = None) -> StoredMatrix:
        """Codes of entries that `mask` (None: nothing) drops are not stored; its values, if any, are not used."""
        mask = mask or LinearMask.dense((matrix.codes.shape[0], matrix.codes.shape[1]))
        codes = matrix.codes[mask.keep_mask().to(matrix.codes.device)]
        return cls(replace(mask, values=None), pack_nibbles(codes), matrix.maxima, matrix.block)

    @classmethod
    def plain(cls, matrix: Tensor, mask: LinearMask | None = None) -> StoredMatrix:
        """The entries of `matrix` that `mask` keeps (None: all), in its dtype."""
        mask = mask or LinearMask.dense((matrix.shape[0], matrix.shape[1]))
        return cls(replace(mask, values=matrix[mask.keep_mask().to(matrix.device)]))

    @torch.no_grad()
    def dense(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """[rows, columns]; entries that are not kept are exactly 0."""
        mask = self.mask.to(device)
        if self.nibbles is None or self.maxima is None or self.block is None:
            matrix = torch.empty(mask.shape, dtype=dtype, device=device)
            mask.apply_(matrix)
            return matrix
        keep = mask.keep_mask()
        codes = torch.zeros(mask.shape, dtype=torch.int8, device=device)
        codes[keep] = unpack_nibbles(self.nibbles.to(device), int(keep.sum()))
        return Quantised(codes, self.maxima.to(device), self.block).dequantise(dtype)

    def tensors(self) -> dict[str, Tensor]:
        found = self.mask.tensors()
        for suffix, tensor in (("nibbles", self.nibbles), ("maxima", self.maxima)):
            if tensor is not None:
                found[suffix] = tensor
        return found

    def description(self) -> dict[str, Any]:
        return self.mask.description() | ({"block": list(self.block)} if self.block else {})

    @classmethod
    def from_tensors(cls, name: str, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StoredMatrix:
        """Inverse of `tensors` and `description`, unverified."""
        height, width = description.get("block", (0, 0))
        mask = LinearMask.from_tensors(name, description, tensors)
        stored = (tensors.get(f"{name}.nibbles"), tensors.get(f"{name}.maxima"))
        return cls(mask, *stored, (height, width) if "block" in description else None)

    def verify(self) -> None:
        """Raise ValueError unless mask, codes and maxima fit each other and every number is finite."""
        self.mask.verify()
        if self.block is None:
            if self.mask.values is None:
                raise ValueError("neither values nor codes are in the file")
            if not self.mask.values.isfinite().all():
                raise ValueError("its values hold NaN or Inf")
            return
        kept, grid = self.mask.kept, [-(-n // size) for n, size in zip(self.mask.shape, self.block, strict=True)]
        if self.nibbles is None or self.nibbles.numel() != -(-kept // 2):
            raise ValueError(f"its packed codes do not fit {kept} kept weights")
        if self.maxima is None or list(self.maxima.shape) != grid:
            raise ValueError(f"its maxima do not fit {grid[0]} x {grid[1]} blocks")
        if not (self.maxima.isfinite() & (self.maxima >= 0)).all():
            raise ValueError("its maxima hold NaN, Inf or negative numbers")

    @property
    def bits(self) -> int:
        """Of all its tensors, masks included."""
        return 8 * sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def to(self, device: torch.device | str) -> StoredMatrix:
        nibbles, maxima = (None if tensor is None else tensor.to(device) for tensor in (self.nibbles, self.maxima))
        return StoredMatrix(self.mask.to(device), nibbles, maxima, self.block)


@dataclass(frozen=True)
class CompressedLinear:
    """One `nn.Linear` [out_features, in_features]: y = W_c x + right^T left x."""

    weight: StoredMatrix
    left: StoredMatrix | None = None
    """[rank, in]"""
    right: StoredMatrix | None = None
    """[rank, out]"""

    def matrices(self) -> Iterator[tuple[str, StoredMatrix]]:
        """By the suffix of the layer's name."""
        for suffix, matrix in (("", self.weight), (".left", self.left), (".right", self.right)):
            if matrix is not None:
                yield suffix, matrix

    @torch.no_grad()
    def apply_(self, linear: nn.Linear) -> None:
        """Give the layer these weights, and a hook that adds the adapters' outputs.

        The factors stay apart, as in SLIM with `--separate_lora` and as they would be deployed: added to the weights
        they would fill the zeros and, in 16 bits, be rounded with them. As in SLIM they compute in bfloat16, but in
        float32 in models of float32. They become buffers of the layer: they follow it to other devices, and are part of
        its state.
        """
        device = linear.weight.device
        linear.weight.copy_(self.weight.dense(linear.weight.dtype, device))
        if self.left is None or self.right is None:
            return
        dtype = torch.float32 if linear.weight.dtype == torch.float32 else torch.bfloat16
        linear.register_buffer("adapter_left", self.left.dense(dtype, device).T.contiguous())
        linear.register_buffer("adapter_right", self.right.dense(dtype, device))
        linear.register_forward_hook(_add_adapter)

    def verify(self) -> None:
        """Raise ValueError where a part is inconsistent, or the parts do not fit each other."""
        for suffix, matrix in self.matrices():
            try:
                matrix.verify()
            except ValueError as error:
                raise ValueError(f"{suffix.strip('.') or 'weight'}: {error}") from None
        outputs, inputs = self.weight.mask.shape
        if (self.left is None) != (self.right is None):
            raise ValueError("one factor of its adapter is not in the file")
        if self.left and self.right:
            (rank, width), (also, height) = self.left.mask.shape, self.right.mask.shape
            if (rank, width, height) != (also, inputs, outputs):
                raise ValueError(f"factors {rank} x {width} and {also} x {height} do not fit {outputs} x {inputs}")

    def to(self, device: torch.device | str) -> CompressedLinear:
        return CompressedLinear(*(None if m is None else m.to(device) for m in (self.weight, self.left, self.right)))  # type: ignore[arg-type]


@dataclass
class CompressedSet:
    """The compressed linears of one model."""

    linears: dict[str, CompressedLinear]
    """By the layer's name in the model."""
    base_fingerprint: str | None = None
    """Of the model before anything was pruned or quantised; None where unknown."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """How it was made: options, mask, calibration. For people and records."""
    checksum: str = ""
    """Of the file's content, once saved or loaded."""

    @property
    def bits_per_weight(self) -> float:
        """Size of all tensors, masks, scales and adapters included, over the number of weights they stand for."""
        return sum(matrix.bits for layer in self.linears.values() for _, matrix in layer.matrices()) / self.size

    @property
    def size(self) -> int:
        """Number of weights of the layers."""
        return sum(layer.weight.mask.size for layer in self.linears.values())

    def save(self, path: Path | str) -> str:
        """Verify, then write atomically; returns the checksum of the content."""
        self._verify(path)
        tensors: dict[str, Tensor] = {}
        layers: dict[str, dict[str, Any]] = {}
        for name, layer in self.linears.items():
            layers[name] = {}
            for suffix, matrix in layer.matrices():
                layers[name][suffix] = matrix.description()
                tensors |= {f"{name}{suffix}.{key}": tensor for key, tensor in matrix.tensors().items()}
        metadata = {"linears": layers, "base_fingerprint": self.base_fingerprint, "recipe": self.recipe}
        self.checksum = write_tensors(path, tensors, SCHEMA, metadata)
        return self.checksum

    @classmethod
    def load(cls, path: Path | str) -> CompressedSet:
        """Read and verify. Raises PatchError for a truncated, altered, foreign or inconsistent file."""
        tensors, metadata, checksum = read_tensors(path, SCHEMA)
        linears = {}
        for name, layer in metadata["linears"].items():
            try:
                parts = (
                    StoredMatrix.from_tensors(f"{name}{suffix}", layer[suffix], tensors) if suffix in layer else None
                    for suffix in ("", ".left", ".right")
                )
                linears[name] = CompressedLinear(*parts)  # type: ignore[arg-type]
            except ValueError as error:
                raise PatchError(f"{path}: layer {name}: {error}") from None
        found = cls(linears, metadata["base_fingerprint"], metadata["recipe"], checksum)
        found._verify(path)
        return found

    def apply_(self, linears: Mapping[str, nn.Linear]) -> None:
        """Compress the given layers in place, which must be those the set was made for, and on the device they are on.

        Raises PatchError, before anything changes, where they belong to another model.
        """
        masks = {name: layer.weight.mask for name, layer in self.linears.items()}
        check_model(masks, self.base_fingerprint, linears)
        for name, linear in linears.items():
            self.linears[name].apply_(linear)

    def _verify(self, path: Path | str) -> None:
        for name, layer in self.linears.items():
            try:
                layer.verify()
            except ValueError as error:
                raise PatchError(f"{path}: layer {name}: {error}; the file is not valid.") from None


def _add_adapter(linear: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    left, right = linear.adapter_left, linear.adapter_right
    assert isinstance(left, Tensor)
    assert isinstance(right, Tensor)
    return output + (arguments[0].to(left.dtype) @ left @ right).to(output.dtype)
