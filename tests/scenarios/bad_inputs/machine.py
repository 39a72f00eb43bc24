"""Faults of the machine that the command line meets in this process: the workspace."""

from tests.scenarios.bad_inputs import World, bad


@bad(2, "workspace", "is a file", "Give a folder")
def workspace_is_a_file(world: World) -> list[str]:
    return world.run(workspace=world.file("runs", "x"))


@bad(2, "no access to", "Not a directory", "choose another workspace")
def workspace_below_a_file(world: World) -> list[str]:
    return world.run(workspace=world.file("plain", "x") + "/runs")


@bad(2, "workspace s3://bucket/runs is a remote URL", "mount the bucket")
def workspace_is_remote(world: World) -> list[str]:
    return world.run(workspace="s3://bucket/runs")


@bad(2, "no access to", "File name too long")
def workspace_name_too_long(world: World) -> list[str]:
    return world.run(workspace=f"/tmp/{'x' * 300}")
