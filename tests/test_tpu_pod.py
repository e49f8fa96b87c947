"""The launcher of Cloud TPU slices, with a gcloud that notes what it is asked for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "tpu_pod.sh"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f'#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done >> {tmp_path}/asked\n')
    gcloud.chmod(0o755)
    return {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "TPU_NAME": "sav", "TPU_ZONE": "somewhere"}


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT, *words], env=environment, capture_output=True, text=True)


def test_every_worker_runs_the_command(environment: dict[str, str], tmp_path: Path) -> None:
    words = ["run", "extract", "--model", "tiny", "--data", "my rows.jsonl"]
    assert run(environment, *words).returncode == 0
    expected = "cd sav_jax && .venv/bin/sav-jax extract --model tiny --data my\\ rows.jsonl --distributed"
    asked = ["compute", "tpus", "tpu-vm", "ssh", "sav", "--zone", "somewhere", "--worker=all", "--command", expected]
    assert (tmp_path / "asked").read_text().splitlines() == asked
    (tmp_path / "asked").unlink()
    dry = run(environment, "--dry-run", *words)
    assert dry.stdout.startswith("gcloud compute tpus tpu-vm ssh sav --zone somewhere --worker=all --command ")
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (
            ["create", "v5litepod-16", "v2"],
            "gcloud compute tpus tpu-vm create sav --zone somewhere --accelerator-type v5li",
        ),
        (["install"], "git -C"),
        (["put", "rows", "data"], "gcloud compute tpus tpu-vm scp --recurse rows sav:sav_jax/data"),
        (["fetch", "results", "here"], "gcloud compute tpus tpu-vm scp --recurse sav:sav_jax/results here"),
        (["delete"], "gcloud compute tpus tpu-vm delete sav --zone somewhere --quiet"),
    ],
)
def test_what_it_would_do(environment: dict[str, str], words: list[str], first: str) -> None:
    dry = run(environment, "--dry-run", *words)
    assert dry.returncode == 0
    assert dry.stdout.startswith(first)


def test_a_dry_run_that_is_asked_for_too_late_is_refused(environment: dict[str, str], tmp_path: Path) -> None:
    said = run(environment, "delete", "--dry-run")
    assert said.returncode == 2
    assert said.stderr == "error: --dry-run goes in front: tpu_pod.sh --dry-run delete ...\n"
    assert not (tmp_path / "asked").exists()


def test_wherever_it_is_called_from_it_packs_its_own_checkout(environment: dict[str, str], tmp_path: Path) -> None:
    link = tmp_path / "link.sh"
    link.symlink_to(SCRIPT)
    words = ["bash", str(link), "--dry-run", "install"]
    said = subprocess.run(words, env=environment | {"CDPATH": "/"}, capture_output=True, text=True, cwd="/")
    assert said.stdout.startswith(f"git -C {SCRIPT.parents[1]} archive ")


@pytest.mark.parametrize("words", [[], ["--help"], ["run"], ["create", "v5litepod-16"], ["explode"]])
def test_bad_words_show_how(environment: dict[str, str], words: list[str]) -> None:
    said = run(environment, *words)
    assert said.returncode == 2
    assert "tpu_pod.sh create" in said.stderr


def test_without_a_name(environment: dict[str, str]) -> None:
    del environment["TPU_NAME"]
    said = run(environment, "delete")
    assert (said.returncode, said.stderr) == (2, "error: TPU_NAME is not set\n")
