"""The files of deploy/ and the workflow are what their programs accept, and hold no password."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT

DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
MANIFEST = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def containers() -> dict[str, Any]:
    """Every container of the manifest, by name."""
    return {pod["containers"][0]["name"]: pod["containers"][0] for pod in pods()}


def pods() -> list[Any]:
    """Every pod of the manifest."""
    templates = [part.get("spec", {}).get("template") for part in MANIFEST]
    return [template["spec"] for template in templates if template]


@pytest.mark.parametrize(
    "part", MANIFEST, ids=lambda part: f"{part['kind']} {part['metadata']['name']}"
)
def test_kubernetes_schema_accepts_the_manifest(part: dict[str, Any]) -> None:
    kubernetes_validate.validate(part, "1.33", strict=True)


def test_docker_accepts_the_compose_file() -> None:
    docker = shutil.which("docker")
    known = docker and subprocess.run([docker, "compose", "version"], capture_output=True)
    if not known or known.returncode != 0:
        pytest.skip("this machine's Docker, if it has one, knows no compose")
    done = subprocess.run(
        [str(docker), "compose", "--file", str(DEPLOY / "compose.yaml"), "config", "--quiet"],
        env={**os.environ, "POSTGRES_PASSWORD": "of this test"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_both_start_the_same_commands() -> None:
    for name, container in containers().items():
        if name != "postgres":
            assert COMPOSE["services"][name]["command"] == container["args"]
    assert set(containers()) == set(COMPOSE["services"])


def test_every_image_is_pinned_and_none_runs_as_root() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM ")]
    images = {container["image"] for container in containers().values()}
    images |= {service["image"] for service in COMPOSE["services"].values()}
    for image in (base, *images):
        assert re.search(r":\d+\.\d+", image), image
    assert "USER 1000" in lines
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods())


def test_every_password_comes_from_outside() -> None:
    for service in COMPOSE["services"].values():
        for name, value in service.get("environment", {}).items():
            assert ("PASSWORD" in name) == value.startswith("${POSTGRES_PASSWORD:?")
    for container in containers().values():
        for variable in container.get("env", ()):
            if "PASSWORD" in variable["name"]:
                assert variable["valueFrom"]["secretKeyRef"] == {"name": "study", "key": "password"}
    for path in DEPLOY.iterdir():
        assert not re.search(r"://[^\s/@]*:[^\s/@]*@", path.read_text())


def test_the_workflow_runs_the_contributors_own_commands() -> None:
    text = WORKFLOW.read_text()
    steps = yaml.safe_load(text)["jobs"]["check"]["steps"]
    assert steps[-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert len(text.splitlines()) <= 15


def test_what_the_image_copies_is_there() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert Path(ROOT, source).exists()
