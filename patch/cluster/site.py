"""What is particular to a cluster: `slurm/site.yaml`, the one file that a new cluster needs changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from patch.artefacts import PatchError
from patch.config_errors import explain

VARIABLE = "PATCH_SITE"
"""Environment variable that names another file."""
DEFAULT = Path("slurm/site.yaml")


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Gpu(Closed):
    """The GPUs that jobs ask for."""

    kind: str | None = None
    """As the cluster calls it (`sinfo -o %G` shows "gpu:h100:8"); None where a GPU needs no name."""
    partition: str | None = None
    """Partition of jobs with a GPU; None for the cluster's default."""
    memory_gib: float = Field(80, gt=0)
    """Of one GPU. A mask whose learning does not fit one is learned on several."""
    per_node: int = Field(8, gt=0)
    """GPUs of one node. Learning that needs more takes several nodes."""


class Site(Closed):
    """A cluster. None leaves a choice to Slurm."""

    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that nodes must have, as in `sbatch --constraint`."""
    partition: str | None = None
    """Partition of jobs without a GPU."""
    gpu: Gpu | None = None
    """None: jobs ask for a GPU only where the config says `device: cuda`."""
    max_minutes: int = Field(24 * 60, gt=0)
    """Longest time limit that jobs ask for. Learning that takes longer is requeued and goes on."""
    setup: str = ""
    """Shell commands before every job: modules, activation of an environment, variables."""

    def resources(self, gpus: bool) -> dict[str, str]:
        """Where jobs run, by the names that Slurm executors of Snakemake use."""
        gpu = self.gpu if gpus else None
        named = {
            "slurm_account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "slurm_partition": gpu.partition if gpu else self.partition,
            "gpu_model": gpu.kind if gpu else None,
        }
        return {name: value for name, value in named.items() if value}


def load_site(path: Path | str | None = None) -> Site:
    """Read the site's settings: `path`, else the file that PATCH_SITE names, else slurm/site.yaml.

    Raises PatchError that names the wrong key, or the missing file.
    """
    chosen = Path(os.environ.get(VARIABLE) or path or DEFAULT)
    try:
        content: Any = yaml.safe_load(chosen.read_text()) or {}
    except FileNotFoundError:
        raise PatchError(f"{chosen}: no such file; run this in the project's folder, or set {VARIABLE}.") from None
    except yaml.YAMLError as error:
        raise PatchError(f"{chosen}: not valid YAML ({' '.join(str(error).split())}).") from None
    try:
        return Site.model_validate(content)
    except ValidationError as error:
        raise PatchError(explain(error, Site, [(str(chosen), content)])) from None


def runs_on_gpu(device: str, site: Site) -> bool:
    """Whether jobs compute on GPUs: those of an experiment with this `device`, started from this machine."""
    return device == "cuda" or (device == "auto" and (site.gpu is not None or shutil.which("nvidia-smi") is not None))
