"""Errors of `dpo deploy` for job variables that a work pool's template does not have."""

from typing import Any

import pytest

from dpo_core.errors import RecipeError
from tasks.scheduling.deployment_file import Deployment
from tasks.scheduling.work_pools import check_job_variables, creation
from tests.support.sites.pool_templates import GIVEN, template


def deployment(**variables: Any) -> Deployment:
    return Deployment.model_validate(
        {
            "name": "nightly",
            "entrypoint": "flows.deployed.deployed",
            "concurrency_limit": {"limit": 1},
            "work_pool": {"name": "dpo", "job_variables": variables},
        }
    )


def check(kind: str, **variables: Any) -> None:
    check_job_variables(deployment(**variables), kind, template(kind))


@pytest.mark.parametrize("kind", sorted(GIVEN))
def test_the_variables_of_the_shipped_deployments_go_to_every_pool(kind: str) -> None:
    check(kind, **(GIVEN[kind] | {"working_dir": "/srv/dpo", "env": {"A": "1"}, "env.B": "2"}))


@pytest.mark.parametrize(
    ("kind", "variables", "words"),
    [
        ("process", {"workingdir": "/srv/dpo"}, "has no workingdir (did you mean working_dir?)"),
        ("process", {"image": "dpo:1"}, "of type process, has no image; known are name, command"),
        ("process", {"envv.A": "1"}, "has no envv.A"),
        ("process", {"env": {"A": 1}}, "'env.A'"),
        ("kubernetes", {}, "'image' is a required property"),
        ("kubernetes", {"image": "dpo:1", "gpus": "8"}, "'8' is not of type 'integer'"),
        ("kubernetes", {"image": "dpo:1", "grace_seconds": 5}, "less than the minimum of 60"),
        ("docker", {"image": "dpo:1", "image_pull_policy": "always"}, "is not one of"),
        ("ecs", {**GIVEN["ecs"], "secrets": [{"name": "A", "valueFrom": "hunter2"}]}, "does not match"),
    ],
)  # fmt: skip
def test_what_prefect_would_drop_or_refuse_at_night_is_refused(
    kind: str, variables: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        check(kind, **variables)
    assert words in caught.value.problem
    assert caught.value.problem.startswith("nightly: work_pool.job_variables: ")


def test_a_pool_without_a_template_takes_all() -> None:
    check_job_variables(deployment(anything=1), "process", {})


def test_the_remedy_names_a_template_that_is_there() -> None:
    assert creation("dpo", "kubernetes").endswith("deploy/work_pools/kubernetes.json")
    assert creation("dpo", "cloud-run") == "prefect work-pool create dpo --type cloud-run"
