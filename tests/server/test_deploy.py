"""Files for those who run the server: dashboards ask for figures that there are, commands are ones that the program takes."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import pytest
import typer
import yaml

from llm_infer.commands import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "configs" / "deploy"
SERVE = typer.main.get_command(app.app).commands["serve"]  # type: ignore[attr-defined]
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))


def takes(words: list[str]) -> None:
    SERVE.make_context("serve", words)


def test_a_dashboard_asks_for_figures_that_there_are(client: httpx.Client) -> None:
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    given = set(re.findall(r"^# TYPE (\S+)", client.get("/metrics").text, re.MULTILINE))
    given |= {f"{name}_bucket" for name in given}
    asked = set(re.findall(r"llm_infer:\w+", (ROOT / "configs" / "dashboards" / "grafana.json").read_text()))
    assert len(asked) > 15 and asked <= given, asked - given
    panels = json.loads((ROOT / "configs" / "dashboards" / "grafana.json").read_text())["panels"]
    assert all(panel["title"] and panel["targets"] for panel in panels)


def test_the_service_of_systemd_starts_a_command_that_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("k\n")
    unit = configparser.ConfigParser(interpolation=None, strict=False, delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "llm-infer.service")
    command = shlex.split(unit["Service"]["ExecStart"].replace("${CREDENTIALS_DIRECTORY}", str(tmp_path)))
    assert command[:2] == ["/opt/llm-infer/bin/llm-infer", "serve"]
    takes(command[2:])
    assert unit["Service"]["KillSignal"] == "SIGTERM" and int(unit["Service"]["TimeoutStopSec"]) > 30


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images_copy_what_there_is_and_serve(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    seen = set()
    for line in lines:
        word, _, rest = line.partition(" ")
        seen.add(word)
        if word == "COPY":
            assert all((ROOT / name).exists() for name in rest.split()[:-1])
        if word == "RUN" and "pip install" in rest:
            (wanted,) = re.findall(r"\.\[([\w,]+)\]", rest)
            assert set(wanted.split(",")) <= extras and "server" in wanted
        if word == "ENTRYPOINT":
            takes(json.loads(rest)[2:])
    assert {"FROM", "COPY", "RUN", "ENTRYPOINT", "HEALTHCHECK"} <= seen


@pytest.mark.sweep
def test_the_lines_of_the_cpu_image_run(tmp_path: Path) -> None:
    place = tmp_path / "llm-infer"
    source = tmp_path / "src"
    for line in (DEPLOY / "Dockerfile.cpu").read_text().splitlines():
        word, _, rest = line.partition(" ")
        if word == "COPY":
            *names, target = rest.split()
            (source / target).mkdir(parents=True, exist_ok=True)
            for name in names:
                found = ROOT / name
                if found.is_dir():
                    shutil.copytree(found, source / target, dirs_exist_ok=True)
                else:
                    shutil.copy(found, source / target)
        if word == "RUN":
            command = rest.replace("/opt/llm-infer", str(place)).replace("python -m venv", f"{sys.executable} -m venv")
            subprocess.run(command, shell=True, check=True, cwd=source, env={**os.environ, "PYTHONPATH": ""})
    assert (place / "bin" / "llm-infer").exists()


def test_compose_builds_what_there_is() -> None:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    build = found["services"]["llm-infer"]["build"]
    context = (DEPLOY / build["context"]).resolve()
    assert context == ROOT and (context / build["dockerfile"]).is_file()
    scrape = yaml.safe_load(found["configs"]["prometheus"]["content"])["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == ["llm-infer:8000"]
