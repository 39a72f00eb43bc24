"""Client of a reward server: sends prompts and completions over HTTP, returns rewards.

Each request is `POST {"prompts": [...], "completions": [...]}` as JSON. The answer is `{"rewards": [...]}` or
the list alone: one number for each completion, in order. The prompt of a conversation is the JSON of its
messages. Of a model of images it is `POST {"prompts": [...], "images": [...], "metadata": [...]}`: PNG files
in base64, and what the data say of each prompt as JSON, "" for nothing.
"""

import base64
import io
import json
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dpo_core.errors import StageFailed
from dpo_core.http_client import JsonServer, usable_address

TOKEN = "DPO_REWARD_TOKEN"
"""Environment variable of the bearer token, which appears in no recipe, artifact or log."""
_BATCH = 64  # completions in a request

if TYPE_CHECKING:
    from PIL.Image import Image


def is_url(spec: str) -> bool:
    """Whether a recipe's reward is a server's address."""
    return spec.lower().startswith(("http://", "https://"))


class HttpReward:
    """Sends batches to a server; see `http_client` for what is tried again, and when.

    Args:
        timeout: seconds without received data after which a request counts as failed.
        retries: maximum number of repetitions of a request.

    Raises:
        RecipeError: the address is invalid.
    """

    def __init__(self, url: str, *, timeout: float = 60.0, retries: int = 6) -> None:
        usable_address(url, "the address of a reward", TOKEN)
        self.name = url
        self._timeout, self._retries = timeout, retries

    @cached_property
    def _server(self) -> JsonServer:
        return JsonServer(
            f"the reward at {self.name}",
            self.name,
            address_field="reward.source",
            token=TOKEN,
            timeout=self._timeout,
            retries=self._retries,
        )

    def __call__(self, prompts: list[str], completions: list[str]) -> list[Any]:
        """The rewards of the server, one per completion; `CheckedReward` checks the values.

        Raises:
            StageFailed: the server is unreachable, rejects the request, or answers without rewards.
        """
        return self._rewards({"prompts": prompts, "completions": completions})

    def _rewards(self, columns: dict[str, list[str]]) -> list[Any]:
        """The rewards of all rows, in batches."""
        rewards: list[Any] = []
        for start in range(0, len(columns["prompts"]), _BATCH):
            rewards += self._request({n: rows[start : start + _BATCH] for n, rows in columns.items()})
        return rewards

    def _request(self, columns: dict[str, list[str]]) -> list[Any]:
        content = self._server.post(columns)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):  # of an answer such as 200,000 brackets
            answer = None
        rewards = answer.get("rewards") if isinstance(answer, dict) else answer
        if not isinstance(rewards, list):
            raise self._server.unusable(
                content,
                "rewards",
                'Make the server answer {"rewards": [numbers]}, one number for each completion',
            )
        # Check each request: one short and one long answer must not shift the rewards between rows.
        expected = len(columns["prompts"])
        if len(rewards) != expected:
            what = "images" if "images" in columns else "completions"
            raise StageFailed(
                f"{self._server.name} answered {len(rewards)} rewards for {expected} {what}",
                "Make the server answer exactly one number for each completion, in order",
            )
        return rewards


class HttpImageReward(HttpReward):
    """Sends images to a server."""

    def __call__(self, prompts: list[str], images: list["Image"], metadata: list[str]) -> list[Any]:  # type: ignore[override]
        """As of texts."""
        files = [base64.b64encode(_png(image)).decode() for image in images]
        return self._rewards({"prompts": prompts, "images": files, "metadata": metadata})


def _png(image: "Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()
