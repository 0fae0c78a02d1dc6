"""Files that later stages read: written atomically, described by a schema, checked when read.

This is the bottom of the package and imports nothing of it. It also holds `PatchError`, the one
exception whose message is written for the person at the terminal.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

if TYPE_CHECKING:
    import torch


class PatchError(Exception):
    """What went wrong, where, and the way out, in one line. The CLI prints it without a traceback."""


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` only if the block succeeds.

    A reader sees the old file or the whole new one, never a part: the data reaches the disk before
    the name does. On any error, Ctrl-C included, the temporary file is removed.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp's 0600 would hide results from colleagues
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        if temporary:
            temporary.unlink(missing_ok=True)
        if _is_disk_full(error):
            raise PatchError(
                f"{path}: no space left to write it; nothing was changed. Free some space and run again."
            ) from error
        raise


def write_text(path: Path | str, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path | str, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path | str, schema: str) -> dict[str, Any]:
    """Read a JSON object written with `"schema": schema`.

    Raises PatchError when the file is missing, truncated or of another schema.
    """
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise PatchError(f"{path}: no such file; run the stage that writes it first.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PatchError(f"{path}: not valid JSON ({error}); delete it and run its stage again.") from None
    _check_schema(path, content.get("schema") if isinstance(content, dict) else None, schema)
    return content


def write_tensors(
    path: Path | str, tensors: Mapping[str, torch.Tensor], schema: str, metadata: Mapping[str, Any]
) -> str:
    """Write tensors and JSON metadata as one safetensors file; return the checksum stored in it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksum = checksum_tensors(tensors)
    text = json.dumps(metadata)
    header = {"schema": schema, "checksum": checksum, "metadata": text, "metadata_checksum": checksum_json(text)}
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, header)
        except SafetensorError as error:  # its Rust code reports system errors as text
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error
    return checksum


def read_tensors(path: Path | str, schema: str) -> tuple[dict[str, torch.Tensor], dict[str, Any], str]:
    """Read what `write_tensors` wrote: the tensors, the metadata and the checksum.

    Raises PatchError when the file is missing, truncated, of another schema or altered.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise PatchError(f"{path}: no such file; run the stage that writes it first.")
    try:
        with safe_open(path, framework="pt") as stream:
            header = stream.metadata() or {}
            _check_schema(path, header.get("schema"), schema)
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise PatchError(
            f"{path}: truncated or not a safetensors file ({error}); delete it and run its stage again."
        ) from None
    whole = checksum_tensors(tensors) == header.get("checksum")
    if not whole or checksum_json(header.get("metadata")) != header.get("metadata_checksum"):
        raise PatchError(f"{path}: its checksum does not match its content; delete it and run its stage again.")
    return tensors, json.loads(header["metadata"]), header["checksum"]


def checksum_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, independent of the order of insertion and of the device."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checksum_json(content: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextlib.contextmanager
def exclusive(directory: Path | str) -> Iterator[None]:
    """Hold `directory` for this process; a second run in it is refused at once.

    The kernel drops the lock when the process ends in whatever way, so none is ever left behind.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lock"
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise PatchError(
            f"{directory}: another run is writing here; wait for it, stop it, or choose another output directory."
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held
        lock.release()


def _check_schema(path: Path | str, found: Any, expected: str) -> None:
    if found == expected:
        return
    name = expected.rpartition("/")[0]
    if isinstance(found, str) and found.rpartition("/")[0] == name:
        raise PatchError(f"{path}: written in schema {found}, this version reads {expected}; run its stage again.")
    raise PatchError(f"{path}: not a {name} file of this project (schema {found!r}, expected {expected!r}).")


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
