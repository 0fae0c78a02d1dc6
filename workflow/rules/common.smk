"""What the rules share: the experiment, its cells, the command-line options that describe them, what jobs need."""

import functools
import gc
import json
import os
import shlex
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

from patch.artefacts import PatchError, checksum_json
from patch.benchmark_jobs import benchmark_jobs, skipped
from patch.cluster import needs
from patch.cluster.site import Gpu, load_site, runs_on_gpu
from patch.experiments import load_experiment
from patch.methods import METHODS
from patch.provenance import code_hash
from patch.reporting import targets

# A large grid makes millions of objects that live to the end; looking for garbage among them takes a sixth of the time.
# It is looked for again when jobs run (`onstart`), but not among these.
gc.disable()

CONFIG_FILES = [str(path) for path in workflow.config_settings.configfiles] or [
    "workflow/config/demo.yaml"
]
OVERRIDES = dict(workflow.config_settings.config)

try:
    EXPERIMENT = load_experiment(CONFIG_FILES, OVERRIDES)
    GRID = EXPERIMENT.expand()
    SITE = load_site(Path(workflow.basedir) / "slurm" / "site.yaml")
except PatchError as error:
    raise WorkflowError(str(error)) from None

RUN = f"results/{EXPERIMENT.name}"
LOGS = f"logs/{EXPERIMENT.name}"
# Finished parts of evaluations and learning: undeclared, since Snakemake deletes outputs before a retry.
STATE = "results/state"
# All cells that are computed; those that others only learn from are not evaluated.
CELLS = {cell.path: cell for cell in GRID.prerequisites + GRID.cells}
ENVIRONMENT = "../../environment.yml"
# Jobs that compute take one of the `gpu` resource; `--resources gpu=1` then keeps them from sharing one.
GPUS = int(runs_on_gpu(EXPERIMENT.device, SITE))

BENCHMARK_JOBS = {
    job.folder: job for job in benchmark_jobs(EXPERIMENT, GRID.cells, bool(GPUS))
}
BENCHMARKS = list(dict.fromkeys(job.benchmark for job in BENCHMARK_JOBS.values()))


def of_checkout(path):
    """A file of the checkout, as seen from the working directory."""
    return os.path.relpath(Path(workflow.basedir, path))


def shown_targets(known):
    """The names of the targets that have something to show: cells of this grid, or speed of the paper's models."""
    sources = {setting["source"] for setting in SETTINGS}
    measured = EXPERIMENT.runs or TIMED or sources & {*targets.SMALL, *targets.LARGE}
    return [
        name
        for name, target in known.items()
        if any(target.chosen(SETTINGS))
        or (measured and target.benchmark in {Path(path).name for path in MEASURED})
    ]


# Where the results are read from, and the measurements of speed and memory: the run's own, or those of the checkout.
RUNS = of_checkout(EXPERIMENT.runs) if EXPERIMENT.runs else f"{RUN}/runs.parquet"
TIMED = [name for name in ("layers", "generation", "memory") if name in BENCHMARKS]
SPEED = f"{RUN}/benchmarks" if TIMED else of_checkout("results/reference")
MEASURED = [
    f"{SPEED}/{name}.csv"
    for name in TIMED or ("layers", "generation", "memory")
    if TIMED or Path(f"{SPEED}/{name}.csv").exists()
]
SETTINGS = [targets.setting_of(cell) for cell in GRID.cells]
TABLE_NAMES = shown_targets(targets.TABLES)
TABLES = expand(
    f"{RUN}/tables/{{name}}.{{form}}",
    name=TABLE_NAMES,
    form=["csv", "md", "tex", "html"],
)
FIGURE_NAMES = shown_targets(targets.FIGURES)
FIGURES = expand(
    f"{RUN}/figures/{{name}}.{{form}}", name=FIGURE_NAMES, form=["pdf", "png"]
)

# Braces would be placeholders.
if "SLURM_JOB_ID" in os.environ and SITE.setup:
    shell.prefix(SITE.setup.replace("{", "{{").replace("}", "}}").rstrip() + "\n")

if workflow.is_main_process:
    logger.info(f"{EXPERIMENT.name}: {GRID.summary()}")
    if skipped(EXPERIMENT, bool(GPUS)):
        logger.info(f"  {skipped(EXPERIMENT, bool(GPUS))}")


def collect_garbage_again():
    gc.freeze()
    gc.enable()


