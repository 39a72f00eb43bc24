"""The template of the ECS pool through the real worker, against a stand-in for AWS that checks requests."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from tests.support.sites.pool_templates import GIVEN, configured, flow_run

ecs_worker = pytest.importorskip(
    "prefect_aws.workers.ecs_worker", reason="prefect-aws is of the extra `cloud`"
)
moto = pytest.importorskip("moto", reason="moto stands in for AWS")
boto3 = pytest.importorskip("boto3")

pytestmark = pytest.mark.slow  # the stand-in takes half a minute to load

CANARY = "user:canary-9d0b"
REGION = "eu-central-1"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An account with a cluster and the network that each new account has."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    with moto.mock_aws():
        ecs = boto3.client("ecs", region_name=REGION)
        ecs.create_cluster(clusterName="dpo")
        yield ecs


def started(aws: Any, **variables: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What the worker registered, ran, and asked for."""
    run = flow_run()
    asked: dict[str, Any] = {}
    aws.meta.events.register("before-parameter-build.ecs.RunTask", lambda params, **_: asked.update(params))
    settings = {PREFECT_API_AUTH_STRING: CANARY, PREFECT_API_URL: "http://prefect:4200/api"}
    with temporary_settings(settings):
        made = configured(ecs_worker.ECSJobConfiguration, "ecs", run, cluster="dpo", **variables)
        worker = ecs_worker.ECSWorker(work_pool_name="dpo")
        arn, _ = worker._prepare_and_create_task(logging.getLogger("ecs"), aws, made, run)
    task = aws.describe_tasks(cluster="dpo", tasks=[arn])["tasks"][0]
    shown = aws.describe_task_definition(taskDefinition=task["taskDefinitionArn"])["taskDefinition"]
    return shown, task, asked


def test_a_task_runs_with_the_file_system_the_log_and_time_to_save(aws: Any) -> None:
    definition, task, asked = started(aws)
    (container,) = definition["containerDefinitions"]
    assert asked["launchType"] == "FARGATE"
    assert definition["requiresCompatibilities"] == ["FARGATE"]
    assert definition["networkMode"] == "awsvpc"
    assert (definition["executionRoleArn"], definition["taskRoleArn"]) == (
        GIVEN["ecs"]["execution_role_arn"],
        GIVEN["ecs"]["task_role_arn"],
    )
    assert container["stopTimeout"] == 120
    assert container["user"] == "10001:10001"
    (volume,) = definition["volumes"]
    assert volume["efsVolumeConfiguration"]["transitEncryption"] == "ENABLED"
    assert container["mountPoints"] == [{"sourceVolume": volume["name"], "containerPath": "/srv/dpo"}]
    assert container["workingDirectory"] == "/srv/dpo"
    assert container["logConfiguration"]["logDriver"] == "awslogs"
    assert container["logConfiguration"]["options"]["awslogs-group"] == "dpo"
    (override,) = asked["overrides"]["containerOverrides"]
    assert override["command"] == ["prefect", "flow-run", "execute"]
    assert {"name": "PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "value": "30"} in override["environment"]
    assert asked["networkConfiguration"]["awsvpcConfiguration"]["subnets"]
    assert task["lastStatus"]


def test_the_login_comes_by_reference_alone(aws: Any) -> None:
    definition, task, asked = started(aws)
    assert definition["containerDefinitions"][0]["secrets"] == GIVEN["ecs"]["secrets"]
    for told in (definition, task, asked):
        assert CANARY not in json.dumps(told, default=str)


def test_a_second_run_registers_nothing_new(aws: Any) -> None:
    first, _, _ = started(aws)
    ecs_worker._TASK_DEFINITION_CACHE.clear()  # as a worker that was started anew
    second, _, _ = started(aws)
    assert second["revision"] == first["revision"]


def test_gpus_are_those_of_ones_own_machines(aws: Any) -> None:
    definition, _, asked = started_on_ec2(aws)
    (container,) = definition["containerDefinitions"]
    assert container["resourceRequirements"] == [{"type": "GPU", "value": "4"}]
    assert container["linuxParameters"] == {"sharedMemorySize": 8192}
    assert asked["launchType"] == "EC2"
    plain, _, _ = started(aws, family="plain")
    assert not plain["containerDefinitions"][0].get("linuxParameters"), "Fargate refuses a larger /dev/shm"


def started_on_ec2(aws: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    ec2 = boto3.client("ec2", region_name=REGION)
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    machine = boto3.resource("ec2", region_name=REGION).create_instances(
        ImageId=image, MinCount=1, MaxCount=1
    )[0]
    from moto.ec2 import utils

    document = json.dumps(utils.generate_instance_identity_document(machine))
    aws.register_container_instance(cluster="dpo", instanceIdentityDocument=document)
    return started(
        aws,
        launch_type="EC2",
        cpu=1024,
        memory=2048,
        resource_requirements=[{"type": "GPU", "value": "4"}],
        linux_parameters={"sharedMemorySize": 8192},
    )
