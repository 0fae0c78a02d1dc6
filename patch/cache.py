"""Where what is made once per machine is kept: unpacked assets, compiled kernels, kernel times."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """$PATCH_LLM_CACHE, else ~/.cache/patch-llm."""
    return Path(os.environ.get("PATCH_LLM_CACHE", Path.home() / ".cache" / "patch-llm")).expanduser()
