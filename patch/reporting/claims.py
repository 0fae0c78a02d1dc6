"""The claims of the paper, and whether a study bears them out.

results/published/claims.yaml holds every claim with a query from a small closed set; `judge` puts each query to every
model of a study. A verdict is strict: what a query asks for must hold everywhere it asks, and a cell that is missing
makes it "not run", unless what is there already contradicts the claim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from patch.artefacts import PatchError
from patch.experiments import UNCOMPRESSED
from patch.methods import METHODS
from patch.reporting.allocation import layers
from patch.reporting.comparisons import Comparisons, Difference
from patch.reporting.published import (
    DIRECTORY,
    PAPER_TOKENS,
    Published,
    as_learned,
    load_published,
    same_perplexity_protocol,
    same_tasks_protocol,
)
from patch.reporting.study import Study
from patch.reporting.summary import KEYS, settings, texts_of
from patch.reporting.targets import PAPER_TILES
from patch.sparsity.patterns import Pattern

Word = Literal["reproduced", "not reproduced", "not run"]
Metric = Literal["perplexity", "accuracy"]


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class CellOf(Closed):
    """A cell of any model."""

    method: str
    """As in configs, or "patch": patch_joint where the model has it, otherwise patch_tile."""
    pattern: str = ""
    """By default 2:4, and tiles of 128 x 128 for PATCH."""
    sparsity: float | None = None
    """Target in percent; none where the pattern fixes it, and where the query repeats for several."""
    variant: str = "default"
    compression: str = UNCOMPRESSED

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if self.method != "patch" and self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is unknown; choose patch or one of {', '.join(METHODS)}")
        Pattern.parse(self._pattern)
        return self

    @property
    def _pattern(self) -> str:
        if self.pattern or self.method == "dense":
            return self.pattern or "dense"
        return PAPER_TILES if self.method.startswith("patch") else "2:4"

    def at(self, sparsity: float | None) -> CellOf:
        """The cell at another sparsity, where it has none of its own."""
        return self if self.sparsity is not None or sparsity is None else self.model_copy(update={"sparsity": sparsity})

    def setting(self, model: _Model) -> dict[str, Any]:
        """The setting of a model that is meant, by KEYS."""
        method = self.method
        if method == "patch":
            method = "patch_joint" if "patch_joint" in model.methods else "patch_tile"
        fixed = Pattern.parse(self._pattern).fixed_sparsity
        sparsity = 100 * fixed if fixed is not None else self.sparsity
        setting = {
            "model": model.name,
            "sparsity": sparsity if sparsity is not None else 0.0,
            "method": method,
            "pattern": self._pattern,
            "variant": self.variant,
            "compression": self.compression,
        }
        return model.released.get(tuple(setting[name] for name in KEYS), setting)

    def title(self, model: _Model) -> str:
        """How evidence names it."""
        setting = self.setting(model)
        parts = [METHODS[setting["method"]].title]
        if self.method != "dense":
            parts.append(f"{setting['sparsity']:g} %")
        parts += [setting["pattern"].replace("tiles:", "tiles ")] if self.pattern else []
        parts += [part for part in (self.variant, self.compression) if part not in ("default", UNCOMPRESSED)]
        return " ".join(parts)


class _OverSparsities(Closed):
    sparsities: tuple[float, ...] = ()
    """Ask for each of these, in percent; cells with a sparsity of their own keep it."""

    @property
    def levels(self) -> tuple[float | None, ...]:
        return self.sparsities or (None,)


class Better(_OverSparsities):
    """A cell is better than each of some others, by more than a margin."""

    kind: Literal["better"]
    metric: Metric
    cell: CellOf
    than: tuple[CellOf, ...] = Field(min_length=1)
    margin: float = Field(0.0, ge=0)

    def answer(self, model: _Model) -> Iterator[_Finding]:
        for level in self.levels:
            for other in self.than:
                yield model.compare(self.cell.at(level), other.at(level), self.metric, self.margin)


class Order(Closed):
    """Every cell is better than the one before it."""

    kind: Literal["order"]
    metric: Metric
    worst_to_best: tuple[CellOf, ...] = Field(min_length=2)

    def answer(self, model: _Model) -> Iterator[_Finding]:
        for worse, better in zip(self.worst_to_best, self.worst_to_best[1:], strict=False):
            yield model.compare(better, worse, self.metric)


class Spread(_OverSparsities):
    """The values of some cells lie within a bound."""

    kind: Literal["spread"]
    metric: Metric
    cells: tuple[CellOf, ...] = Field(min_length=2)
    at_most: float = Field(gt=0)

    def answer(self, model: _Model) -> Iterator[_Finding]:
        for level in self.levels:
            cells = [cell.at(level) for cell in self.cells]
            values = [model.value(cell, self.metric) for cell in cells]
            there = [value for value in values if value is not None]
            where = "" if level is None else f"at {level:g} %: "
            width = max(there) - min(there) if len(there) > 1 else 0.0
            text = f"{where}{min(there):.2f} to {max(there):.2f}, spread {width:.2f}" if there else ""
            if width > self.at_most:
                yield _Finding(False, text)
            elif len(there) == len(values):
                yield _Finding(True, text)
            else:
                missing = next(cell for cell, value in zip(cells, values, strict=True) if value is None)
                yield _Finding(None, model.why_missing(missing, self.metric) + (f" ({text})" if len(there) > 1 else ""))


class Gain(Closed):
    """PATCH's differences to another cell are the stated ones."""

    kind: Literal["gain"]
    metric: Metric
    over: CellOf
    gains: dict[float, float] = Field(min_length=1)
    """By sparsity in percent; in points of accuracy, or perplexity saved."""
    tolerance: float = Field(gt=0)

    def answer(self, model: _Model) -> Iterator[_Finding]:
        for sparsity, gain in self.gains.items():
            cell = CellOf(method="patch", sparsity=sparsity)
            found = model.compare(cell, self.over, self.metric)
            if found.difference is None:
                yield found
            else:
                ours = abs(found.difference.value) * (1 if found.holds else -1)
                text = f"{found.text}, stated {gain:+.2f}"
                yield _Finding(abs(ours - gain) <= self.tolerance, text, found.difference)