def prepare_model_options(wildcards):
    source = EXPERIMENT.models[wildcards.model]
    options = ["--model", source.source, "--dtype", source.dtype]
    return shlex.join(
        options + (["--revision", source.revision] if source.revision else [])
    )


def calibration_options(wildcards):
    text = EXPERIMENT.calibration
    return _token_options(
        text.source, text.sampling, text.length, text.samples, wildcards.seed
    )


def training_options(wildcards):
    text = EXPERIMENT.training
    if not text.generated:
        return _token_options(text.source, "packed", text.length, text.samples, None)
    options = ["--source", text.source, "--length", str(text.length)]
    options += ["--samples", str(text.samples), "--seed", str(text.seed)]
    options += ["--batch-size", str(text.batch_size)]
    return shlex.join([*options, "--device", EXPERIMENT.device])


def documents_options(wildcards):
    text = EXPERIMENT.documents
    return _token_options(
        text.source, "documents", text.length, text.samples, str(text.seed)
    )


def perplexity_options(wildcards):
    text = EXPERIMENT.evaluation.perplexity[wildcards.text]
    return _token_options(text.source, "joined", text.length, text.windows, None)


def _token_options(source, sampling, length, samples, seed):
    options = ["--source", source, "--sampling", sampling, "--length", str(length)]
    options += ["--samples", str(samples)] if samples is not None else []
    return shlex.join(options + (["--seed", seed] if seed is not None else []))


def calibration_tokens(wildcards):
    """The token file that a cell's method looks at; none for methods that look at weights only."""
    cell = CELLS[wildcards.cell]
    return (
        f"{RUN}/{cell.model}/tokens/calibration-seed-{cell.seed}.safetensors"
        if cell.calibration
        else []
    )


def released_mask(wildcards):
    """Of cells whose mask is a published one, what is known of that file."""
    cell = CELLS[wildcards.cell]
    return released_file(cell) if cell.method == "released" else []


def released_file(cell):
    return f"{RUN}/{cell.uncompressed.path}/released.json"


def released_options(wildcards):
    cell = CELLS[wildcards.cell]
    method = METHODS[cell.method](**cell.options)
    options = ["--source", method.location(cell.sparsity), "--file", method.file]
    return shlex.join(
        options + (["--revision", method.revision] if method.revision else [])
    )


def training_tokens(wildcards):
    return _training_file(CELLS[wildcards.cell])


def _training_file(cell):
    return f"{RUN}/{cell.model}/tokens/{METHODS[cell.method].text}.safetensors"


def network_files():
    """What the `prepare` stages bring to this machine; text that a model writes itself is left to a GPU."""
    models = {cell.model: cell for cell in CELLS.values()}
    files = [f"{RUN}/{model}/model.json" for model in models]
    files += [path for cell in models.values() for path in _texts(cell.model).values()]
    for cell in CELLS.values():
        tokens = f"{RUN}/{cell.model}/tokens"
        if cell.calibration or cell.compression_calibration:
            files.append(f"{tokens}/calibration-seed-{cell.seed}.safetensors")
        if cell.training and not (
            cell.training == EXPERIMENT.training and EXPERIMENT.training.generated
        ):
            files.append(_training_file(cell))
        if cell.method == "released":
            files.append(released_file(cell))
    files += [f"{RUN}/tasks.json"] if EXPERIMENT.evaluation.tasks else []
    return list(dict.fromkeys(files))


def prior_masks(wildcards):
    """The masks that a learned cell starts from, by role."""
    prerequisites = CELLS[wildcards.cell].prerequisites
    return {role: mask_file(cell) for role, cell in prerequisites.items()}


def prune_options(wildcards, input):
    cell = CELLS[wildcards.cell]
    files = ["--calibration", input.calibration] if cell.calibration else []
    files += ["--released", input.released] if cell.method == "released" else []
    return shlex.join([*_method_options(cell), *files])


def learn_options(wildcards, input):
    cell = CELLS[wildcards.cell]
    options = ["--training", input.training, "--epochs", str(cell.training.epochs)]
    for role in cell.prerequisites:
        options += [f"--{role}-mask", input[role]]
    return shlex.join([*_method_options(cell), *options])


def _method_options(cell):
    options = ["--method", cell.method, "--pattern", cell.pattern]
    options += ["--sparsity", f"{cell.sparsity:g}"]
    for name, value in cell.options.items():
        options += ["--set", f"{name}={json.dumps(value)}"]
    return [*options, "--seed", str(cell.seed), "--device", EXPERIMENT.device]


