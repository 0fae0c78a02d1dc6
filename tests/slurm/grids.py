"""A tiny workflow on a real Slurm cluster (`cluster.sh start`); its jobs keep a journal of what really ran."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from patch.cluster.ledger import Ledger

ROOT = Path(__file__).parents[2]

SNAKEFILE = """
rule all:
    input: expand("out/{cell}.txt", cell=str(config["cells"]).split(","))

# Cells named r... can go on from a saved state after their time limit.
rule work:
    output: "out/{cell}.txt"
    log: "logs/{cell}.log"
    resources:
        mem_mb=lambda wildcards, attempt: 200 * attempt ** 2,
        runtime=config.get("runtime", 5),
        requeues=lambda wildcards: 10 if wildcards.cell.startswith("r") else 0,
    params: script=config.get("script", "work.sh"), steps=config.get("steps", 5)
    shell: "bash {params.script} {wildcards.cell} {params.steps} {output} > {log} 2>&1"
"""
# A step takes a fifth of a second; the state is the number of steps done.
WORK = """
cell=$1 steps=$2 output=$3 state=state/$1
mkdir -p state
step=$(cat $state 2>/dev/null || echo 0)
say() { echo "$1 $cell $step $SLURM_JOB_ID" >> journal; }
trap 'say saved; exit 143' TERM
say start
while [ $step -lt $steps ]; do
  sleep 0.2 & wait $!
  step=$((step + 1))
  echo $step > $state.new && mv $state.new $state
done
echo "$cell $step" > $output
say end
"""


class Grid:
    """The workflow in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "Snakefile").write_text(SNAKEFILE)
        self.write("work.sh", WORK)
        self._started: list[subprocess.Popen] = []

    def write(self, name: str, content: str) -> None:
        (self.folder / name).write_text(content)

    def start(self, *arguments: str, executor: str = "submitit", **config: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "snakemake", "--executor", executor, "--jobs", "500", "--keep-going"]
        command += ["--seconds-between-status-checks", "1", "--rerun-incomplete", "--scheduler", "greedy"]
        command += ["--max-jobs-per-timespan", "1000/1s", "--config"]
        command += [*(f"{name}={value}" for name, value in config.items()), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._started.append(
            subprocess.Popen(
                command, cwd=self.folder, env=environment, text=True, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
        return self._started[-1]

    def run(self, *arguments: str, **config: object) -> tuple[int, str]:
        """Exit status and output of a whole run."""
        return finish(self.start(*arguments, **config))

    def unlock(self) -> None:
        subprocess.run(
            [sys.executable, "-m", "snakemake", "--unlock", "--config", "cells=a"],
            cwd=self.folder, check=True, capture_output=True,
        )  # fmt: skip

    def journal(self, what: str) -> list[tuple[str, int, str]]:
        """Entries "start", "saved" or "end": cell, step, Slurm's id."""
        path = self.folder / "journal"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(cell, int(step), job) for kind, cell, step, job in lines if kind == what]

    def counts(self, what: str) -> Counter[str]:
        return Counter(cell for cell, _, _ in self.journal(what))

    def ledger(self, event: str) -> list[dict]:
        lines = (self.folder / ".snakemake/submitit/ledger.jsonl").read_text().splitlines()
        return [entry for line in lines if (entry := json.loads(line))["event"] == event]

    def jobs(self) -> list[str]:
        return [job for entry in self.ledger("submitted") for job in entry["jobs"]]

    def job(self, cell: str) -> str:
        """Slurm's id of a cell's newest job: Snakemake submits in no particular order."""
        path = self.folder / ".snakemake/submitit/ledger.jsonl"
        return next(task.job for task in Ledger(path).tasks.values() if task.cell == cell)

    def result(self, cell: str) -> str:
        return (self.folder / f"out/{cell}.txt").read_text().strip()

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.communicate()


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {seconds} s:\n{process.communicate()[0]}") from None
    return process.returncode, output


def wait_until(
    condition: Callable[[], object], seconds: float = 90, process: subprocess.Popen[str] | None = None
) -> None:
    """process: what must not end meanwhile."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.1)


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
