"""The files of deploy/ and the workflow are what their programs accept, and hold no password."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text().splitlines()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
MANIFEST = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
SHARED = next(part for part in MANIFEST if part["kind"] == "ConfigMap")["data"]
PROGRAMS = ("podman", "podman-compose", "mmdebstrap")
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
    bases = [line.split()[1] for line in DOCKERFILE if line.startswith("FROM ")]
    images = {container["image"] for container in containers().values()}
    images |= {service["image"] for service in COMPOSE["services"].values()}
    for image in (*bases, *images):
        assert re.search(r":\d+\.\d+", image), image
    assert "USER 1000" in DOCKERFILE
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods())


def test_every_password_is_a_file_from_outside() -> None:
    assert COMPOSE["secrets"] == {"password": {"file": "./secrets/password"}}
    for service in COMPOSE["services"].values():
        assert service["secrets"] == ["password"]
        for name, value in service["environment"].items():
            assert ("PASSWORD" in name) == (value == "/run/secrets/password"), name
    for pod in pods():
        (volume,) = [found["secret"] for found in pod["volumes"] if "secret" in found]
        assert volume == {"secretName": "study", "defaultMode": 0o440}
        variables = {v["name"]: v.get("value") for v in pod["containers"][0].get("env", ())}
        for name, value in {**SHARED, **variables}.items():
            assert ("PASSWORD" in name) == (value == "/run/secrets/study/password"), name
    tracked = subprocess.run(
        ["git", "ls-files", "deploy"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not [path for path in tracked if "secrets/" in path]
    for path in tracked:
        assert not re.search(r"://[^\s/@]*:[^\s/@]*@", (ROOT / path).read_text())


def test_the_command_gets_the_password_by_a_file_that_only_it_reads(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("a:b\\c\n")
    script = (DEPLOY / "entrypoint").read_text().replace("/tmp/", f"{tmp_path}/")
    done = subprocess.run(
        [
            "sh",
            "-c",
            script,
            "entrypoint",
            "sh",
            "-c",
            'cat "$PGPASSFILE"; stat -c %a "$PGPASSFILE"',
        ],
        env={**os.environ, "PASSWORD_FILE": str(tmp_path / "password")},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("*:*:*:*:a\\:b\\\\c\n600\n", "")


def test_every_container_has_no_more_rights_and_memory_than_it_needs() -> None:
    for service in COMPOSE["services"].values():
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert {"mem_limit", "pids_limit"} <= set(service)
    for pod in pods():
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
    # else Dask counts on a share of the limit, one by the number of cores, and pauses the worker
    assert "--memory-limit=0" in containers()["worker"]["args"]


def test_postgresql_is_ready_only_when_it_answers_from_outside() -> None:
    probe = ["pg_isready", "--host=127.0.0.1", "--username=study", "--dbname=mlflow"]
    assert COMPOSE["services"]["postgres"]["healthcheck"]["test"] == ["CMD", *probe]
    assert containers()["postgres"]["readinessProbe"]["exec"]["command"] == probe


def test_a_change_of_the_code_installs_no_dependency_again() -> None:
    installed = DOCKERFILE.index("COPY --from=requirements /source/requirements.txt ./")
    last_stage = max(i for i, line in enumerate(DOCKERFILE) if line.startswith("FROM "))
    assert not [line for line in DOCKERFILE[last_stage:installed] if line.startswith("COPY")]
    assert any(line.startswith("RUN pip install --no-cache-dir --no-deps .") for line in DOCKERFILE)
    listed = subprocess.run(
        [sys.executable, str(DEPLOY / "requirements.py")], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    wanted = project()["dependencies"] + project()["optional-dependencies"]["cluster"]
    assert [line.replace("tensorflow-cpu", "tensorflow") for line in listed] == wanted
    assert ("tensorflow-cpu" in listed[0]) == (platform.machine() == "x86_64")
    assert any(line.startswith("bokeh") for line in listed)  # for the scheduler's pages


def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_base_images_have_stand_ins() -> None:
    module = (DEPLOY / "checks" / "images.py").read_text()
    bases = [line.split()[1] for line in DOCKERFILE if line.startswith("FROM ")]
    for image in (*bases, COMPOSE["services"]["postgres"]["image"]):
        assert f'("{image}"' in module


def test_check_says_in_a_line_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(DEPLOY / "check")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    missing = "error: deploy/check needs podman, which is not installed; apt-get install podman"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(missing)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_containers_survive_what_deploy_check_does_to_them(tmp_path: Path) -> None:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"deploy/check needs {', '.join(missing)}")
    if os.getuid() != 0:
        pytest.skip("deploy/check needs root")
    done = subprocess.run([str(DEPLOY / "check")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_runs_the_contributors_own_commands() -> None:
    text = WORKFLOW.read_text()
    steps = yaml.safe_load(text)["jobs"]["check"]["steps"]
    assert steps[-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert len(text.splitlines()) <= 15


def test_what_the_image_copies_is_there() -> None:
    for line in DOCKERFILE:
        if line.startswith("COPY ") and "--from=" not in line:
            for source in line.split()[1:-1]:
                assert Path(ROOT, source).exists()
                assert f"!{source}" in (ROOT / ".dockerignore").read_text().split()
