"""Every method of the paper and its controls: hyper-parameters with their sources.

Light on purpose (no torch): the grid, the workflow and the pruning code all read it.
Source tags: WANDA = locuslab/wanda, SGPT = IST-DASLab/sparsegpt, THAN = vectozavr/thanos,
SLIM = Paramathic/slim, PATCH = arXiv 2509.23410.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from patch.artefacts import PatchError

OneShot = Literal["magnitude", "wanda", "sparsegpt"]


class Method(BaseModel):
    """Base of all methods: closed and typed, so that a misspelt hyper-parameter is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    title: ClassVar[str]
    """Name as printed in tables."""
    patterns: ClassVar[tuple[str, ...]] = ()
    """What it can produce: kinds of pattern ("n:m", "unstructured", "tiles") or a pattern itself ("2:4")."""
    uses_calibration: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    """True for methods that train by gradient descent: stage `learn` instead of `prune`."""


class Dense(Method):
    """The unpruned model: the first row of every comparison."""

    title = "Dense"
    patterns = ("dense",)
    uses_calibration = False


class OneShotMethod(Method):
    """What every one-shot method shares."""

    layers: Literal["all", "mlp"] = "all"
    """mlp: leave attention dense. At 2:4 that prunes 33 % (LLaMA-2-7B) to 44 % (Qwen2.5-0.5B) of the weights that could
    be, which is the range of PATCH: a control that its paper lacks."""


class CalibratedMethod(OneShotMethod):
    """What one-shot methods that look at layer inputs share."""

    calibration_inputs: Literal["pruned", "dense"] = "pruned"
    """Whose activations a layer is judged by: those behind the pruned blocks before it, as in the papers, or those of
    the dense model, which are the same for all methods and sparsities: `prune` with several of them then needs one
    forward pass for all. Weight updates cannot make up for the error of earlier blocks then."""


class Random(OneShotMethod):
    """Drop weights drawn at random with the cell's seed: what any choice at all has to beat. Not in the paper."""

    title = "Random"
    patterns = ("n:m", "unstructured")
    uses_calibration = False


class Magnitude(OneShotMethod):
    """Drop the smallest |w|: per group of M, or per layer when unstructured (WANDA `prune_magnitude`)."""

    title = "Magnitude"
    patterns = ("n:m", "unstructured")
    uses_calibration = False


class Wanda(CalibratedMethod):
    """Drop the smallest |w| * ||x||: per group of M, or per output row when unstructured (arXiv 2306.11695)."""

    title = "Wanda"
    patterns = ("n:m", "unstructured")

    shift_zero_metrics: bool = False
    """Add the smallest positive input statistic to all of them, so that weights on dead inputs keep
    their order by magnitude (SLIM `shift_zeros`; off in the paper)."""


class SparseGPT(CalibratedMethod):
    """Optimal-brain-surgeon pruning column by column, with weight updates (arXiv 2301.00774)."""

    title = "SparseGPT"
    patterns = ("n:m", "unstructured")

    block_size: int = Field(128, ge=4, multiple_of=4)
    """Columns whose updates are propagated lazily together (SGPT default 128)."""
    damping: float = Field(0.01, gt=0)
    """Share of the mean Hessian diagonal that is added to the diagonal (SGPT default 0.01)."""


class Thanos(CalibratedMethod):
    """Wanda's scores with least-squares updates of whole rows, block by block (arXiv 2504.05346)."""

    title = "Thanos"
    patterns = ("n:m", "unstructured")

    block_size: int = Field(512, ge=4, multiple_of=4)
    """Columns whose mask is fixed, and whose pruned weights are made up for, together (512 in THAN `main.py`; 128 in
    its function's default and in PATCH's scripts)."""
    damping: float = Field(0.01, gt=0)
    """Share of the mean Hessian diagonal that is added to the diagonal (THAN default 0.01)."""
    dense_row: bool = False
    """Leave the row with the largest outputs dense, as the reference does in N:M mode at any setting of its
    `perc_outliers`: its slice ends one row early. It sees the last calibration sequence only. 2:4 only."""


