"""The pods of kubernetes.yaml, as far as Podman runs them.

Podman knows no services, stateful sets, jobs and probes by HTTP. Each workload is run as one pod of
its template, on a network where it has the service's name.
"""

import base64
import json
from functools import partial
from pathlib import Path
from typing import Any

from checks.breakage import SMALL, check_pages, shows
from checks.images import DEPLOY
from checks.podman import (
    await_that,
    expect_exit,
    has_ended,
    logs_on_failure,
    podman,
    step,
    succeeds,
)
from checks.stack import PASSWORD

_ORDER = ("postgres", "mlflow", "scheduler", "worker", "study", "dashboard")


def check(folder: Path) -> None:
    """Run the pods of kubernetes.yaml with podman kube play"""
    import yaml  # comes with podman-compose; not needed by the other checks

    parts = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    settings = [part for part in parts if part["kind"] == "ConfigMap"]
    pods = {part["metadata"]["name"]: _pod(part) for part in parts if "template" in _spec(part)}
    _spec(pods["study"])["containers"][0]["args"] += SMALL
    podman("network", "create", "pods")
    for volume in ("database", "artifacts"):
        podman("volume", "create", volume)
    podman("kube", "play", "-", given=json.dumps(_secret()))
    with logs_on_failure():
        for name in _ORDER:
            step(f"pod {name}", partial(_play, name, [*settings, pods[name]]))
        step("study, to its end: exit code 0", _await_end)
        print(podman("logs", "--tail=16", "study-study"), flush=True)
        step("pages answer", check_pages)


def _spec(part: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = part.get("spec", {})
    return spec


def _secret() -> dict[str, Any]:
    data = {"password": base64.b64encode(PASSWORD.encode()).decode()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "study"}, "data": data}


def _pod(workload: dict[str, Any]) -> dict[str, Any]:
    """One pod of a workload, with the volumes that it claims."""
    spec = dict(_spec(workload)["template"]["spec"])
    for volume in spec["volumes"]:
        if "secret" in volume:
            volume["secret"]["optional"] = False  # the default, without which Podman 4.3 crashes
    for claim in _spec(workload).get("volumeClaimTemplates", ()):
        name = claim["metadata"]["name"]
        volume = {"name": name, "persistentVolumeClaim": {"claimName": name}}
        spec["volumes"] = [*spec["volumes"], volume]
    metadata = {"name": workload["metadata"]["name"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _play(name: str, parts: list[dict[str, Any]]) -> None:
    """Start a pod, and wait until it is ready."""
    (inside,) = _spec(parts[-1])["containers"]
    for port in inside.get("ports", ()):
        port["hostPort"] = port["containerPort"]
    podman(
        "kube",
        "play",
        f"--network=pods:alias={name}",
        "-",
        given="\n---\n".join(map(json.dumps, parts)),
    )
    probe = inside.get("readinessProbe", {})
    if "exec" in probe:
        command = ("exec", f"{name}-{name}", *probe["exec"]["command"])
        await_that(f"{name} is ready", partial(succeeds, *command))
    elif probe:
        page = f"http://127.0.0.1:{probe['httpGet']['port']}{probe['httpGet']['path']}"
        await_that(f"{name} is ready", partial(shows, page, "OK" if name == "mlflow" else "ok"))


def _await_end() -> None:
    await_that("the study ends", partial(has_ended, "study-study"))
    expect_exit("study-study", 0)