class AsPublished(Closed):
    """A cell has the published value, measured by the published protocol."""

    kind: Literal["published"]
    cell: CellOf
    metric: Metric
    tolerance: float | None = None
    """Absolute."""
    relative: float | None = None
    """Or as a share of the published value."""

    @model_validator(mode="after")
    def _one_tolerance(self) -> Self:
        if (self.tolerance is None) == (self.relative is None):
            raise ValueError("give either tolerance or relative")
        return self

    def answer(self, model: _Model) -> Iterator[_Finding]:
        value, published = model.value(self.cell, self.metric), model.published(self.cell, self.metric)
        title = self.cell.title(model)
        if value is None:
            yield _Finding(None, model.why_missing(self.cell, self.metric))
        elif published is None:
            yield _Finding(None, f"{title}: {value:.2f}; nothing is published of this model by this protocol")
        else:
            allowed = self.tolerance if self.tolerance is not None else self.relative * published  # type: ignore[operator]
            text = f"{title}: {value:.2f}, published {published:.2f}, tolerance {allowed:.2f}"
            yield _Finding(abs(value - published) <= allowed, text)


class Realised(Closed):
    """Cells have the sparsity that was asked for."""

    kind: Literal["realised"]
    cells: tuple[CellOf, ...] = Field(min_length=1)
    tolerance: float = Field(gt=0)
    """Points of sparsity."""

    def answer(self, model: _Model) -> Iterator[_Finding]:
        for cell in self.cells:
            realised = model.realised(cell)
            if realised is None:
                yield _Finding(None, model.why_missing(cell, None))
            else:
                gap = abs(realised - cell.setting(model)["sparsity"])
                yield _Finding(gap <= self.tolerance, f"{cell.title(model)}: {realised:.2f} % realised")


