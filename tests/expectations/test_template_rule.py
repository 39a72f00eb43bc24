"""The rules that read the model's chat template: rows it cannot write, and control tokens in texts."""

import json
from typing import Any

import pytest

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.tokenise import Tokenise
from expectations.features import Tokenisation
from tests.support.frames import clean_pairs, failed, row_number
from tests.support.models.chat_families import TEMPLATES, assistant, make_tokenizer, user


def tokenisation(kind: str) -> Tokenisation:
    return Tokenisation.of(Tokenise(make_tokenizer(TEMPLATES[kind]), TokenConfig()))


def test_rows_that_the_template_cannot_write_are_named_with_the_reason(gate: Any) -> None:
    frame = clean_pairs(chat=True).assign(tools="", answer_chat=False)
    turns = [
        user("Soup?"),
        assistant("", tool_calls=[{"function": {"name": "f", "arguments": {}}}]),
        user("And?"),
    ]
    frame.loc[4, "prompt"] = json.dumps(turns, separators=(",", ":"))
    report, _ = gate(frame, tokenisation=tokenisation("trims"))
    finding = failed(report)["template"]
    assert (finding.severity, finding.count, finding.rows) == ("critical", 1, [row_number(4)])
    assert f"row {row_number(4)}: the chat template does not support tool_calls" in finding.message


@pytest.mark.parametrize("kind", ["end and a line break", "no end", "wrapped answer"])
def test_control_tokens_of_the_tokenizer_are_critical_wherever_they_stand(gate: Any, kind: str) -> None:
    known = tokenisation(kind)
    token = next(t for t in known.special_tokens if "<|" in t and t in TEMPLATES[kind])
    frame = clean_pairs(chat=True).assign(tools="", answer_chat=False)
    frame.loc[3, "prompt"] = frame.loc[3, "prompt"].replace("know", f"know {token}")
    frame.loc[6, "chosen"] = frame.loc[6, "chosen"].replace("know", f"know {token}")
    report, _ = gate(frame, tokenisation=known)
    assert failed(report)["special_tokens"].rows == [row_number(3), row_number(6)]


def test_tokens_that_a_template_writes_but_that_are_not_special_are_a_warning(gate: Any) -> None:
    frame = clean_pairs(chat=True).assign(tools="", answer_chat=False)
    frame.loc[3, "chosen"] = "<think>Well</think> I know."
    report, _ = gate(frame, tokenisation=tokenisation("empty thought"))
    assert failed(report)["template_tokens"].rows == [row_number(3)]
    assert not report.refused
