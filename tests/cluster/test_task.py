"""The payload of a Slurm job: outcomes, and orderly interruption."""

import os
import pickle
import signal
import threading
import time
from pathlib import Path

import pytest

from patch.cluster.task import Command, CommandError


def command(script: str, folder: Path, limit_s: int = 3600, timeouts: int = 0, requeues: int = 2) -> Command:
    return Command(script, str(folder), grace_s=5, limit_s=limit_s, timeouts=timeouts, requeues=requeues)


@pytest.fixture(autouse=True)
def _keep_signal_handler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_success_and_failure(tmp_path: Path) -> None:
    assert command("echo done > file", tmp_path)() is None
    assert (tmp_path / "file").read_text() == "done\n"
    with pytest.raises(CommandError, match="exit status 3"):
        command("exit 3", tmp_path)()
    with pytest.raises(CommandError, match="killed by SIGKILL"):
        command("kill -9 $$", tmp_path)()


def test_warning_signal_does_not_reach_the_command(tmp_path: Path) -> None:
    command("kill -USR2 $$; echo alive > file", tmp_path)()
    assert (tmp_path / "file").exists()


SAVES = "trap 'echo saved > saved; exit 1' TERM; echo > started; sleep 60 & wait"


class InterruptedPayloadError(Exception):
    pass


def interrupt(payload: Command, folder: Path):
    """What `checkpoint` gives, called as submitit calls it: by a signal that comes while the command runs."""

    def answer(number: int, frame: object) -> None:
        raise InterruptedPayloadError(payload.checkpoint())

    def send() -> None:
        while not (folder / "started").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, answer)
    threading.Thread(target=send).start()
    try:
        payload()
    except InterruptedPayloadError as interrupted:
        return interrupted.args[0]
    except CommandError as error:
        return error
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_interruption_lets_the_command_save_and_requeues_it(tmp_path: Path) -> None:
    payload = command(SAVES, tmp_path)
    again = interrupt(payload, tmp_path)
    assert (tmp_path / "saved").exists()
    assert again.function is payload
    assert pickle.loads(pickle.dumps(payload)).timed_out == 0


def test_time_limit_ends_what_cannot_go_on_but_saves_first(tmp_path: Path) -> None:
    outcome = interrupt(command(SAVES, tmp_path, limit_s=60), tmp_path)
    assert isinstance(outcome, CommandError)
    assert "reached its time limit of 1 min" in str(outcome)
    assert (tmp_path / "saved").exists()


def test_time_limits_and_requeues_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = command(SAVES, tmp_path, limit_s=60, timeouts=1)
    assert interrupt(payload, tmp_path).function.timed_out == 1
    (tmp_path / "started").unlink()
    assert "time limit of 1 min, 2 times" in str(interrupt(payload, tmp_path))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(CommandError, match="was interrupted again after 3 requeues"):
        command("true", tmp_path).checkpoint()
    with pytest.raises(CommandError, match="was requeued 3 times"):
        command("true", tmp_path)()


def test_profile_of_the_submitting_snakemake_does_not_reach_the_job(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "slurm")
    command("env > file", tmp_path)()
    assert "SNAKEMAKE_PROFILE" not in (tmp_path / "file").read_text()
    assert os.environ["SNAKEMAKE_PROFILE"] == "slurm"
