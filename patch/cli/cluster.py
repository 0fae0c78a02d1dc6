"""Look at a Slurm cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command("check")
def check(
    partition: Annotated[list[str] | None, typer.Option(help="Only this one; repeat for more.")] = None,
    site: Annotated[Path | None, typer.Option(help="Site settings; default: $PATCH_SITE, or slurm/site.yaml.")] = None,
    folder: Annotated[Path, typer.Option(help="A folder that this machine and the nodes share.")] = Path("logs/check"),
    patience: Annotated[int, typer.Option(help="Seconds to wait for jobs to start.", min=1)] = 600,
) -> None:
    """Submit a tiny job per partition and kind of GPU; print what each found and how soon it started."""
    from rich.console import Console
    from rich.table import Table

    from patch.cluster.check import check
    from patch.cluster.site import load_site

    table = Table(
        "partition", "GPU asked for", "node", "started after", "torch", "CUDA", "GPUs seen", "problem", box=None
    )
    failed = False
    for finding in check(load_site(site), folder, partition or [], patience):
        problem, found = finding.problem, finding.found
        if found and not found["shared"]:
            problem = f"does not see {folder.absolute()}: not on a shared file system"
        elif found and not found["torch"]:
            problem = f"cannot import torch with the setup of the site settings: {found['error']}"
        torch_version, cuda, gpus = json.loads(found["torch"]) if found and found["torch"] else ("", "", [])
        if not problem and finding.place.gpu is not None and not gpus:
            problem = f"PyTorch sees no GPU (CUDA_VISIBLE_DEVICES={found['visible']!r})"
        asked = {None: "none", "": "any"}.get(finding.place.gpu, finding.place.gpu)
        started = f"{finding.seconds:.0f} s" if finding.seconds is not None else ""
        table.add_row(
            finding.place.partition, asked, found.get("node", ""), started, torch_version, cuda or "", ", ".join(gpus),
            problem or "none",
        )  # fmt: skip
        failed = failed or bool(problem)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if failed:
        sys.exit(1)