class Part(Closed):
    """Some of a model's layers."""

    kinds: tuple[str, ...] = ()
    """q, k, v, o, gate, up, down."""
    depth: tuple[float, float] | None = None
    """Blocks between these shares of the depth."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if bool(self.kinds) == (self.depth is not None):
            raise ValueError("give either kinds or depth")
        return self

    @property
    def title(self) -> str:
        if self.depth is None:
            return ", ".join(self.kinds)
        return f"blocks at {100 * self.depth[0]:g} to {100 * self.depth[1]:g} % of the depth"

    def percent(self, table: pd.DataFrame) -> float | None:
        """Sparsity of these layers together; None where the model has none of them."""
        if self.depth is None:
            own = table[table["kind"].isin(self.kinds)]
        else:
            low, high = (share * (table["block"].max() + 1) for share in self.depth)
            own = table[(table["block"] + 0.5 >= low) & (table["block"] + 0.5 < high)]
        weights = own["weights"].fillna(1.0)
        return float((own["percent"] * weights).sum() / weights.sum()) if len(own) else None


class Allocation(_OverSparsities):
    """Some layers are pruned less than others, or than a bound."""

    kind: Literal["allocation"]
    cell: CellOf
    less: Part
    more: Part | None = None
    at_most: float | None = None
    """Percent."""

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.more is None) == (self.at_most is None):
            raise ValueError("give either more or at_most")
        return self

    def answer(self, model: _Model) -> Iterator[_Finding]:
        for level in self.levels:
            cell = self.cell.at(level)
            table = model.layers(cell)
            less = self.less.percent(table)
            more = self.more.percent(table) if self.more else self.at_most
            if less is None or more is None:
                why = model.why_missing(cell, None) if table.empty else f"{cell.title(model)}: has no such layers"
                yield _Finding(None, why)
                continue
            other = f"{self.more.title} {more:.1f} %" if self.more else f"bound {more:g} %"
            text = f"{cell.title(model)}: {self.less.title} {less:.1f} %, {other}"
            yield _Finding(less < more if self.more else less <= more, text)


class Cost(Closed):
    """Learning takes at most the stated GPU hours, for as many tokens as the paper's."""

    kind: Literal["cost"]
    cell: CellOf
    gpu_hours: dict[str, float] = Field(min_length=1)
    """By the model's source."""

    def answer(self, model: _Model) -> Iterator[_Finding]:
        stated = self.gpu_hours.get(model.source)
        hours, tokens = model.learning(self.cell)
        if stated is None:
            yield _Finding(None, "nothing is stated for this model")
        elif hours is None or tokens is None:
            yield _Finding(None, model.why_missing(self.cell, None, "no GPU hours were recorded"))
        elif abs(tokens / PAPER_TOKENS - 1) > 0.02:
            yield _Finding(None, f"learned on {tokens / 1e6:.0f} M tokens, the paper's are {PAPER_TOKENS / 1e6:.0f} M")
        else:
            yield _Finding(hours <= stated, f"{hours:.1f} GPU hours, stated {stated:g}")


class _Benchmark(Closed):
    """A question to generation.csv, not to cells."""

    of_benchmark: ClassVar[bool] = True
    model: str
    """Part of the model's name there, small letters."""

    def _rows(self, table: pd.DataFrame) -> pd.DataFrame:
        return table[table["model"].astype(str).str.lower().str.contains(self.model, regex=False)]


class Speed(_Benchmark):
    """Generation is at least so many times as fast as dense."""

    kind: Literal["speed"]
    batch: int
    prefill_tokens: int
    generated_tokens: int
    gpu: str = ""
    """Part of the GPU's name, where the claim is one for this GPU."""
    at_least: dict[float, float] = Field(min_length=1)
    """By sparsity in percent."""

    def answer_benchmark(self, table: pd.DataFrame) -> Iterator[_Finding]:
        rows = self._rows(table)
        for name in ("batch", "prefill_tokens", "generated_tokens"):
            rows = rows[rows[name] == getattr(self, name)]
        for sparsity, bound in self.at_least.items():
            own = rows[((rows["sparsity_percent"] - sparsity).abs() < 0.5) & rows["speedup"].notna()]
            if own.empty:
                yield _Finding(None, f"{sparsity:g} %: not measured")
                continue
            records: list[dict[Any, Any]] = own.sort_values("speedup").to_dict("records")
            there = [row for row in records if self.gpu in str(row.get("gpu", ""))]
            best = (there or records)[-1]
            gpu = f" on {best['gpu']}" if "gpu" in best else ""
            text = f"{sparsity:g} %: {best['speedup']:.2f}×{gpu}, stated {bound:.2f}×"
            yield _Finding(best["speedup"] >= bound if there else None, text)


class Memory(_Benchmark):
    """Inference takes at most so much of the dense model's memory."""

    kind: Literal["memory"]
    at_most: dict[float, float] = Field(min_length=1)
    """By sparsity in percent."""

    def answer_benchmark(self, table: pd.DataFrame) -> Iterator[_Finding]:
        rows = self._rows(table)
        for sparsity, bound in self.at_most.items():
            own = rows[(rows["sparsity_percent"] - sparsity).abs() < 0.5]
            ratio = (own["hybrid_gib"] / own["dense_gib"]).min()
            if pd.isna(ratio):
                yield _Finding(None, f"{sparsity:g} %: not measured")
            else:
                yield _Finding(bool(ratio <= bound), f"{sparsity:g} %: {ratio:.2f} of dense, stated {bound:.2f}")


