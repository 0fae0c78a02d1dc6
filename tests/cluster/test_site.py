"""The site's settings: closed, and all about places."""

from pathlib import Path

import pytest

from patch.artefacts import PatchError
from patch.cluster.site import Gpu, Site, load_site, runs_on_gpu

ROOT = Path(__file__).parents[2]


def test_the_file_of_the_project_leaves_everything_to_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATCH_SITE", raising=False)
    assert load_site(ROOT / "slurm" / "site.yaml") == Site()


def test_settings_become_resources_of_jobs_with_and_without_gpus() -> None:
    site = Site(account="lab", partition="cpu", gpu=Gpu(partition="gpu", kind="h100"))
    assert site.resources(gpus=False) == {"slurm_account": "lab", "slurm_partition": "cpu"}
    assert site.resources(gpus=True) == {"slurm_account": "lab", "slurm_partition": "gpu", "gpu_model": "h100"}


def test_jobs_take_gpus_where_the_site_or_this_machine_has_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [runs_on_gpu(device, Site()) for device in ("auto", "cpu", "cuda")] == [False, False, True]
    assert [runs_on_gpu(device, Site(gpu=Gpu())) for device in ("auto", "cpu")] == [True, False]
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert [runs_on_gpu(device, Site()) for device in ("auto", "cpu")] == [True, False]


def test_variable_names_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("qos: short\n")
    monkeypatch.setenv("PATCH_SITE", str(tmp_path / "mine.yaml"))
    assert load_site(ROOT / "slurm" / "site.yaml").qos == "short"


def test_mistakes_name_the_file_and_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATCH_SITE", raising=False)
    path = tmp_path / "site.yaml"
    path.write_text("acount: lab\n")
    with pytest.raises(PatchError, match=r"site\.yaml: unknown key 'acount'; did you mean 'account'"):
        load_site(path)
    with pytest.raises(PatchError, match=r"missing\.yaml: no such file"):
        load_site(tmp_path / "missing.yaml")
