"""A tiny job for every partition and kind of GPU: what does a job find there, and how soon does it start?"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths, pickle_load

from patch.artefacts import PatchError
from patch.cluster import queue
from patch.cluster.queue import NoAnswer, Queue
from patch.cluster.site import Site

MINUTES = 5
SECONDS_BETWEEN_QUESTIONS = 1.0


@dataclass(frozen=True)
class Place:
    """Where jobs can run: a partition, and a kind of GPU in it or none."""

    partition: str
    gpu: str | None = None
    """As in --gres: "h100", or "" where GPUs have no names; None for jobs without a GPU."""


@dataclass
class Finding:
    """What a job found in its place."""

    place: Place
    problem: str = ""
    seconds: float | None = None
    """Between submission and start."""
    found: dict[str, Any] = field(default_factory=dict)


def places(text: str) -> list[Place]:
    """Partitions and kinds of GPU in the output of `sinfo -h -o "%R|%G"`."""
    found: dict[Place, None] = {}
    for line in text.splitlines():
        partition, _, resources = line.strip().partition("|")
        found[Place(partition)] = None
        for kind in re.findall(r"gpu(?::([^:,()\s]+))?:\d+", resources):
            found[Place(partition, kind)] = None
    return list(found)


def check(site: Site, folder: Path, partitions: Sequence[str] = (), patience: float = 600) -> Iterator[Finding]:
    """Submit a job to every place, and yield what each found as they end.

    folder: where jobs and this machine exchange files; must be shared. partitions: only these. patience: seconds to
    wait for jobs to start; those that have not by then are cancelled.
    Raises PatchError where there is no Slurm.
    """
    if shutil.which("sinfo") is None:
        raise PatchError("no Slurm here: `sinfo` is not on the PATH; run this on a login node of the cluster.")
    listed = subprocess.run(["sinfo", "-h", "-o", "%R|%G"], capture_output=True, text=True, check=False)
    if listed.returncode:
        raise PatchError(f"Slurm does not answer: {' '.join(listed.stderr.split())}")
    wanted = [place for place in places(listed.stdout) if not partitions or place.partition in partitions]
    if not wanted:
        raise PatchError(f"no partition {', '.join(partitions)}; `sinfo -s` lists what there is.")
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    secret = f"{socket.gethostname()} {time.time()}"
    (folder / "shared").write_text(secret)
    waiting: dict[str, tuple[Place, float]] = {}
    for place in wanted:
        try:
            waiting[_submit(site, place, folder, secret)] = (place, time.time())
        except (FailedJobError, FailedSubmissionError, OSError, subprocess.CalledProcessError) as error:
            yield Finding(place, problem=f"refused: {_reason(str(error))}")
    yield from _results(waiting, folder, patience)


def probe(shared: str, secret: str, setup: str) -> dict[str, Any]:
    """Runs in the job: what is here."""
    started = time.time()
    path = Path(shared)
    seen = path.exists() and path.read_text() == secret
    code = (
        "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda, [torch.cuda.get_device_name(i) "
    )
    code += "for i in range(torch.cuda.device_count())]]))"
    asked = subprocess.run(
        ["bash", "-c", f'{setup}\nexec python -c "{code}"'], capture_output=True, text=True, check=False
    )
    return {
        "started": started,
        "host": socket.gethostname(),
        "node": os.environ.get("SLURMD_NODENAME", ""),
        "python": sys.executable,
        "shared": seen,
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "torch": asked.stdout.strip() if asked.returncode == 0 else "",
        "error": asked.stderr.strip().splitlines()[-1] if asked.returncode and asked.stderr.strip() else "",
    }


def _submit(site: Site, place: Place, folder: Path, secret: str) -> str:
    extra = {"partition": place.partition}
    named = {"account": site.account, "qos": site.qos, "constraint": site.constraint}
    extra |= {name: value for name, value in named.items() if value}
    if place.gpu is not None:
        extra["gres"] = ":".join(["gpu", *([place.gpu] if place.gpu else []), "1"])
    executor = submitit.SlurmExecutor(folder / "%j")
    executor.update_parameters(
        job_name="patch-check", time=MINUTES, mem="2048M", wckey="", stderr_to_stdout=True, additional_parameters=extra
    )
    return str(executor.submit(probe, str(folder / "shared"), secret, site.setup).job_id)


def _results(waiting: dict[str, tuple[Place, float]], folder: Path, patience: float) -> Iterator[Finding]:
    asked = Queue()
    deadline = time.monotonic() + patience
    while waiting:
        try:
            states = asked.states(waiting)
        except NoAnswer:
            states = {}
        for job, state in states.items():
            place, submitted = waiting[job]
            log = JobPaths(folder / "%j", job).stdout
            if state.live and time.monotonic() < deadline:
                continue
            del waiting[job]
            try:
                outcome, content = pickle_load(JobPaths(folder / "%j", job).result_pickle)
            except (OSError, EOFError):
                outcome, content = "", ""
            if outcome == "success":
                yield Finding(place, seconds=content["started"] - submitted, found=content)
            elif state.live:
                queue.cancel([job])
                yield Finding(place, problem=f"{state} after {patience:.0f} s; cancelled")
            else:
                yield Finding(place, problem=f"job {job} ended as {state}; see {log}")
        if waiting:
            time.sleep(SECONDS_BETWEEN_QUESTIONS)


def _reason(text: str) -> str:
    lines = [line for line in text.splitlines() if "error:" in line] or text.splitlines() or ["no reason given"]
    return lines[0].partition("error:")[2].strip() or lines[0].strip()
