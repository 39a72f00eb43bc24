"""The shipped templates of work pools, and what a worker makes of them for a flow run."""

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

from prefect.client.schemas.objects import FlowRun

FOLDER = Path(__file__).resolve().parents[3] / "deploy" / "work_pools"
ARN = "arn:aws:iam::123456789012:role"
# What a site has to say; all else has a default.
GIVEN: dict[str, dict[str, Any]] = {
    "process": {"working_dir": "/srv/dpo"},
    "docker": {"image": "registry.example/dpo:1"},
    "kubernetes": {"image": "registry.example/dpo:1"},
    "ecs": {
        "image": "registry.example/dpo:1",
        "execution_role_arn": f"{ARN}/pull",
        "task_role_arn": f"{ARN}/run",
        "file_system_id": "fs-0123456789abcdef0",
        "access_point_id": "fsap-0123456789abcdef0",
        "secrets": [{"name": "PREFECT_API_AUTH_STRING", "valueFrom": "arn:aws:secretsmanager:x:1:secret:p"}],
    },
}


def template(kind: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((FOLDER / f"{kind}.json").read_text())
    return read


def flow_run() -> FlowRun:
    return FlowRun(id=uuid4(), flow_id=uuid4(), name="quiet-otter")


def configured(model: Any, kind: str, run: FlowRun, **variables: Any) -> Any:
    """The worker's own configuration of the job, ready for this flow run."""
    # An empty client: nothing in the templates refers to a block or a variable on a server.
    made = asyncio.run(
        model.from_template_and_values(template(kind), {**GIVEN[kind], **variables}, client=object())
    )
    made.prepare_for_flow_run(run, worker_name="one")
    return made
