"""Speed, memory and cost: what was measured here, beside what the paper states."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from patch.benchmarking.options import RANDOM
from patch.reporting.published import PAPER_TOKENS, load_memory, load_notes, load_throughput, load_training_cost
from patch.reporting.study import Study
from patch.reporting.summary import KEYS, rows_of, settings
from patch.reporting.tables.layout import Column, Table, plain, signed
from patch.reporting.tables.quality import NO_CELLS, reasons, setting_columns
from patch.reporting.targets import PAPER_TILES, TABLES

NOT_MEASURED = "not measured: the benchmark folder has no generation.csv (`patch-llm benchmark generation` makes one)"


def throughput(study: Study) -> Table:
    """Tokens per second of generation, dense and hybrid, ours and then the published ones.

    Columns of the data: origin (measured or published), model, batch, prefill_tokens, generated_tokens,
    sparsity_percent, gpu, dense_tok_s, hybrid_tok_s, speedup, and speedup.published and .delta where the same setting
    was published for the same GPU.
    """
    published = load_throughput()
    keys = ["batch", "prefill_tokens", "generated_tokens", "sparsity_percent"]
    rows = []
    for row in study.generation.to_dict("records"):
        rounded = {**row, "sparsity_percent": round(row["sparsity_percent"])}
        same = published[(published[keys] == pd.Series(rounded)[keys].astype(float)).all(axis=1)]
        same = same[[str(gpu) in str(row.get("gpu", "")) for gpu in same["gpu"]]]
        theirs = float(same["speedup"].iloc[0]) if _is_llama2_7b(row["model"]) and len(same) else math.nan
        rows.append(
            {**row, "origin": "measured", "speedup.published": theirs, "speedup.delta": row["speedup"] - theirs}
        )
    stated = published.rename(columns={"source": "model"}).assign(origin="published")
    data = pd.DataFrame([*rows, *stated.to_dict("records")])
    if "speedup.published" not in data or data["speedup.published"].isna().all():
        data = data.drop(columns=["speedup.published", "speedup.delta"], errors="ignore")
    lengths = data["prefill_tokens"].astype(int).astype(str) + " + " + data["generated_tokens"].astype(int).astype(str)
    data = data.assign(lengths=lengths)
    data = data.assign(tiles=tiles_of(data["mask"])) if "mask" in data else data
    columns = [Column("origin", "", numeric=False), Column("model", "Model", numeric=False)]
    columns += [Column("gpu", "GPU", numeric=False)] if "gpu" in data else []
    columns += [Column("batch", "Batch", "{:.0f}".format), Column("lengths", "Prompt + new tokens")]
    columns += [Column("stack", "Stack", numeric=False)] if "stack" in data else []
    columns += [Column("tiles", "Tiles", numeric=False)] if "tiles" in data else []
    columns += [Column("sparsity_percent", "Sparsity %", "{:g}".format)]
    columns += [Column("dense_tok_s", "Dense tok/s", plain(1)), Column("hybrid_tok_s", "PATCH tok/s", plain(1))]
    columns += [Column("speedup", "Speed-up", _times)]
    if "speedup.published" in data:
        columns += [Column("speedup.published", "Published", _times), Column("speedup.delta", "Δ", signed)]
    notes = {note.id: note.text for note in load_notes("throughput")}
    warnings = [] if len(rows) else [f"Ours is {NOT_MEASURED}."]
    return Table(data, columns, blocks=("origin", "model"), warnings=warnings, notes=notes)


def memory(study: Study) -> Table:
    """GPU memory of inference over that of the dense model, by sparsity; published for LLaMA-2-7B.

    Columns of the data: model, gpu, sparsity_percent, dense_gib, hybrid_gib, ratio, ratio.published, ratio.delta.
    """
    names = ["model", "gpu", "sparsity_percent", "dense_gib", "hybrid_gib", "ratio", "ratio.published", "ratio.delta"]
    published, rows = load_memory(), []
    sizes = ["model", "sparsity_percent", "dense_gib", "hybrid_gib"]  # the same for all batches and lengths
    for row in study.generation.drop_duplicates(sizes).to_dict("records"):
        theirs = (
            published.get(float(round(row["sparsity_percent"])), math.nan) if _is_llama2_7b(row["model"]) else math.nan
        )
        ratio = row["hybrid_gib"] / row["dense_gib"]
        rows.append({**row, "ratio": ratio, "ratio.published": theirs, "ratio.delta": ratio - theirs})
    warnings = [] if rows else [f"Ours is {NOT_MEASURED}."]
    measured = {round(row["sparsity_percent"]) for row in rows if _is_llama2_7b(row["model"])}
    missing = [sparsity for sparsity in published if sparsity not in measured]
    rows += [{"model": "llama-2-7b", "sparsity_percent": s, "ratio.published": published[s]} for s in missing]
    data = pd.DataFrame(rows).reindex(columns=names)
    columns = [Column("model", "Model", numeric=False), Column("sparsity_percent", "Sparsity %", "{:g}".format)]
    columns += [Column("dense_gib", "Dense GiB", plain(2)), Column("hybrid_gib", "PATCH GiB", plain(2))]
    columns += [Column("ratio", "Ratio", plain(3)), Column("ratio.published", "Published", plain(2))]
    columns += [Column("ratio.delta", "Δ", signed)]
    notes = {note.id: note.text for note in load_notes("memory")}
    reason = [f"llama-2-7b at {', '.join(f'{sparsity:g} %' for sparsity in missing)}: not measured"] if missing else []
    return Table(data, columns, warnings=warnings, missing=reason, notes=notes)


def weight_memory(study: Study) -> Table:
    """Size of the weights with 2:4 tiles packed over that of dense ones: of the linear layers, and of the whole model.

    Columns of the data: those of memory.csv, and whole_model_ratio.
    """
    data = study.memory.assign(
        whole_model_ratio=study.memory["whole_model_hybrid_gib"] / study.memory["whole_model_dense_gib"]
    )
    data = data.assign(tiles=tiles_of(data["mask"])) if "mask" in data else data
    columns = [Column("model", "Model", numeric=False)]
    columns += [Column("tiles", "Tiles", numeric=False)] if "tiles" in data else []
    columns += [Column("sparsity_percent", "Sparsity %", "{:g}".format)]
    columns += [Column("dense_gib", "Linears GiB", plain(3)), Column("hybrid_gib", "Packed GiB", plain(3))]
    columns += [Column("ratio", "Ratio", plain(3)), Column("whole_model_dense_gib", "Model GiB", plain(3))]
    columns += [Column("whole_model_hybrid_gib", "Packed model GiB", plain(3))]
    columns += [Column("whole_model_ratio", "Model ratio", plain(3))]
    columns += [Column("pack_s", "Packing s", plain(1))] if "pack_s" in data else []
    columns += [Column("gpu", "Packed on", numeric=False)] if "gpu" in data else []
    empty = "not measured: the benchmark folder has no memory.csv (`patch-llm benchmark memory` makes one)"
    return Table(data, columns, blocks=("model",), empty=empty)


def layer_speed(study: Study) -> Table:
    """Time of one layer, hybrid over dense, by shape, tokens and sparsity. Nothing is published by layer.

    Columns of the data: those of layers.csv.
    """
    sizes = zip(study.layers["out_features"], study.layers["in_features"], strict=True)
    data = study.layers.assign(shape=[f"{out:.0f} × {into:.0f}" for out, into in sizes])
    data = data.assign(tiles=tiles_of(data["mask"])) if "mask" in data else data
    columns = [Column("shape", "Layer (out × in)", numeric=False), Column("tokens", "Tokens", "{:.0f}".format)]
    columns += [Column("sparsity_percent", "Sparsity %", "{:g}".format), Column("kernel", "Kernel", numeric=False)]
    columns += [Column("tiles", "Tiles", numeric=False)] if "tiles" in data else []
    columns += [Column("us", "PATCH µs", plain(1)), Column("dense_us", "Dense µs", plain(1))]
    columns += [Column("speedup", "Speed-up", _times)]
    if "cusparselt_full_2_4_us" in data:
        columns.append(Column("cusparselt_full_2_4_us", "cuSPARSELt 2:4 µs", plain(1)))
    if "compiled_dense_us" in data:
        columns.append(Column("compiled_dense_us", "Compiled dense µs", plain(1)))
    if "fraction_of_floor" in data:
        columns.append(Column("fraction_of_floor", "Of the floor", plain(2)))
    columns += [Column("gpu", "GPU", numeric=False)] if "gpu" in data else []
    empty = "not measured: the benchmark folder has no layers.csv (`patch-llm benchmark layers` makes one)"
    return Table(data, columns, blocks=("shape", "tokens"), empty=empty)


def training_cost(study: Study) -> Table:
    """What learning each mask took. Published hours are for 2.1 B tokens on H100s, and are compared only with as many.

    They are those of the paper's tiles and defaults: other tile sizes and variants have none.

    Columns of the data: the settings'; wall_h; gpu_h; tokens (millions); tokens_per_second; peak_gpu_memory_gib; gpu;
    each the mean over seeds, gpu_h.published and gpu_h.delta.
    """
    runs = rows_of(study.runs, TABLES["training_cost"])
    table = settings(runs)
    learned = runs[(runs["stage"] == "learn") & (runs["subject"] == "model") & (runs["status"] == "done")]
    stated = load_training_cost()
    published = {
        (row["source"], row["method"], PAPER_TILES, "default"): row["gpu_hours"] for row in stated.to_dict("records")
    }
    of_paper = ("source", "method", "pattern", "variant")
    tokens = (study.curves["tokens_per_second"] * study.curves["wall_s"]).groupby(study.curves["cell"]).sum()
    rows: list[dict[str, Any]] = []
    for setting in table.to_dict("records"):
        own = learned
        for name in KEYS:
            own = own[own[name] == setting[name]]
        mean = own.assign(value=own["value"].astype(float)).groupby("metric")["value"].mean()
        seen = [float(tokens[cell]) for cell in own["cell"].unique() if cell in tokens.index]
        row = {
            "wall_h": mean.get("wall_s", math.nan) / 3600,
            "gpu_h": mean.get("gpu_s", math.nan) / 3600,
            "tokens": sum(seen) / len(seen) / 1e6 if seen else math.nan,
            "tokens_per_second": mean.get("tokens_per_second", math.nan),
            "peak_gpu_memory_gib": mean.get("peak_gpu_memory_gib", math.nan),
            "gpu": next(iter(own["gpu"].dropna()), None if own.empty else "CPU"),
            "gpu_h.published": published.get(tuple(setting[name] for name in of_paper), math.nan),
        }
        as_many = abs(row["tokens"] * 1e6 / PAPER_TOKENS - 1) < 0.02
        named = {str(name): value for name, value in setting.items()}
        rows.append({**named, **row, "gpu_h.delta": row["gpu_h"] - row["gpu_h.published"] if as_many else math.nan})
    data = pd.DataFrame(rows, columns=list(rows[0]) if rows else [*table.columns, "gpu"])
    columns = [column for column in setting_columns(data) if column.name != "realised_sparsity"]
    columns += [Column("gpu", "Device", numeric=False)]
    if rows:
        columns += [Column("tokens", "M tokens", plain(1)), Column("tokens_per_second", "Tokens/s", "{:.0f}".format)]
        columns += [Column("wall_h", "Hours", plain(3)), Column("gpu_h", "GPU hours", plain(3))]
        columns += [Column("peak_gpu_memory_gib", "GPU GiB", plain(1))]
        if data["gpu_h.published"].notna().any():
            columns += [Column("gpu_h.published", "Published", plain(1)), Column("gpu_h.delta", "Δ", signed)]
    notes = {note.id: note.text for note in load_notes("training_cost")}
    return Table(data, columns, level="sparsity", missing=reasons(table), notes=notes, empty=NO_CELLS)


def tiles_of(masks: pd.Series) -> pd.Series:
    """Of the benchmarks' column `mask`, whether the tiles are random or of a mask; older files do not say."""
    return masks.map(lambda name: "random" if name == RANDOM else "of a mask", na_action="ignore")


def _is_llama2_7b(model: str) -> bool:
    return "llama-2-7b" in str(model).lower()


def _times(value: float) -> str:
    return f"{value:.2f}×"