Query = Annotated[
    Better | Order | Spread | Gain | AsPublished | Realised | Allocation | Cost | Speed | Memory,
    Field(discriminator="kind"),
]


class Claim(Closed):
    """One claim."""

    id: str
    statement: str
    source: str
    models: tuple[str, ...]
    """Hub ids of the models that it is made for."""
    only: bool = False
    """Whether it says something of these models alone; it is then not asked of others."""
    query: Query


@dataclass(frozen=True)
class Verdict:
    """What a study says about a claim, for one model."""

    claim: Claim
    model: str
    of_paper: bool
    """Whether the claim is made for this model."""
    verdict: Word
    evidence: str
    p: float = math.nan
    """The largest p-value among the comparisons that the verdict rests on; missing where there are none."""
    paired: bool = True
    """Whether all of them are paired."""


def load_claims(path: Path | str = DIRECTORY / "claims.yaml") -> list[Claim]:
    """Read the ledger. Raises PatchError that names the claim and what is wrong with it."""
    try:
        entries = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise PatchError(f"{path}: no such file; the claims belong to the checkout, get them from git.") from None
    except yaml.YAMLError as error:
        raise PatchError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from None
    claims: list[Claim] = []
    for number, entry in enumerate(entries or []):
        name = entry.get("id", f"number {number + 1}") if isinstance(entry, dict) else f"number {number + 1}"
        try:
            claims.append(Claim.model_validate(entry))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise PatchError(
                f"{path}: claim {name}: {where}: {problem['msg'].removeprefix('Value error, ')}."
            ) from None
    twice = {claim.id for claim in claims if sum(other.id == claim.id for other in claims) > 1}
    if twice:
        raise PatchError(f"{path}: claim {min(twice)}: its id stands twice; ids must differ.")
    return claims


def judge(study: Study, claims: list[Claim]) -> list[Verdict]:
    """The verdict on every claim: for each model of the runs, or, for speed and memory, of the benchmark."""
    runs = study.runs
    compared = Comparisons(study)
    table = settings(runs)
    models = [_Model(str(name), study, own, compared) for name, own in table.groupby("model", sort=False)]
    verdicts = []
    for claim in claims:
        query = claim.query
        if isinstance(query, Speed | Memory):
            findings = list(query.answer_benchmark(study.generation))
            verdicts.append(_verdict(claim, query.model, True, findings))
        else:
            for model in models:
                of_paper = model.source in claim.models
                if claim.only and not of_paper:
                    findings = [_Finding(None, f"speaks of {', '.join(claim.models)} only")]
                else:
                    findings = list(query.answer(model))
                verdicts.append(_verdict(claim, model.name, of_paper, findings))
    return verdicts


def _verdict(claim: Claim, model: str, of_paper: bool, findings: list[_Finding]) -> Verdict:
    held = [finding.holds for finding in findings]
    word: Word = "not reproduced" if False in held else "not run" if None in held else "reproduced"
    # Of a claim that fails, what fails comes first.
    ordered = sorted(findings, key=lambda finding: {False: 0, True: 1, None: 2}[finding.holds])
    evidence = "; ".join(dict.fromkeys(finding.text for finding in ordered))
    decisive = [f.difference for f in findings if f.difference and (f.holds is False or word != "not reproduced")]
    p = max((difference.p for difference in decisive if not math.isnan(difference.p)), default=math.nan)
    return Verdict(claim, model, of_paper, word, evidence, p, all(difference.paired for difference in decisive))


@dataclass(frozen=True)
class _Finding:
    """The answer to one part of a query."""

    holds: bool | None
    """None where it cannot be said."""
    text: str
    difference: Difference | None = None


