"""Fixtures of the tests that need a cluster (`cluster.sh start`)."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from grids import Grid, slurm, wait_until


@pytest.fixture
def grid(tmp_path: Path) -> Iterator[Grid]:
    grid = Grid(tmp_path)
    yield grid
    grid.close()
    if shutil.which("scancel"):
        subprocess.run(["scancel", "--user", str(os.getuid())], check=False, capture_output=True)
        wait_until(lambda: not slurm("squeue", "-h"))