def cell_model(wildcards):
    return f"{RUN}/{CELLS[wildcards.cell].model}/model.json"


def mask_file(cell):
    return f"{RUN}/{cell.folder(cell.mask_stage)}/mask.safetensors"


def compress_inputs(wildcards):
    cell = CELLS[wildcards.cell]
    calibration = f"{RUN}/{cell.model}/tokens/calibration-seed-{cell.seed}.safetensors"
    return {
        "model": f"{RUN}/{cell.model}/model.json",
        "mask": mask_file(cell) if cell.mask_stage else [],
        "calibration": calibration if cell.compression_calibration else [],
    }


def compress_options(wildcards, input):
    cell = CELLS[wildcards.cell]
    options = ["--mask", input.mask] if input.mask else []
    options += ["--calibration", input.calibration] if input.calibration else []
    for name, value in cell.compression_options.model_dump(exclude={"inputs"}).items():
        options += ["--set", f"{name}={json.dumps(value)}"]
    return shlex.join([*options, "--device", EXPERIMENT.device])


def evaluate_inputs(wildcards):
    """All in one function: in a large grid, calling them is what a dry-run spends its time on."""
    cell = CELLS[wildcards.cell]
    return {
        **_texts(cell.model),
        "model": f"{RUN}/{cell.model}/model.json",
        **_weights(cell),
        "tasks": f"{RUN}/tasks.json" if EXPERIMENT.evaluation.tasks else [],
    }


def _weights(cell):
    """The file that gives the model its weights, by the option of `evaluate` that takes it; none for the dense model."""
    if cell.compression_options:
        return {"compressed": f"{RUN}/{cell.folder('compress')}/compressed.safetensors"}
    return {"mask": mask_file(cell)} if cell.mask_stage else {}


def _texts(model):
    return {
        text: f"{RUN}/{model}/tokens/text-{text}.safetensors"
        for text in EXPERIMENT.evaluation.perplexity
    }


def task_names():
    tasks = EXPERIMENT.evaluation.tasks
    return [*tasks.names, "--source", tasks.source] if tasks else []


def evaluate_options(wildcards, input):
    cell = CELLS[wildcards.cell]
    options = [f"--{name}={file}" for name, file in _weights(cell).items()]
    if cell.compression_options and cell.compression_options.inputs != "none":
        options += ["--inputs", cell.compression_options.inputs]
    for name, file in _texts(cell.model).items():
        options += ["--text", f"{name}={file}"]
    return shlex.join([*options, *task_options(), "--device", EXPERIMENT.device])


def task_options():
    tasks = EXPERIMENT.evaluation.tasks
    if tasks is None:
        return []
    options = [item for name in tasks.names for item in ("--task", name)]
    options += ["--task-source", tasks.source, "--batch-size", str(tasks.batch_size)]
    options += ["--limit", str(tasks.limit)] if tasks.limit else []
    return options + [
        item
        for name, n in tasks.limits.items()
        for item in ("--limit-for", f"{name}={n}")
    ]


def benchmark_parts(wildcards):
    """The files that a benchmark's table is joined from: of random tiles, then of cells' masks."""
    jobs = BENCHMARK_JOBS.values()
    return [
        f"{RUN}/{job.folder}/rows.csv"
        for job in jobs
        if job.benchmark == wildcards.benchmark
    ]


def _benchmark_job(wildcards):
    cell, shape = wildcards.get("cell"), wildcards.get("shape")
    part = f"masks/{cell}" if cell else f"random/{shape}"
    return BENCHMARK_JOBS[f"benchmarks/{wildcards.benchmark}/{part}"]


def benchmark_key(wildcards):
    return _benchmark_job(wildcards).key


def random_benchmark_options(wildcards):
    options = _benchmark_job(wildcards).options
    name = "--model" if wildcards.benchmark == "memory" else "--shape"
    return shlex.join([name, wildcards.shape, *options, *_benchmark_device(wildcards)])


def mask_benchmark_inputs(wildcards):
    cell = CELLS[wildcards.cell]
    model = [] if wildcards.benchmark == "layers" else cell_model(wildcards)
    return {"mask": mask_file(cell), "model": model}


def mask_benchmark_options(wildcards, input):
    options = _benchmark_job(wildcards).options
    name = "--model" if wildcards.benchmark == "memory" else "--shape"
    model = [name, input.model] if input.model else []
    return shlex.join(
        [*model, "--mask", input.mask, *options, *_benchmark_device(wildcards)]
    )


