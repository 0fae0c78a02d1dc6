"""A Snakemake job's resources as submitit's parameters for Slurm.

The resources are named as in snakemake-executor-plugin-slurm, so that the same rules run through either:
slurm_partition, slurm_account, qos, constraint, reservation, runtime (minutes), mem_mb, mem_mb_per_cpu, cpus_per_task,
gpu, gpu_model, gres, nodes, tasks, slurm_extra.
"""

import shlex
from collections.abc import Mapping
from typing import Any

DEFAULT_MINUTES = 60  # submitit's own default is 5


def slurm_parameters(resources: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Parameters of `submitit.SlurmExecutor`. Equal parameters share an array.

    A job of several nodes starts once, on the first of them; what it runs there reaches the others through `srun`.
    """
    cpus = int(resources.get("cpus_per_task") or threads)
    nodes = int(resources.get("nodes") or 1)
    tasks = int(resources.get("tasks") or nodes)
    parameters: dict[str, Any] = {
        "time": minutes(resources),
        "nodes": nodes,
        "ntasks_per_node": -(-tasks // nodes),
        "cpus_per_task": cpus,
        # Since Slurm 22.05 srun does not take --cpus-per-task from sbatch.
        "srun_args": ["--nodes=1", "--ntasks=1", f"--cpus-per-task={cpus}"],
        "stderr_to_stdout": True,
        "wckey": "",  # submitit's default is an error where wckeys are enforced
    }
    if resources.get("mem_mb_per_cpu"):
        parameters["mem_per_cpu"] = f"{int(resources['mem_mb_per_cpu'])}M"
    elif resources.get("mem_mb"):
        parameters["mem"] = f"{int(resources['mem_mb'])}M"
    extra: dict[str, Any] = {
        option: str(resources[name])
        for name, option in (
            ("slurm_partition", "partition"),
            ("slurm_account", "account"),
            ("qos", "qos"),
            ("constraint", "constraint"),
            ("reservation", "reservation"),
        )
        if resources.get(name)
    }
    if gres := _gres(resources):
        extra["gres"] = gres
    extra["requeue"] = True  # allowed even where the cluster's default is not to
    return parameters | {"additional_parameters": extra | _extra(str(resources.get("slurm_extra") or ""))}


def minutes(resources: Mapping[str, Any]) -> int:
    return int(resources.get("runtime") or DEFAULT_MINUTES)


def _gres(resources: Mapping[str, Any]) -> str:
    if resources.get("gres"):
        return str(resources["gres"])
    count, model = int(resources.get("gpu") or 0), resources.get("gpu_model")
    return ":".join(["gpu", *([str(model)] if model else []), str(count)]) if count else ""


def _extra(options: str) -> dict[str, Any]:
    """ "--nice=5 --exclusive" as submitit wants it; True for options without a value."""
    found: dict[str, Any] = {}
    for word in shlex.split(options):
        name, given, value = word.removeprefix("--").partition("=")
        found[name] = value if given else True
    return found
