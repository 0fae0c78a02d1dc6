"""Which kernel multiplies by a hybrid weight: measured once for every case, kept in a file, and explained.

A case is a GPU, a dtype, a shape, a share of 2:4 tiles (to 5 %) and a number of tokens (to the next power of two). On
its first call all kernels that support it run on the weight itself, beside a dense layer of the same shape, and the
fastest one serves the case from then on, in later processes too: times are kept in a file for the GPU, the kernels'
source and PyTorch. `patch.load` leaves layers dense that no kernel makes fast enough. While a CUDA graph is captured
nothing is measured; without a known case a rule of thumb decides.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import torch
from torch import Tensor
from torch.nn import functional as F

from patch.artefacts import PatchError, write_json
from patch.cache import cache_directory
from patch.kernels import runs_triton
from patch.kernels.hybrid import hopper
from patch.kernels.hybrid.format import DENSE_BYTES, SPARSE_BYTES, HybridWeight, reference_matmul, unpack

FEWEST_PREFILL_TOKENS = 33
"""Below, its tiles of 256 tokens are mostly padding."""
MOST_TOKENS = 8192
"""Larger calls count as this many tokens."""
SLOWER = 1.03
"""A layer counts as slower than dense from this factor on."""
LARGEST_ERROR = 0.02
"""A kernel whose output is further than this from the plain product, as a share of the largest output, is left out."""
SCHEMA = "patch.kernel-times/1"
REPEATS = 7
SHORTEST_WAIT, LONGEST_WAIT = 400_000, 12_800_000
"""Clock cycles, some 0.2 to 6.4 ms, that the device waits for the host before a call that is timed."""
log = logging.getLogger(__name__)

Refusal = Callable[[torch.device, int, HybridWeight], str | None]
"""`refusal(device, tokens, weight)`: why a kernel cannot do this, or None."""


@dataclass(frozen=True)
class Kernel:
    refusal: Refusal
    multiply: Callable[[Tensor, HybridWeight, Tensor | None], Tensor]
    """x [tokens, in], weight, bias [out] or None -> [tokens, out]"""


@dataclass(frozen=True)
class Choice:
    """A kernel and why it was chosen."""

    kernel: str
    reason: str
    microseconds: Mapping[str, float] = field(default_factory=dict)
    """Measured times by kernel, "dense" for a dense layer of this shape; empty where nothing was measured."""

    @property
    def over_dense(self) -> float | None:
        """Time over that of the dense layer; None where it was not measured."""
        dense = self.microseconds.get("dense")
        return self.microseconds[self.kernel] / dense if dense else None


def matmul(x: Tensor, weight: HybridWeight, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] @ weight^T + bias -> [tokens, out], by the kernel that is the fastest for it here."""
    if not len(x):
        return x.new_empty(0, weight.out_features)
    return kernels()[choose(len(x), weight).kernel].multiply(x, weight, bias)


def choose(tokens: int, weight: HybridWeight) -> Choice:
    """The kernel for a product with `tokens` rows; measures where the case is new and no graph is being captured.

    Raises PatchError where no kernel can do it.
    """
    key = (weight.device, tokens, weight.dtype, weight.shape, weight.payload.numel())
    if key not in _CHOICES:
        choice = _choose(tokens, weight)
        if choice is None:
            usable, _ = _usable(tokens, weight)
            kernel = min(usable, key=_rule_of_thumb(tokens).index)
            return Choice(kernel, "not measured before the capture of a CUDA graph, where nothing can be")
        _CHOICES[key] = choice
    return _CHOICES[key]


_CHOICES: dict[tuple[torch.device, int, torch.dtype, tuple[int, int], int], Choice] = {}


