"""The Hugging Face hub: its many ways to fail, each told in one line with the way out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from patch.artefacts import PatchError

_TOKEN = "put an access token into the environment variable HF_TOKEN or run `hf auth login`"
_OFFLINE = (
    "connect once and run `patch-llm prepare` (or the same command) on a machine with network access; "
    "what is in the local Hugging Face cache then works offline with HF_HUB_OFFLINE=1"
)


@contextlib.contextmanager
def hub_access(what: str) -> Iterator[None]:
    """Turn hub and data set failures inside the block into one PatchError about `what`."""
    try:
        yield
    except PatchError:
        raise
    except Exception as error:
        reason = _explain(error)
        if reason is None:
            raise
        raise PatchError(f"{what}: {reason}.") from error


def download(repository: str, file: str, revision: str | None) -> tuple[Path, str]:
    """A file of a repository on the hub, from the local cache where it is there: its path and its commit.

    Raises PatchError with the way out when it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    with hub_access(f"{repository}, file {file}"):
        path = Path(hf_hub_download(repository, file, revision=revision))
    # .../snapshots/COMMIT/FILE, and a file may lie in folders
    return path, path.parts[path.parts.index("snapshots") + 1]


def _explain(error: BaseException) -> str | None:
    chain = list(_chain(error))
    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    text = " ".join(str(link) for link in chain)
    if "GatedRepoError" in names or "gated repo" in text or "gated dataset" in text:
        return f"access is restricted; accept its licence on the hub, then {_TOKEN}"
    if "EntryNotFoundError" in names and "LocalEntryNotFoundError" not in names:
        return "the repository has no such file; correct its name"
    if "RevisionNotFoundError" in names:
        return "the hub has it, but not this revision; correct `revision`"
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"} or "is not a valid model identifier" in text:
        return f"not found on the hub; correct the name, or, if it is private, {_TOKEN}"
    offline = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError", "TimeoutException"}
    if names & offline or "offline mode" in text or "couldn't connect" in text.lower():
        return f"not in the local cache and the hub cannot be reached; {_OFFLINE}"
    if "HfHubHTTPError" in names:
        return f"the hub refused the request ({first_line(chain[0])}); {_TOKEN}"
    if "HFValidationError" in names:
        return "neither a directory here nor a valid name on the hub; correct the path or the name"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    """What an error says, without the rest of a long message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