@dataclass
class _Model:
    """One model of a study, as queries see it."""

    name: str
    study: Study
    table: pd.DataFrame
    """Its rows of `summary.settings`."""
    compared: Comparisons
    methods: set[str] = field(init=False)
    source: str = field(init=False)
    released: dict[tuple[Any, ...], dict[str, Any]] = field(init=False)
    """Settings of released masks by those that they stand for."""

    def __post_init__(self) -> None:
        rows = self.table[["source", *KEYS]].to_dict("records")
        named = [(as_learned(row), row) for row in rows]
        self.methods = {str(name["method"]) for name, _ in named}
        self.source = str(self.table["source"].iloc[0])
        own = {tuple(row[key] for key in KEYS) for row in rows}
        keyed = ((tuple(name[key] for key in KEYS), row) for name, row in named if row["method"] == "released")
        self.released = {key: {name: row[name] for name in KEYS} for key, row in keyed if key not in own}
        self._published = Published(load_published())

    def compare(self, better: CellOf, worse: CellOf, metric: Metric, margin: float = 0.0) -> _Finding:
        """Whether the first is better than the second by more than a margin."""
        for cell in (better, worse):
            if self.value(cell, metric) is None:
                return _Finding(None, self.why_missing(cell, metric))
        first, second = better.setting(self), worse.setting(self)
        kind, subject = self._subject(metric)
        difference = self.compared.between(first, second, kind, subject)
        one, other = (self.compared.value(setting, kind, subject) for setting in (first, second))
        if difference is None or one is None or other is None:
            return _Finding(None, self.why_missing(better, metric))
        gained = -difference.value if metric == "perplexity" else difference.value
        error = "" if math.isnan(difference.stderr) else f" ± {difference.stderr:.2f}"
        gap = f"{difference.value:+.2f}".replace("-", "−")
        text = f"{better.title(self)} {one:.2f}, {worse.title(self)} {other:.2f} ({gap}{error})"
        return _Finding(gained > margin, text, difference)

    def value(self, cell: CellOf, metric: Metric) -> float | None:
        """Perplexity on the first text, or mean accuracy in percent; None where there is no finite one."""
        kind, subject = self._subject(metric)
        value = self.compared.value(cell.setting(self), kind, subject) if subject else None
        return value if value is not None and math.isfinite(value) else None

    def published(self, cell: CellOf, metric: Metric) -> float | None:
        """The published value of a cell, where ours was measured by the published protocol."""
        setting = cell.setting(self) | {"source": self.source}
        kind, subject = self._subject(metric)
        scores = self.compared.scores
        own = scores[(scores["metric"] == kind) & (scores["subject"] != "mean")]
        for name in KEYS:
            own = own[own[name] == setting[name]]
        protocols = dict(zip(own["subject"], own["protocol"], strict=True))
        found = self._published.get(setting, kind, "wikitext2" if metric == "perplexity" else "mean")
        if metric == "accuracy":
            return found[0] if found and same_tasks_protocol(protocols) else None
        protocol = protocols.get(subject, {})
        same = same_perplexity_protocol(protocol)
        return found[0] if found and same and found[1] == protocol["length"] else None

    def realised(self, cell: CellOf) -> float | None:
        """Realised sparsity in percent."""
        row = self._row(cell)
        return None if row is None or pd.isna(row["realised_sparsity"]) else float(row["realised_sparsity"])

    def layers(self, cell: CellOf) -> pd.DataFrame:
        """Sparsity of every layer, see `allocation.layers`."""
        return self._own(layers(self.study.runs), cell)

    def learning(self, cell: CellOf) -> tuple[float | None, float | None]:
        """GPU hours and tokens of learning a cell's mask, means over seeds; None where they were not recorded."""
        own = self._own(self.study.runs, cell)
        seconds = own.loc[(own["stage"] == "learn") & (own["metric"] == "gpu_s"), "value"].astype(float)
        curves = self.study.curves[self.study.curves["cell"].isin(set(own["cell"]))]
        if seconds.empty or curves.empty:
            return None, None
        tokens = (curves["tokens_per_second"] * curves["wall_s"]).groupby(curves["cell"]).sum()
        return float(seconds.mean()) / 3600, float(tokens.mean())

    def why_missing(self, cell: CellOf, metric: Metric | None, otherwise: str = "has no finite value") -> str:
        """Why a query has no answer."""
        row, title = self._row(cell), cell.title(self)
        if row is None:
            return f"{title}: not in this run's grid"
        if row["note"]:
            return f"{title}: {row['note']}"
        if metric is not None and not self._subject(metric)[1]:
            return "no text was measured" if metric == "perplexity" else "no tasks were measured"
        return f"{title}: {otherwise}" if metric is not None else f"{title}: its record does not say"

    def _subject(self, metric: Metric) -> tuple[str, str]:
        """Metric and subject in the runs table; an empty subject where the model has none."""
        scores = self.compared.scores[self.compared.scores["model"] == self.name]
        if metric == "perplexity":
            return "perplexity", next(iter(texts_of(scores)), "")
        return "acc", "mean" if (scores["subject"] == "mean").any() else ""

    def _row(self, cell: CellOf) -> pd.Series | None:
        own = self._own(self.table, cell)
        return None if own.empty else own.iloc[0]

    def _own(self, table: pd.DataFrame, cell: CellOf) -> pd.DataFrame:
        setting = cell.setting(self)
        for name in KEYS:
            table = table[table[name] == setting[name]]
        return table
