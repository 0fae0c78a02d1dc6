"""What the workflow itself costs: planning large grids, submitting, asking for states, starting short jobs.

    python workflow/benchmarks/orchestration.py --output results/reference/orchestration.csv

Adds a row per figure: what, size, value, unit, commit, date. All but the dry-run needs a Slurm cluster;
`tests/slurm/cluster.sh start` starts one. Give the machine nothing else to do meanwhile.
"""

import argparse
import datetime
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import yaml

from patch.cluster.queue import NoAnswer, Queue

ROOT = Path(__file__).parents[2]
Row = tuple[str, str, float, str]

SNAKEFILE = """
rule all:
    input: expand("out/{number}", number=range(int(config["jobs"])))

rule short:
    output: "out/{number}"
    resources: mem_mb=200, runtime=10, slurm_extra=config.get("extra", "")
    shell: "touch {output}"
"""


def snakemake(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--directory", str(folder), *arguments],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def dry_run(folder: Path) -> Iterator[Row]:
    """Of 100, 1,000 and 10,000 cells of the real workflow: three in four pruned in one shot, the others learned."""
    for seeds in (1, 10, 100):
        config = {
            "name": "large",
            "models": {f"m{number}": {"source": f"org/model-{number}-1b"} for number in range(5)},
            "grid": [
                {"methods": [method], "patterns": [pattern], "sparsities": [10, 20, 30, 40, 50]}
                for method, pattern in (
                    ("magnitude", "unstructured"),
                    ("wanda", "unstructured"),
                    ("sparsegpt", "unstructured"),
                    ("patch_joint", "tiles:128x128"),
                )
            ],
            "seeds": list(range(seeds)),
            "evaluation": {"tasks": None},
        }
        (folder / "large.yaml").write_text(yaml.safe_dump(config))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        flags = ["--snakefile", str(ROOT / "Snakefile"), "--configfile", str(folder / "large.yaml"), "--quiet", "all"]
        run = snakemake(folder, "--dry-run", *flags)
        run.communicate()
        seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run.returncode == 0
        size = f"{100 * seeds} cells"
        yield "dry-run", size, seconds, "s"
        yield "dry-run, CPU", size, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "s"
        yield "dry-run, peak memory", size, after.ru_maxrss / 2**20, "GiB"


def submission(folder: Path) -> Iterator[Row]:
    """1,000 jobs that Slurm holds back: from Snakemake's decision until all are submitted; then the cost of asking."""
    jobs = 1000
    run = start_short(folder, jobs, "--config", f"jobs={jobs}", "extra=--hold")
    assert run.stdout
    began = float("nan")
    for line in run.stdout:
        if line.startswith(f"Execute {jobs} jobs"):
            began = time.perf_counter()
        if line.startswith("Slurm job"):
            array = line.split()[2].rstrip(":")
            break
    yield "submission in arrays", f"{jobs} jobs", time.perf_counter() - began, "s"
    for source in ("sacct", "squeue"):
        for size in (1, jobs):
            asked = [f"{array}_{number}" for number in range(size)]
            try:
                yield (
                    f"question for states, {source}",
                    f"{size} jobs",
                    best(lambda s=source, a=asked: Queue(s).states(a)),
                    "s",
                )
            except NoAnswer:
                continue  # no accounting here
    os.killpg(run.pid, signal.SIGINT)
    run.communicate()


def short_jobs(folder: Path) -> Iterator[Row]:
    """100 jobs that do nothing, each in a Slurm job of its own, and ten to a Slurm job."""
    groups = ("--groups", "short=short", "--group-components", "short=10", "--cores", "2")
    for what, flags in (("one to a Slurm job", ()), ("ten to a Slurm job", groups)):
        started = time.perf_counter()
        run = start_short(folder, 100, "--config", "jobs=100", *flags)
        output, _ = run.communicate()
        assert run.returncode == 0, output
        yield f"short jobs, {what}", "100 jobs", time.perf_counter() - started, "s"


def start_short(folder: Path, jobs: int, *arguments: str) -> subprocess.Popen[str]:
    place = Path(tempfile.mkdtemp(dir=folder))
    (place / "Snakefile").write_text(SNAKEFILE)
    flags = ["--executor", "submitit", "--jobs", str(jobs), "--max-jobs-per-timespan", "1000/1s"]
    return snakemake(place, *flags, "--scheduler", "greedy", "--seconds-between-status-checks", "1", *arguments)


def best(call: Callable[[], object], repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="CSV file to add rows to")
    parser.add_argument("--only", choices=[part.__name__ for part in PARTS], help="one of the parts")
    options = parser.parse_args()
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    for part in PARTS:
        if options.only not in (None, part.__name__):
            continue
        with tempfile.TemporaryDirectory() as folder:
            for what, size, value, unit in part(Path(folder)):
                row = {"what": what, "size": size, "value": float(f"{value:.3g}"), "unit": unit}
                before = pd.read_csv(options.output) if options.output.exists() else pd.DataFrame()
                table = pd.concat([before, pd.DataFrame([{**row, "commit": commit, "date": today}])])
                table.to_csv(options.output, index=False)


PARTS = (dry_run, submission, short_jobs)

if __name__ == "__main__":
    main()
