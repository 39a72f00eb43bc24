"""Templates of work pools: sound by themselves, and what each worker makes of its own."""

import copy
import json
import re
from typing import Any

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.utilities.schema_tools import validate
from prefect.workers.process import ProcessJobConfiguration

from tests.support.sites.pool_templates import GIVEN, configured, flow_run, template

KINDS = sorted(GIVEN)
CANARY = "user:canary-51c4"


def used(value: Any) -> set[str]:
    return set(re.findall(r"\{\{ ([a-z_]+) \}\}", json.dumps(value)))


@pytest.mark.parametrize("kind", KINDS)
def test_each_variable_is_used_and_each_that_is_used_is_there(kind: str) -> None:
    body = template(kind)
    assert used(body["job_configuration"]) == set(body["variables"]["properties"])
    for name, field in body["variables"]["properties"].items():
        assert field.get("description"), name


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_and_what_a_site_gives_fit_the_schema(kind: str) -> None:
    schema = template(kind)["variables"]
    defaults = {name: field["default"] for name, field in schema["properties"].items() if "default" in field}
    validate(defaults | GIVEN[kind], schema, raise_on_error=True, preprocess=False)
    required = set(schema.get("required", []))
    assert required <= GIVEN[kind].keys()
    assert not required & defaults.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_every_pool_takes_the_folder_that_the_shipped_deployments_name(kind: str) -> None:
    body = template(kind)
    assert body["variables"]["properties"].keys() >= {"working_dir", "env"}


def at(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    pod = manifest["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


def test_a_process_begins_in_its_folder_with_the_settings_of_both() -> None:
    made = configured(ProcessJobConfiguration, "process", flow_run(), env={"MINE": "1"})
    assert str(made.working_dir) == "/srv/dpo"
    assert made.env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert made.env["MINE"] == "1"


def worker_configuration(module: str, name: str) -> Any:
    return getattr(pytest.importorskip(module, reason=f"{module} is of the extra `cloud`"), name)


@pytest.fixture
def kubernetes() -> Any:
    return worker_configuration("prefect_kubernetes.worker", "KubernetesWorkerJobConfiguration")


def test_kubernetes_accepts_the_job(kubernetes: Any) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    given: dict[str, Any] = {
        "gpus": 8, "image_pull_secrets": [{"name": "registry"}], "service_account_name": "dpo",
        "node_selector": {"pool": "gpu"}, "labels": {"kueue.x-k8s.io/queue-name": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }  # fmt: skip
    for variables in ({}, given):
        manifest = configured(kubernetes, "kubernetes", flow_run(), **variables).job_manifest
        # Prefect's worker insists on these two where Kubernetes has no such fields, and ignores them.
        stripped = copy.deepcopy(manifest)
        for misplaced in ("parallelism", "completions"):
            del stripped["spec"]["template"]["spec"][misplaced]
        for version in ("1.29", "1.33", validator.latest_version()):
            validator.validate(stripped, version, strict=True)
        with pytest.raises(validator.ValidationError):
            validator.validate(manifest, "1.33", strict=True)
    _, container = at(manifest)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"


def test_a_pod_that_is_evicted_is_run_again_by_prefect_and_has_time_to_save(kubernetes: Any) -> None:
    made = configured(kubernetes, "kubernetes", flow_run())
    pod, container = at(made.job_manifest)
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert made.job_manifest["spec"]["backoffLimit"] == 0, "else Kubernetes would run it again too"
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert pod["terminationGracePeriodSeconds"] > 60
    assert made.pod_watch_timeout_seconds >= 1800
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    assert container["workingDir"] in mounts, "what is written elsewhere is gone with the pod"
    assert {one["name"] for one in pod["volumes"]} == set(mounts.values())
    assert pod["securityContext"]["runAsNonRoot"]


def test_no_login_of_the_worker_is_in_a_manifest(kubernetes: Any) -> None:
    settings = {PREFECT_API_AUTH_STRING: CANARY, PREFECT_API_URL: "http://prefect:4200/api"}
    with temporary_settings(settings):
        manifest = configured(kubernetes, "kubernetes", flow_run()).job_manifest
    _, container = at(manifest)
    assert "http://prefect:4200/api" in json.dumps(container["env"])
    assert CANARY not in json.dumps(manifest)
    assert container["envFrom"] == [{"secretRef": {"name": "dpo"}}]


def test_docker_makes_a_container_that_can_do_little(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("prefect_docker.worker", reason="prefect-docker is of the extra `cloud`")
    from docker.models.containers import _create_container_args

    made = configured(
        module.DockerWorkerJobConfiguration,
        "docker",
        flow_run(),
        device_requests=[{"Driver": "nvidia", "Count": -1, "Capabilities": [["gpu"]]}],
        networks=["dpo_default"],
    )
    monkeypatch.setattr(module.DockerWorkerJobConfiguration, "get_extra_hosts", lambda *_: None)
    worker = module.DockerWorker(work_pool_name="dpo")
    settings = worker._build_container_settings(None, made)
    assert settings["network_mode"] is None, "Docker refuses it beside networks"
    host = _create_container_args({**settings, "version": "1.50"})["host_config"]
    assert host["Binds"] == ["dpo:/srv/dpo"]
    assert (host["Memory"], host["MemorySwap"], host["ShmSize"]) == (16 * 2**30, 16 * 2**30, 8 * 2**30)
    assert (host["CapDrop"], host["SecurityOpt"]) == (["ALL"], ["no-new-privileges"])
    assert host["DeviceRequests"][0]["Count"] == -1
    assert not settings["privileged"]
    assert (settings["user"], settings["working_dir"]) == ("10001:10001", "/srv/dpo")
    assert not made.auto_remove, "its exit code would go with it"


@pytest.mark.parametrize(
    ("kind", "module", "name"),
    [
        ("process", "prefect.workers.process", "ProcessWorker"),
        ("docker", "prefect_docker", "DockerWorker"),
        ("kubernetes", "prefect_kubernetes", "KubernetesWorker"),
        ("ecs", "prefect_aws.workers", "ECSWorker"),
    ],
)
def test_the_worker_can_do_nothing_new_that_the_template_has_not_decided(
    kind: str, module: str, name: str
) -> None:
    """What a new version of the worker can be told shows here, to be taken up or left out on purpose."""
    left_out = {
        "process": set(),
        "docker": {"registry_credentials"},
        "kubernetes": {"cluster_config"},
        "ecs": {
            "aws_credentials", "prefect_api_key_secret_arn", "prefect_api_auth_string_secret_arn",
            # Fixed by Prefect itself.
            "stream_output", "task_start_timeout_seconds", "task_watch_poll_interval",
        },
    }  # fmt: skip
    worker = worker_configuration(module, name)
    theirs = worker.get_default_base_job_template()["job_configuration"].keys()
    assert theirs - template(kind)["job_configuration"].keys() == left_out[kind]