def _choose(tokens: int, weight: HybridWeight) -> Choice | None:
    """None where it takes a measurement that cannot be made now."""
    usable, refused = _usable(tokens, weight)
    case = case_of(tokens, weight)
    if len(usable) == 1 and weight.device.type != "cuda":
        return Choice(usable[0], f"nothing else runs here ({'; '.join(refused)})")
    times = _times(weight.device)
    missing = [name for name in usable if name not in times.get(case, {})]
    if missing and torch.cuda.is_current_stream_capturing():
        return None
    if missing:
        times[case] = times.get(case, {}) | measure(bucket(tokens), weight, missing)
    measured = {name: time for name, time in times[case].items() if name in usable}
    if not measured:
        raise PatchError(f"{case}: no kernel gives the right product on this GPU; see the warnings above.")
    reason = ", ".join(f"{name} {time:.1f} us" for name, time in sorted(times[case].items(), key=lambda item: item[1]))
    return Choice(min(measured, key=measured.__getitem__), "; ".join([reason, *refused]), times[case])


def check(weight: HybridWeight) -> None:
    """Raise PatchError where no kernel can multiply by `weight` on its device."""
    _usable(1, weight)


def _usable(tokens: int, weight: HybridWeight) -> tuple[list[str], list[str]]:
    """The kernels for these tokens and for those that the case is measured with, and what the others say.

    Raises PatchError where there is none.
    """
    refusals = {
        name: kernel.refusal(weight.device, tokens, weight) or kernel.refusal(weight.device, bucket(tokens), weight)
        for name, kernel in kernels().items()
    }
    usable = [name for name, refusal in refusals.items() if not refusal]
    refused = [f"{name}: {refusal}" for name, refusal in refusals.items() if refusal]
    if not usable:
        raise PatchError(
            f"{case_of(tokens, weight)}: no kernel runs on {weight.device} ({'; '.join(refused)}); load the model with "
            'dtype="float16", or run its dense export.'
        )
    return usable, refused


@functools.cache
def kernels() -> dict[str, Kernel]:
    """All kernels by name."""
    return {
        "decode": Kernel(_decode_refusal, hopper.decode),
        "prefill": Kernel(_prefill_refusal, hopper.prefill),
        "triton": Kernel(_triton_refusal, _triton),
        "unpack": Kernel(_triton_refusal, _unpack),
        "reference": Kernel(_reference_refusal, reference_matmul),
    }


def bucket(tokens: int) -> int:
    """The number of tokens that a case is measured with: the next power of two."""
    return min(1 << (tokens - 1).bit_length(), MOST_TOKENS)


def sparse_share(weight: HybridWeight) -> float:
    """Share of 2:4 tiles, from the size of the payload: nothing is read from the device."""
    tiles = weight.descriptors.numel()
    return (tiles * DENSE_BYTES - weight.payload.numel()) / (tiles * (DENSE_BYTES - SPARSE_BYTES))


def case_of(tokens: int, weight: HybridWeight) -> str:
    """The key of a case in the file of times, such as "bfloat16 4096x11008, 90 % of tiles 2:4, 16 tokens"."""
    dtype, (rows, columns) = str(weight.dtype).removeprefix("torch."), weight.shape
    return f"{dtype} {rows}x{columns}, {5 * round(20 * sparse_share(weight))} % of tiles 2:4, {bucket(tokens)} tokens"


