"""The stand-ins of three clusters as one: how a launcher reaches each, and what a test does to it."""

import os
from pathlib import Path
from typing import Any

import pytest

from deploy.launchers import Launcher, State, kubernetes, kubernetes_api, slurm
from deploy.launchers.cluster import ClusterLauncher
from deploy.launchers.kubernetes_api import KubeApi, connect
from deploy.launchers.kubernetes_manifests import KubernetesConfig
from deploy.launchers.skypilot import SkyPilotConfig, SkyPilotLauncher
from deploy.launchers.slurm import SlurmConfig, SlurmLauncher
from tests.support.runs.training_jobs import wait_until
from tests.support.sites import kube_server, sky_site, slurm_site, stand_in


class Site:
    """A cluster whose nodes run `stand_in`; `make` makes launchers, each as a new process would."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "site"
        self.settings: dict[str, Any] = {"python": stand_in.write(folder), "gpus": 0}

    def make(self, run: str = "my-run", **settings: Any) -> ClusterLauncher:
        raise NotImplementedError

    def submitted(self) -> int:
        """The number of jobs that exist."""
        return len(list(self.folder.glob("job-*.json")))

    def away(self, requests: int) -> None:
        """Do not answer so many questions."""

    def refuse(self, answer: str) -> None:
        """Refuse the next job."""

    def lose_answer(self) -> None:
        """Accept the next job and do not say so."""

    def close(self) -> None:
        """End all jobs."""


class Slurm(Site):
    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, patch)
        patch.setenv("PATH", f"{slurm_site.install(self.folder)}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("SLURM_SITE", str(self.folder))
        patch.setattr(slurm, "_KILL_WAIT", 5.0)

    def make(self, run: str = "my-run", **settings: Any) -> SlurmLauncher:
        return SlurmLauncher(SlurmConfig.model_validate(self.settings | settings), run)

    def away(self, requests: int) -> None:
        slurm_site.site(self.folder, away=requests)

    def refuse(self, answer: str) -> None:
        slurm_site.site(self.folder, reject=answer)

    def lose_answer(self) -> None:
        slurm_site.site(self.folder, lost=True)

    def close(self) -> None:
        slurm_site.site(self.folder, hold=None, away=0)
        for job in slurm_site.jobs(self.folder):
            slurm_site.update(job["id"], self.folder, fate="CANCELLED")
        ended = lambda: all(job["state"] not in slurm_site.WAITS for job in slurm_site.jobs(self.folder))  # noqa: E731
        wait_until(ended, "the end of all jobs")


class Sky(Site):
    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, patch)
        patch.setenv("PATH", f"{sky_site.install(self.folder)}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("SKY_SITE", str(self.folder))
        self.settings |= {"bucket": "s3://b", "mount": str(folder), "restarts": 0}

    def make(self, run: str = "my-run", **settings: Any) -> SkyPilotLauncher:
        return SkyPilotLauncher(SkyPilotConfig.model_validate(self.settings | settings), run)

    def away(self, requests: int) -> None:
        sky_site.site(self.folder, away=requests)

    def refuse(self, answer: str) -> None:
        sky_site.site(self.folder, refuse=answer)

    def lose_answer(self) -> None:
        sky_site.site(self.folder, lost=True)

    def close(self) -> None:
        for job in sky_site.jobs(self.folder):
            (self.folder / f"cancel-{job['job_id']}").touch()
        over = lambda: all(job["status"] in sky_site.OVER for job in sky_site.jobs(self.folder))  # noqa: E731
        wait_until(over, "the end of all jobs")


class Kubernetes(Site):
    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, patch)
        self.server = kube_server.Server()
        self.cluster = self.server.cluster
        patch.setenv("KUBECONFIG", str(self.server.write_config(folder / "kubeconfig")))
        patch.setattr(kubernetes_api, "TIMEOUT", 0.5)
        patch.setattr(kubernetes, "_AFTER_GRACE", 1.0)
        self.settings |= {"image": "dpo:1", "claim": "ws", "mount": str(folder), "restarts": 0}

    def make(self, run: str = "my-run", **settings: Any) -> kubernetes.KubernetesLauncher:
        config = KubernetesConfig.model_validate(self.settings | settings)
        return kubernetes.KubernetesLauncher(config, run, KubeApi("default", connect(retries=3)))

    def submitted(self) -> int:
        return sum(request.startswith("POST") for request in self.cluster.requests)

    def away(self, requests: int) -> None:
        self.cluster.faults = [("GET", "503")] * requests

    def refuse(self, answer: str) -> None:
        self.cluster.quota = answer and f"object:{answer}"

    def lose_answer(self) -> None:
        self.cluster.faults = [("POST", "lost")]

    def close(self) -> None:
        self.server.close()


SITES: dict[str, type[Site]] = {"kubernetes": Kubernetes, "slurm": Slurm, "skypilot": Sky}


def until_over(launcher: Launcher, handle: str) -> State:
    wait_until(lambda: launcher.poll(handle) is not State.RUNNING, "the end")
    return launcher.poll(handle)
