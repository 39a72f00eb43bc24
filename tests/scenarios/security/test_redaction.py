"""No text that is shown or kept holds a secret: addresses, values of variables, recipes, errors, the log."""

import io
import logging
import os
import stat
from pathlib import Path

import pytest
import yaml

from dpo_core.errors import DpoError, RecipeError, StageFailed, without_secrets
from dpo_core.redaction import find_secret, redact
from flows.commands.validate import _own_folder
from flows.process.environment import hide_secrets_in_logs
from tasks.recipe.read import load_recipe
from tests.scenarios.bad_inputs import dpo

CANARY = "canary-5b1f"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"see http://me:{CANARY}@host:80/v1 now", "see http://…@host:80/v1 now"),
        (f"postgresql+psycopg://me:p@{CANARY}@db/x", "postgresql+psycopg://…@db/x"),
        (f"https://{CANARY}@github.com/a/b", "https://…@github.com/a/b"),
        (f"http://h/score?n=1&token={CANARY}&m=2", "http://h/score?n=1&token=…&m=2"),
        (f"http://h/?X-Amz-Signature={CANARY}#x", "http://h/?X-Amz-Signature=…#x"),
        (f"http://h/?api_key={CANARY}'", "http://h/?api_key=…'"),
        ("hf_" + "a" * 34, "…"),
        ("write to me@example.org, or see file:///a/b@c", "write to me@example.org, or see file:///a/b@c"),
        ("https://host/path@v2?max_tokens=5", "https://host/path@v2?max_tokens=5"),
        ("a key=value, token=word", "a key=value, token=word"),
    ],
)
def test_what_is_secret_in_a_text_is_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_values_of_secret_variables_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_REWARD_TOKEN", CANARY)
    monkeypatch.setenv("OTHER_PASSWORD", f"{CANARY}-and-more")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/run/secrets/identity")
    text = f"it answered {CANARY}-and-more, then {CANARY}; true of /run/secrets/identity"
    assert redact(text) == "it answered …, then …; true of /run/secrets/identity"
    error = StageFailed(f"the server said {CANARY}", f"ask {CANARY}")
    assert CANARY not in f"{error}{error!r}{error.problem}{error.remedy}{error.args}"


@pytest.mark.parametrize(
    ("override", "place"),
    [
        (f"reward.source=http://me:{CANARY}@h/score", "reward.source"),
        (f"reward.source=http://h/score?token={CANARY}", "reward.source"),
        (f"tracking.uri=http://me:{CANARY}@h", "tracking.uri"),
        (f"tracking.tags.where=https://{CANARY}@h", "tracking.tags.where"),
        (f"data={{path: 'https://me:{CANARY}@h/x.jsonl'}}", "data.path"),
        (f"model.name=https://me:{CANARY}@hub/m", "model.name"),
        (f"description=with {CANARY} inside", "description"),
        (f"judge={{kind: llm, endpoint: {{model: m, base_url: 'http://me:{CANARY}@h/v1'}}}}", "judge"),
    ],
)
def test_a_recipe_with_a_secret_is_refused_by_its_place(
    override: str, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with pytest.raises(RecipeError, match=place) as caught:
        load_recipe("demo", [override])
    monkeypatch.delenv("HF_TOKEN")
    assert CANARY not in str(caught.value) + repr(caught.value)
    assert "environment" in str(caught.value)


def test_the_shipped_recipes_hold_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "sentiment-not")
    assert find_secret({"a": [{"b": "x sentiment-not"}]}) == "a[0].b"
    assert load_recipe("demo").reward.source == "sentiment"


def test_the_deploy_file_sends_no_secret_to_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.commands.deploy import read_deployment_file

    def file_of(value: str) -> Path:
        pool = {"name": "dpo", "job_variables": {"working_dir": "/srv", "env": {"A": value}}}
        deployment = {"name": "a", "entrypoint": "flows.deployed.deployed", "work_pool": pool}
        deployment |= {"parameters": {"recipe": "demo"}, "concurrency_limit": {"limit": 1}}
        path = tmp_path / "prefect.yaml"
        path.write_text(yaml.safe_dump({"name": "dpo", "pull": [], "deployments": [deployment]}))
        return path

    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("PLACE", "here")
    with pytest.raises(RecipeError, match=r"prefect\.blocks\.secret") as caught:
        read_deployment_file(file_of("{{ $HF_TOKEN }}"))
    assert CANARY not in str(caught.value)
    for value, filled in (
        ("{{ $PLACE }}", "here"),
        ("{{ prefect.blocks.secret.hf-token }}", "{{ prefect.blocks.secret.hf-token }}"),
    ):
        assert (
            read_deployment_file(file_of(value)).deployments[0].work_pool.job_variables["env"]["A"] == filled
        )


# --- the log of tracebacks --------------------------------------------------------------------------------


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import tempfile

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_the_log_is_its_owners_alone_and_holds_no_secret(temporary: Path) -> None:
    done = dpo("run", "demo", "--set", f"tracking.uri=http://me:{CANARY}@h", "--set", "seed=-1")
    assert done.code == 2
    log = temporary / f"dpo-{os.getuid()}.log"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert "Traceback" in log.read_text()
    assert CANARY not in log.read_text() + done.err + done.out


def test_a_link_planted_at_the_logs_place_is_not_followed(temporary: Path) -> None:
    victim = temporary / "victim"
    victim.write_text("mine")
    log = temporary / f"dpo-{os.getuid()}.log"
    for plant in (log.symlink_to, log.hardlink_to):
        plant(victim)
        done = dpo("show", "nothing", "--workspace", str(temporary))
        assert done.code == 2
        assert "no finished run named nothing" in done.err
        assert victim.read_text() == "mine"
        log.unlink()
    os.mkfifo(log)  # nobody reads it: opening must not hang
    assert dpo("show", "nothing", "--workspace", str(temporary)).code == 2


def test_a_folder_planted_at_the_gates_place_is_refused(tmp_path: Path) -> None:
    assert stat.S_IMODE(_own_folder(tmp_path / "gate").stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "gate")
    (tmp_path / "file").touch()
    for planted in ("link", "file"):
        with pytest.raises(DpoError, match="belongs to another user or is a link"):
            _own_folder(tmp_path / planted)


def test_handlers_of_logs_show_no_secret_in_words_or_tracebacks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DPO_REWARD_TOKEN", CANARY)
    said = io.StringIO()
    logger, handler = logging.getLogger("some.library"), logging.StreamHandler(said)
    monkeypatch.setattr(logger, "handlers", [handler])
    logger.propagate = False
    hide_secrets_in_logs()
    hide_secrets_in_logs()
    assert len(handler.filters) == 1
    try:
        raise OSError(f"no {CANARY}")
    except OSError:
        logger.exception("asked %s as %d", f"http://me:x@{CANARY}/", 5)
    text = said.getvalue()
    assert "asked http://…@…/ as 5" in text
    assert "Traceback" in text
    assert "OSError: no …" in text
    assert CANARY not in text


def test_an_unforeseen_error_of_a_task_tells_prefect_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_REWARD_TOKEN", CANARY)
    with (
        pytest.raises(StageFailed, match=r"KeyError: 'no …'\. Fix the cause, then resume the run") as caught,
        without_secrets(),
    ):
        raise KeyError(f"no {CANARY}")
    assert caught.value.exit_code == 4
    for error in (KeyError("harmless"), RecipeError(f"no {CANARY}")):
        with pytest.raises(type(error)) as caught, without_secrets():
            raise error
        assert caught.value is error