@torch.no_grad()
def measure(tokens: int, weight: HybridWeight, names: list[str]) -> dict[str, float]:
    """Microseconds of the kernels `names`, and of a dense layer under "dense", with a cache that holds none of it.

    A kernel that fails, or whose output is not the product, is left out with a warning.
    """
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(tokens, weight.in_features, generator=generator, device=weight.device).to(weight.dtype)
    dense = unpack(weight)
    expected = F.linear(x, dense)
    times = {"dense": _microseconds(lambda: F.linear(x, dense), weight.device)}
    for name in names:
        multiply = kernels()[name].multiply
        try:
            error = float((multiply(x, weight, None) - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
            if not error <= LARGEST_ERROR:
                raise PatchError(f"its output is off by {error:.2g} of the largest value")
            times[name] = _microseconds(lambda multiply=multiply: multiply(x, weight, None), weight.device)  # type: ignore[misc]
        except (PatchError, torch.OutOfMemoryError) as error:
            log.warning("kernel %s is not used for %s (%s)", name, case_of(tokens, weight), str(error).splitlines()[0])
    return times


def _microseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median over calls that each find the L2 cache full of something else and the queue of the device filled.

    The device waits while the host launches the call, and longer from then on where that was not long enough: a busy
    host's time would otherwise count as the kernel's.
    """
    cache = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    call()
    times: list[float] = []
    wait = SHORTEST_WAIT
    while len(times) < REPEATS:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(wait)
        start.record()
        call()
        end.record()
        late = start.query()
        end.synchronize()
        if late and wait < LONGEST_WAIT:
            wait *= 2
        else:
            times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def _rule_of_thumb(tokens: int) -> list[str]:
    """All kernels, those first that are expected to be the fastest."""
    if tokens <= hopper.MOST_DECODE_TOKENS:
        return ["decode", "triton", "unpack", "prefill", "reference"]
    return ["prefill", "unpack", "triton", "decode", "reference"]


def _decode_refusal(device: torch.device, tokens: int, weight: HybridWeight) -> str | None:
    if tokens > hopper.MOST_DECODE_TOKENS:
        return f"for up to {hopper.MOST_DECODE_TOKENS} tokens"
    return hopper.supports(device, tokens, weight)


def _prefill_refusal(device: torch.device, tokens: int, weight: HybridWeight) -> str | None:
    if tokens < FEWEST_PREFILL_TOKENS:
        return f"for {FEWEST_PREFILL_TOKENS} tokens and more"
    # as for many tokens, of which more is asked
    return hopper.supports(device, max(tokens, hopper.MOST_DECODE_TOKENS + 1), weight)


def _triton_refusal(device: torch.device, tokens: int, weight: HybridWeight) -> str | None:
    if not runs_triton(weight.payload):
        return "needs a GPU and Triton"
    from patch.kernels.hybrid import triton_matmul

    return triton_matmul.refusal(device, tokens, weight)


def _triton(x: Tensor, weight: HybridWeight, bias: Tensor | None) -> Tensor:
    from patch.kernels.hybrid import triton_matmul

    return triton_matmul.matmul(x, weight, bias)


def _unpack(x: Tensor, weight: HybridWeight, bias: Tensor | None) -> Tensor:
    """cuBLAS on a dense copy that lives for this call."""
    from patch.kernels.hybrid import triton_matmul

    return F.linear(x, triton_matmul.unpack(weight), bias)


def _reference_refusal(device: torch.device, tokens: int, weight: HybridWeight) -> str | None:
    return "for machines without a GPU or Triton" if runs_triton(weight.payload) else None


class Times(dict[str, dict[str, float]]):
    """{case: {kernel: microseconds}}, kept in a JSON file that other processes read and write too."""

    def __init__(self, path: Path):
        super().__init__(self._read(path))
        self.path = path

    def __setitem__(self, case: str, times: dict[str, float]) -> None:
        super().__setitem__(case, times)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{self.path}.lock"):
                content = {"schema": SCHEMA, "times": self._read(self.path) | {case: times}}
                write_json(self.path, content)
        except (OSError, PatchError) as error:
            log.warning("kernel times are not kept for later runs: %s", error)

    @staticmethod
    def _read(path: Path) -> dict[str, dict[str, float]]:
        """What is in the file; nothing where it is missing or not ours: then cases are measured again."""
        try:
            content = json.loads(path.read_text())
            if content["schema"] == SCHEMA:
                return {str(case): dict(times) for case, times in content["times"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: not readable, measured again (%s)", path, error)
        return {}


@functools.cache
def _times(device: torch.device) -> Times:
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
    return Times(cache_directory() / "kernel-times" / f"{name}-{_version()}.json")


@functools.cache
def _version() -> str:
    """Hash of the kernels' source and of PyTorch's version."""
    digest = hashlib.sha256(f"{torch.__version__} {torch.version.cuda}".encode())
    for path in sorted(Path(__file__).parent.glob("*")):
        if path.suffix in (".py", ".cu", ".cuh", ".h"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