def _benchmark_device(wildcards):
    """Learning masks is timed on GPUs only, and has no option for it."""
    return [] if wildcards.benchmark == "learning" else ["--device", EXPERIMENT.device]


def all_gpus():
    """On this machine all of the `gpu` resource, so that nothing else that computes runs; on a cluster jobs have
    theirs."""
    here = workflow.global_resources.get("gpu") if workflow.local_exec else None
    return max(GPUS, here.value or 1) if GPUS and here is not None else GPUS


def cluster_resources(stage):
    """What a rule's jobs ask of a cluster, by the names that Slurm executors know. Runs on one machine ignore it."""
    computes = bool(GPUS) and stage != "prepare"
    cpus = {"cpus_per_task": max(EXPERIMENT.threads, needs.CPUS_PER_GPU)}
    return {
        **SITE.resources(computes),
        **(cpus if computes else {}),
        "mem_mb": lambda wildcards, attempt: _needs(
            stage, wildcards, attempt
        ).memory_mb,
        "runtime": lambda wildcards, attempt: _needs(stage, wildcards, attempt).minutes,
    }


def learning_resources():
    """As above, with as many GPUs and nodes as the model needs, where the site says how many there are of what size."""
    if SITE.gpu is None:
        return cluster_resources("learn") | {"gpu": GPUS, "nodes": 1}
    return cluster_resources("learn") | {
        "gpu": lambda wildcards: _needs("learn", wildcards).gpus,
        "nodes": lambda wildcards: _needs("learn", wildcards).nodes,
        "cpus_per_task": lambda wildcards: max(
            EXPERIMENT.threads, _needs("learn", wildcards).cpus
        ),
    }


def _needs(stage, wildcards, attempt=1):
    name = wildcards.get("cell") or wildcards.get("model") or wildcards.get("shape")
    return _needs_of(stage, name, attempt)


@functools.lru_cache(maxsize=1024)
def _needs_of(stage, name, attempt):
    """name: the cell, or the model of stages that serve all cells of a model, or the shape; None for stages without."""
    gpu = (SITE.gpu or Gpu()) if GPUS else None
    if stage == "prepare":
        model = CELLS[name].model if name in CELLS else name
        return needs.preparation(_parameters(model) if model else 0, attempt)
    if stage == "generate":
        text = EXPERIMENT.training
        tokens = text.samples * text.length * text.generated
        return needs.generation(
            _parameters(name), tokens, gpu, EXPERIMENT.threads, attempt
        )
    if stage == "benchmark":
        return needs.benchmark(
            (
                _parameters(CELLS[name].model)
                if name in CELLS
                else needs.parameters_in_name(name)
            ),
            gpu,
            attempt,
        )
    cell = CELLS[name]
    return needs.stage(
        cell,
        stage,
        _parameters(cell.model),
        gpu,
        EXPERIMENT.threads,
        SITE.max_minutes,
        attempt,
    )


def _parameters(model):
    return needs.parameter_count(EXPERIMENT.models[model], f"{RUN}/{model}/model.json")


def cell_records(wildcards):
    """The records that the runs table is made of: of all cells of the grid, or of those that one target shows."""
    return [
        f"{RUN}/{folder}/record.json"
        for folder in dict.fromkeys(
            cell.folder(stage) for cell in _cells_of(wildcards) for stage in cell.stages
        )
    ]


def cell_curves(wildcards):
    return [
        f"{RUN}/{cell.path}/learn/curves.parquet"
        for cell in _cells_of(wildcards)
        if cell.mask_stage == "learn" and not cell.compression_options
    ]


def _cells_of(wildcards):
    name = wildcards.get("target")
    return GRID.cells if name is None else targets.cells_of(name, GRID.cells)


def runs_of_target(wildcards):
    """The runs table with the cells of one target."""
    return RUNS if EXPERIMENT.runs else f"{RUN}/targets/{wildcards.target}/runs.parquet"


def speed_of_target(wildcards):
    """The measurements of speed that a target shows."""
    file = targets.benchmark_of(wildcards.target)
    return [path for path in MEASURED if Path(path).name == file]


def collect_options():
    configs = [item for file in CONFIG_FILES for item in ("--config", file)]
    return shlex.join([*configs, "--override", json.dumps(OVERRIDES)])


def grid_key():
    """Identity of the whole grid: any change of settings or code is a reason to collect again."""
    return checksum_json([cell.hash for cell in GRID.cells] + [code_hash("collect")])[
        :16
    ]
