"""Client of a reward server: sends prompts and completions over HTTP, returns rewards.

Each request is `POST {"prompts": [...], "completions": [...]}` as JSON. The answer is `{"rewards": [...]}` or
the list alone: one number for each completion, in order. The prompt of a conversation is the JSON of its
messages.
"""

import json
import logging
from typing import Any

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.http_client import Answer, JsonServer, address, secret_of

log = logging.getLogger(__name__)

TOKEN = "DPO_REWARD_TOKEN"
"""Environment variable of the bearer token, which appears in no recipe, artifact or log."""
_LONGEST_WAIT = 30.0


def is_url(spec: str) -> bool:
    """Whether a recipe's reward is a server's address."""
    return spec.lower().startswith(("http://", "https://"))


class HttpReward:
    """Sends batches to a server; retries transient failures (no connection, 429, 5xx) with growing waits.

    Args:
        batch_size: completions per request.
        timeout: seconds without received data after which a request counts as failed.
        attempts: maximum number of attempts per batch.
        first_wait: seconds before the second attempt; doubled before each further one.

    Raises:
        RecipeError: the address is invalid.
    """

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 64,
        timeout: float = 60.0,
        attempts: int = 6,
        first_wait: float = 1.0,
    ) -> None:
        _check_address(url)
        self.name = url
        self.batch_size, self.timeout = batch_size, timeout
        self.attempts, self.first_wait = attempts, first_wait

    def __call__(self, prompts: list[str], completions: list[str]) -> list[Any]:
        """The rewards of the server, one per completion; `CheckedReward` checks the values.

        Raises:
            StageFailed: the server is unreachable, rejects the request, or answers without rewards.
        """
        rewards: list[Any] = []
        name, token = f"the reward at {self.name}", secret_of(TOKEN)
        with JsonServer(name, self.name, timeout=self.timeout, secret=token) as server:
            for start in range(0, len(completions), self.batch_size):
                part = slice(start, start + self.batch_size)
                rewards += self._request(server, prompts[part], completions[part])
        return rewards

    def _request(self, server: JsonServer, prompts: list[str], completions: list[str]) -> list[Any]:
        answer = server.post({"prompts": prompts, "completions": completions}, self._wait)
        if answer.succeeded:
            return self._rewards(server, answer.content, len(completions))
        problem = answer.problem + answer.detail
        if _transient(answer.status):
            raise StageFailed(
                f"{server.name} failed {self.attempts} times; the last time it {problem}",
                "Check that the server runs and is fast enough, then run again",
            )
        if 300 <= answer.status < 400:
            target = server.clean(answer.headers.get("location", "it does not say"))
            remedy = f"Set reward.source to the redirect's target: {target}"
        elif answer.status in (401, 403):
            remedy = f"Put a valid token into the environment variable {TOKEN}"
        else:
            remedy = "Check the address in reward.source and the server's documentation"
        raise StageFailed(f"{server.name} {problem}{server.quoted(answer.content)}", remedy)

    def _wait(self, failed: Answer, attempts: int) -> float | None:
        if attempts == self.attempts or not _transient(failed.status):
            return None
        wait = min(max(self.first_wait * 2 ** (attempts - 1), failed.retry_after), _LONGEST_WAIT)
        why = failed.problem + failed.detail
        log.warning("the reward at %s %s; trying again in %.1f s", self.name, why, wait)
        return wait

    def _rewards(self, server: JsonServer, content: bytes, expected: int) -> list[Any]:
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        rewards = answer.get("rewards") if isinstance(answer, dict) else answer
        if not isinstance(rewards, list):
            raise StageFailed(
                f"{server.name} answered without rewards{server.quoted(content)}",
                'Make the server answer {"rewards": [numbers]}, one number for each completion',
            )
        # Check each request: one short and one long answer must not shift the rewards between rows.
        if len(rewards) != expected:
            raise StageFailed(
                f"{server.name} answered {len(rewards)} rewards for {expected} completions",
                "Make the server answer exactly one number for each completion, in order",
            )
        return rewards


def _transient(status: int) -> bool:
    return status in (0, 429) or status >= 500


def _check_address(url: str) -> None:
    parts = address(url)
    if parts is None:
        raise RecipeError(f"the reward {url!r} is not a server address", "Write http://host:port/path")
    if parts.username is not None or parts.password is not None:
        # Do not quote the address: the message is logged.
        raise RecipeError(
            f"the address of the reward at {parts.hostname} contains credentials, which reports and logs "
            "would show",
            f"Remove them, and put a token into the environment variable {TOKEN}",
        )