class Trained(Method):
    """What every method shares that trains by gradient descent. Defaults: mask learning's (PATCH section 6.7)."""

    learned = True
    uses_calibration = False
    text: ClassVar[Literal["training", "documents"]] = "training"
    """Which text of the experiment it trains on."""

    steps: int = Field(2000, gt=0)
    """Optimiser steps."""
    batch_size: int = Field(256, gt=0)
    """Sequences per optimiser step, over all GPUs."""
    micro_batch_size: int = Field(1, gt=0)
    """Sequences per forward pass of one GPU."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak of the schedule, which ends at 0."""
    warmup_steps: int = Field(5, ge=0)
    """Steps of linear warm-up."""
    decay: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls to 0 after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    epsilon: float = Field(1e-8, gt=0)
    """Adam's; a larger one keeps logits with little gradient where they are, which very short runs need."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of what is trained."""
    max_grad_norm: float = Field(1.0, gt=0)
    """All gradients together are scaled down to this norm."""
    optimizer: Literal["adamw_torch", "adamw_fused", "adamw_8bit", "adamw_apex"] = "adamw_torch"
    """adamw_torch: PyTorch's. adamw_fused: our one-pass kernel, states in float32. adamw_8bit: the same with states in
    8 bits. adamw_apex: NVIDIA apex, where it is installed."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients are accumulated over micro-batches."""
    checkpointing: Literal["off", "activations", "all"] = "activations"
    """What the backward pass computes again instead of keeping it: nothing, each block's activations, or its
    effective weights too, which saves two bytes per weight and costs another drawing of the masks."""
    checkpoint_every: int = Field(50, gt=0)
    """Steps between saved states, more where saving would take over a tenth of the time. An interrupted job goes on
    from the last one."""

    @field_validator("checkpointing", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        """YAML reads `off` as false."""
        return "off" if value is False else value

    @property
    def fused(self) -> bool:
        """Whether the optimiser is our kernel: other precisions of gradients, and stochastic rounding."""
        return self.optimizer in ("adamw_fused", "adamw_8bit")

    def moment_bytes(self, element: int) -> int:
        """Of both moments of the optimiser, for a parameter of `element` bytes."""
        return {"adamw_torch": 2 * element, "adamw_fused": 8, "adamw_8bit": 2, "adamw_apex": 8}[self.optimizer]


class Learned(Trained):
    """What every method shares that learns masks on frozen weights (PATCH section 6.7, table 6.1)."""

    logits_dtype: Literal["float32", "bfloat16", "bfloat16_nearest"] = "float32"
    """bfloat16: rounded stochastically, for models whose float32 logits do not fit (needs adamw_fused or
    adamw_8bit). bfloat16_nearest: the official code's, in which steps below half a unit in the last place are lost."""
    noise: Literal["micro_batch", "step"] = "micro_batch"
    """How often Gumbel noise is drawn: for every micro-batch, as in the paper, or once per optimiser step,
    which makes masks nearly free but averages over less noise."""
    init_std: float = Field(0.014, gt=0)
    """Standard deviation of the random initial logits; priors are measured in it."""
    norm_weight: float = Field(0.0, ge=0)
    """Weight of the term that rewards large kept weights (lambda 2)."""
    norm_form: Literal["ratio", "squared_ratio", "sum", "squared_sum"] = "ratio"
    """ratio: sum of layer norms of W*M over that of W (the official code). squared_ratio: of squared norms (the
    paper's formula). sum, squared_sum: without the denominator (official MaskLLM mode; MaskLLM itself)."""
    norm_decay: bool = True
    """Let that term fade linearly to 0 over the steps, as the official code does."""

    @model_validator(mode="after")
    def _precisions_fit(self) -> Self:
        """PyTorch's and apex's optimisers need gradients in the logits' own type and cannot round stochastically."""
        if self.logits_dtype == "bfloat16" and not self.fused:
            raise ValueError("logits_dtype bfloat16 needs optimizer adamw_fused or adamw_8bit")
        if (self.logits_dtype == "float32") != (self.gradient_dtype == "float32") and not self.fused:
            raise ValueError("logits_dtype and gradient_dtype differ; that needs optimizer adamw_fused or adamw_8bit")
        return self

    @property
    def logit_bytes(self) -> tuple[int, int, int]:
        """Of a logit, of its gradient, and of both moments of its optimiser."""
        logit = 4 if self.logits_dtype == "float32" else 2
        gradient = 4 if self.gradient_dtype == "float32" else 2
        return logit, gradient, self.moment_bytes(logit)


class LearnedPatterns(Learned):
    """2:4 logits, six per group of 4 weights (MaskLLM's parametrisation)."""

    pattern_scale: tuple[float, float] = (100.0, 500.0)
    """Multiplier of the 2:4 logits, linear over the steps."""
    pattern_temperature: tuple[float, float] = (4.0, 0.05)
    """Gumbel-softmax temperature of the 2:4 logits, linear over the steps."""
    pattern_prior_strength: float = Field(3.0, ge=0)
    """Patterns of the one-shot 2:4 mask start this many standard deviations ahead."""
    hard_patterns: bool = False
    """Sample one pattern per group (straight-through gradients) instead of a soft mixture."""


class LearnedTiles(Learned):
    """One logit per tile: dense where it is positive."""

    tile_scale: tuple[float, float] = (100.0, 500.0)
    """Multiplier of the tile logits, linear over the steps."""
    tile_temperature: tuple[float, float] | None = None
    """Gumbel-softmax temperature of the tile logits, linear over the steps; None for the paper's: from 4 to 0.05 for
    patch_joint at 40 % sparsity and above, from 2 to 0.05 otherwise."""
    tile_prior_strength: float = Field(3.0, ge=0)
    """Tiles that the unstructured reference keeps densest start this many standard deviations ahead, the
    others as many behind."""
    hard_tiles: bool = False
    """Sample dense or sparse per tile (straight-through gradients) instead of a mixture."""
    density_weight: float = Field(3.0, ge=0)
    """Weight of |density - target| (lambda 1)."""
    density_target: Literal["global", "block"] = "global"
    """One target over the whole model, or one for every decoder block."""
    selection: Literal["sign", "topk", "balanced"] = "sign"
    """Which tiles end dense. sign: those with a positive logit, as in the paper; the realised sparsity is then what
    comes out. topk: the largest logits, as many as meet the target. balanced: the same with equally many per row of
    tiles within a layer, which evens out the work of inference kernels."""
    reference: OneShot | Literal["random"] = "sparsegpt"
    """One-shot method whose unstructured mask gives the tile prior."""


class MaskLLM(LearnedPatterns):
    """Learned 2:4 masks (arXiv 2409.17481); learning rate as in PATCH table 6.1, the norm term as in MaskLLM."""

    title = "MaskLLM"
    patterns = ("2:4",)

    learning_rate: float = Field(1e-4, gt=0)
    """Peak of the cosine schedule, which ends at 0 (MaskLLM itself: 5e-4)."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled decay of the logits."""
    norm_weight: float = Field(1e-5, ge=0)
    """Weight of the term that rewards large kept weights."""
    norm_form: Literal["ratio", "squared_ratio", "sum", "squared_sum"] = "squared_sum"
    """As in MaskLLM's `loss_func`; the other forms are explained under patch_joint."""
    prior: OneShot = "sparsegpt"
    """One-shot method whose 2:4 mask gives the prior (its weight updates are not used)."""


class PatchJoint(LearnedTiles, LearnedPatterns):
    """PATCH, tiles and 2:4 patterns learned together; defaults as in PATCH table 6.1."""

    title = "PATCH-Joint"
    patterns = ("tiles",)

    tile_scale: tuple[float, float] = (25.0, 350.0)
    """Multiplier of the tile logits, linear over the steps."""
    density_weight: float = Field(7.0, ge=0)
    """Weight of |density - target| (lambda 1)."""
    norm_weight: float = Field(10.0, ge=0)
    """Weight of the term that rewards large kept weights (lambda 2)."""
    prior: OneShot = "sparsegpt"
    """One-shot method whose 2:4 mask gives the prior of the patterns (its weight updates are not used)."""


class PatchTile(LearnedTiles):
    """PATCH, tiles learned on a frozen 2:4 mask; defaults as in PATCH table 6.1."""

    title = "PATCH-Tile"
    patterns = ("tiles",)

    learning_rate: float = Field(1e-4, gt=0)
    """Peak of the cosine schedule, which ends at 0."""
    norm_weight: float = Field(0.1, ge=0)
    """Weight of the term that rewards large kept weights (lambda 2)."""
    frozen: OneShot | Literal["maskllm"] = "maskllm"
    """Method whose 2:4 mask is frozen under the tiles (its weight updates are not used)."""


class TrainedWeights(Trained):
    """What every method shares that trains the model's weights themselves."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    decay: Literal["cosine", "linear"] = "linear"
    """How the learning rate falls to 0 after the warm-up."""
    rounding: Literal["none", "stochastic", "nearest"] = "none"
    """How the weights of a bfloat16 model take small steps. none: the optimiser works on a float32 copy of them.
    stochastic: no copy; rounded up or down at random, right on average (needs adamw_fused or adamw_8bit). nearest: no
    copy; steps below half a unit in the last place are lost. A float32 model has nothing to round."""
    checkpointing: Literal["off", "activations"] = "activations"
    """What the backward pass computes again instead of keeping it: nothing, or each block's activations."""

    @model_validator(mode="after")
    def _rounds(self) -> Self:
        if self.rounding == "stochastic" and not self.fused:
            raise ValueError("rounding stochastic needs optimizer adamw_fused or adamw_8bit")
        return self

    def weight_bytes(self, element: int) -> tuple[int, int, int]:
        """Beside a trained weight of `element` bytes: of its float32 copy, of its gradients (the model's, and those in
        float32 where they are summed or the optimiser wants them so), and of the optimiser's moments."""
        copy = 4 if self.rounding == "none" and element < 4 else 0
        summed = self.batch_size > self.micro_batch_size and self.gradient_dtype == "float32"
        converted = element < 4 and (summed or (copy > 0 and not self.fused))
        return copy, element + (4 if converted else 0), self.moment_bytes(copy or element)


class ProxSparse(TrainedWeights):
    """Train all weights while a proximal operator pulls the linear ones towards 2:4; of every 4 the 2 that end largest
    are kept, with their original values (arXiv 2502.00258). Defaults: amazon-science/ProxSparse, and of its settings
    per model that of LLaMA-3.1-8B, which PATCH's authors took for small models, too."""

    title = "ProxSparse"
    patterns = ("2:4",)
    text = "documents"

    steps: int = Field(400, gt=0)
    """Optimiser steps; the reference reads 400 documents once."""
    batch_size: int = Field(1, gt=0)
    """Documents per optimiser step, over all GPUs."""
    learning_rate: float = Field(5e-5, gt=0)
    """Peak of the schedule, which ends at 0. LLaMA-2, Qwen2.5-14B, OpenLLaMA: 1e-4; Mistral-7B: 5e-5."""
    warmup_steps: int = Field(40, ge=0)
    """Steps of linear warm-up, a tenth of all."""
    rounding: Literal["none", "stochastic", "nearest"] = "nearest"
    """As in the reference, whose proximal_weight is tuned with it; the others are explained under fine_tune."""
    checkpoint_every: int = Field(100, gt=0)
    """Steps between saved states, which hold all weights and the optimiser's moments."""
    proximal_weight: float = Field(0.85, ge=0)
    """Lambda of the proximal operator, which follows every step; it is not multiplied by the learning rate. LLaMA-2-7B:
    0.25, LLaMA-2-13B: 0.5, Qwen2.5-14B: 0.2, Mistral-7B: 20 or 25, OpenLLaMA: 1.0 (with documents of 2048 tokens)."""
    anchor_weight: float = Field(0.0, ge=0)
    """Weight of a term that holds kept weights near their original values (the reference's lambda 2, off there too)."""
    anchor_epsilon: float = Field(0.1, gt=0)
    """Added to the original magnitudes that this term divides by."""


class FineTune(TrainedWeights):
    """Sparse fine-tuning of a pruned model: the kept weights train, the others stay 0. A control of equal compute that
    the paper lacks: the defaults read as many tokens as mask learning. Optimiser as in SLIM `slim/fine_tune.py`."""

    title = "Fine-tuned"
    patterns = ("n:m", "unstructured", "tiles")

    learning_rate: float = Field(1e-5, gt=0)
    """Peak of the schedule, which ends at 0."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled decay of the weights."""
    start: OneShot | Literal["random", "thanos", "proxsparse", "maskllm", "patch_joint", "patch_tile"] = "sparsegpt"
    """Method whose mask, of the same pattern and sparsity, is kept, and whose weights are trained further."""


class Released(Method):
    """A mask that others have published in the format of the official release, on the model's own weights: nothing is
    pruned or trained, and everything is checked. Defaults: the masks of PATCH's authors."""

    title = "Released mask"
    patterns = ("2:4", "tiles")
    uses_calibration = False

    source: str = "mohammad-mozaffari/{name}-{recipe}-{sparsity}Sparse"
    """Repository on the hub, a directory or a file; {name}, {recipe} and {sparsity} (in percent) are filled in."""
    name: str = ""
    """What the source calls the model, such as qwen2.5_0.5b."""
    recipe: str = "PATCH"
    """What it calls the method: PATCH or MaskLLM."""
    file: str = "mask.npz"
    """Name of the file there."""
    revision: str | None = None
    """Commit, tag or branch on the hub; None for its newest."""

    def location(self, sparsity: float) -> str:
        """The source for a sparsity in percent. Raises PatchError where the model's name is wanted but not given."""
        if "{name}" in self.source and not self.name:
            raise PatchError(f"method 'released', source {self.source}: set its option `name`, the model's name there.")
        filled = self.source.replace("{name}", self.name).replace("{recipe}", self.recipe)
        return filled.replace("{sparsity}", f"{sparsity:g}")


METHODS: dict[str, type[Method]] = {
    "dense": Dense,
    "random": Random,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "thanos": Thanos,
    "proxsparse": ProxSparse,
    "maskllm": MaskLLM,
    "patch_joint": PatchJoint,
    "patch_tile": PatchTile,
    "fine_tune": FineTune,
    "released": Released,
}
MethodName = Literal[
    "dense",
    "random",
    "magnitude",
    "wanda",
    "sparsegpt",
    "thanos",
    "proxsparse",
    "maskllm",
    "patch_joint",
    "patch_tile",
    "fine_tune",
    "released",
]


def make_method(name: str, options: dict[str, Any]) -> Method:
    """The method `name` with its hyper-parameters.

    Raises PatchError for an unknown method and for wrong options.
    """
    if name not in METHODS:
        raise PatchError(f"method {name!r}: unknown; choose one of {', '.join(METHODS)}.")
    try:
        return METHODS[name](**options)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"]) or "several"
        known = ", ".join(METHODS[name].model_fields) or "none"
        raise PatchError(f"method {name!r}, option {key!r}: {problem['msg']}; its options are: {known}.") from None
