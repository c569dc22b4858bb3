"""The files for containers: fields of the MPIJob, ports and health checks, and versions.

No cluster runs here. The MPIJob's fields are those of the MPI Operator's v2beta1, and those of pods
as far as the file uses them; any other field is taken for misspelt.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

DOCKER = Path(__file__).parents[1] / "docker"

pytestmark = pytest.mark.skipif(not DOCKER.is_dir(), reason="images have no docker/")

# A dictionary has the fields of an object, a list the form of its items, a type or a set values.
QUANTITY = re.compile(r"\d+(\.\d+)?(m|Ki|Mi|Gi)?")
SECURITY = {
    "runAsUser": int, "runAsNonRoot": bool, "allowPrivilegeEscalation": bool,
    "capabilities": {"drop": [str], "add": [str]},
}  # fmt: skip
CONTAINER = {
    "name": str, "image": str, "args": [str], "command": [str],
    "env": [{"name": str, "value": str}],
    "resources": {part: {"cpu": QUANTITY, "memory": QUANTITY} for part in ("limits", "requests")},
    "securityContext": SECURITY,
    "ports": [{"containerPort": int, "name": str}],
    "readinessProbe": {"tcpSocket": {"port": int}, "periodSeconds": int},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}  # fmt: skip
POD = {
    "containers": [CONTAINER],
    "volumes": [{"name": str, "emptyDir": {"medium": {"", "Memory"}, "sizeLimit": QUANTITY}}],
}
REPLICAS = {
    "replicas": int, "restartPolicy": {"Never", "OnFailure"},
    "template": {"metadata": {"labels": dict}, "spec": POD},
}  # fmt: skip
MPI_JOB = {
    "apiVersion": {"kubeflow.org/v2beta1"},
    "kind": {"MPIJob"},
    "metadata": {"name": re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")},
    "spec": {
        "slotsPerWorker": int, "runLauncherAsWorker": bool, "sshAuthMountPath": str,
        "launcherCreationPolicy": {"AtStartup", "WaitForWorkersReady"},
        "mpiImplementation": {"OpenMPI", "Intel", "MPICH"},
        "runPolicy": {
            "cleanPodPolicy": {"None", "Running", "All"}, "ttlSecondsAfterFinished": int,
            "activeDeadlineSeconds": int, "backoffLimit": int, "suspend": bool,
        },
        "mpiReplicaSpecs": {"Launcher": REPLICAS, "Worker": REPLICAS},
    },
}  # fmt: skip


def misfits(value: Any, form: Any, path: str = "") -> list[str]:
    """The places of a document that have another form."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return [path]
        unknown = [f"{path}.{key}" for key in value if key not in form]
        known = [misfits(value[key], form[key], f"{path}.{key}") for key in value if key in form]
        return [*unknown, *itertools.chain(*known)]
    if isinstance(form, list):
        if not isinstance(value, list):
            return [path]
        return [*itertools.chain(*(misfits(item, form[0], f"{path}[]") for item in value))]
    if isinstance(form, re.Pattern):
        fits = isinstance(value, str) and form.fullmatch(value) is not None
    else:
        fits = value in form if isinstance(form, set) else type(value) is form
    return [] if fits else [path]


def job() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "cloud" / "mpijob.yaml").read_text())
    return loaded


def test_fields_of_the_mpi_job() -> None:
    assert misfits(job(), MPI_JOB) == []
    specs = job()["spec"]["mpiReplicaSpecs"]
    assert specs["Launcher"]["replicas"] == 1
    for role in ("Launcher", "Worker"):
        pod = specs[role]["template"]["spec"]
        mounted = {mount["name"] for c in pod["containers"] for mount in c.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert container["securityContext"]["runAsNonRoot"]
            assert container["resources"]["limits"].keys() == {"cpu", "memory"}


def test_wrong_fields_are_found() -> None:
    wrong = job()
    wrong["spec"]["slotPerWorker"] = 1
    wrong["spec"]["runPolicy"]["cleanPodPolicy"] = "Always"
    worker = wrong["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    worker["args"] = "worker"
    worker["resources"]["limits"]["memory"] = 4
    pod = ".spec.mpiReplicaSpecs.Worker.template.spec.containers[]"
    assert sorted(misfits(wrong, MPI_JOB)) == [
        f"{pod}.args", f"{pod}.resources.limits.memory",
        ".spec.runPolicy.cleanPodPolicy", ".spec.slotPerWorker",
    ]  # fmt: skip


def test_one_port_for_ssh() -> None:
    """Of the server, of its clients, of the image, and of the probe that lets launchers start."""
    cloud = DOCKER / "cloud"
    places = [
        *re.findall(r"^\s*Port (\d+)", (cloud / "ssh_config").read_text(), re.MULTILINE),
        *re.findall(r"^\s*Port (\d+)", (cloud / "sshd_config").read_text(), re.MULTILINE),
        *re.findall(r"^EXPOSE (\d+)", (cloud / "Dockerfile").read_text(), re.MULTILINE),
    ]
    worker = job()["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    places += [worker["ports"][0]["containerPort"], worker["readinessProbe"]["tcpSocket"]["port"]]
    assert len(places) == 5
    assert {int(port) for port in places} == {2222}


def test_what_the_launcher_of_compose_waits_for() -> None:
    """Workers are healthy by the check of the image, which compose does not replace."""
    compose = yaml.safe_load((DOCKER / "cloud" / "compose.yaml").read_text())
    services = compose["services"]
    waited = services["launcher"]["depends_on"]
    assert waited == {"worker": {"condition": "service_healthy"}}
    assert not any("healthcheck" in service for service in services.values())
    assert 'CMD ["ssh", "localhost", "true"]' in (DOCKER / "cloud" / "Dockerfile").read_text()
    assert set(services["worker"]["networks"]) <= compose["networks"].keys()
    assert {volume.split(":")[0] for volume in services["worker"]["volumes"]} == {"keys"}


def common(image: str) -> str:
    """What the Dockerfiles have in common."""
    text = (DOCKER / image / "Dockerfile").read_text()
    found = re.search(r"(?ms)^FROM .* AS horovod$.*?(?=^# --- the image)", text)
    assert found is not None
    return found[0]


def test_versions_stand_in_one_file(tmp_path: Path) -> None:
    """The images take them from there, unless build arguments name others."""
    assert common("pcie") == common("cloud")
    versions = dict(line.split("=") for line in (DOCKER / "versions.env").read_text().split())
    for name in versions:
        assert re.search(rf"^ARG (.* )?{name}( |$)", common("cloud"), re.MULTILINE), name
    (tmp_path / "python3").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for given, openmpi in (("", versions["OPENMPI"]), ("4.0", "4.0")):
        done = subprocess.run(
            [DOCKER / "image.sh", "mpi"], env=env | {"OPENMPI": given},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.endswith(f" openmpi=={openmpi} mpi4py=={versions['MPI4PY']}\n")
