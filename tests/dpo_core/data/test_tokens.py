"""Tokenisation: prompt and completion, end tokens, truncation, templates."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.sequences import TokenPair, TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import ModelError
from dpo_core.models.load import load_tokenizer

TURNS = [
    {"role": "user", "content": "Who wrote this long and quiet story?"},
    {"role": "assistant", "content": "A man who lived in a house by the sea."},
    {"role": "user", "content": "Was it good?"},
]


@pytest.fixture(scope="session")
def story_tokenizer(stories: Path) -> Any:
    return load_tokenizer(stories)


def row(**changes: Any) -> dict[str, Any]:
    plain = {
        "id": "a",
        "prompt": "The soup was",
        "chat": False,
        "chosen": " warm and good.",
        "rejected": " cold.",
        "chosen_ended": True,
        "rejected_ended": True,
    }
    return plain | changes


def usable(tokenise: Tokenise, **changes: Any) -> TokenPair:
    pair = tokenise.pair(row(**changes))
    assert isinstance(pair, TokenPair), pair
    return pair


def test_ids_are_those_of_the_two_texts_joined(tokenizer: Any) -> None:
    # "The" + "re" would be one piece "There" if the texts were joined first.
    pair = usable(Tokenise(tokenizer, TokenConfig()), prompt="The", chosen="re was soup", rejected="n")
    encode = tokenizer.encode
    assert pair.chosen.prompt == pair.rejected.prompt == tuple(encode("The"))
    assert pair.chosen.completion == (*encode("re was soup"), tokenizer.eos_token_id)
    assert tokenizer.decode(pair.chosen.prompt + pair.chosen.completion) == "There was soup</s>"


@pytest.mark.parametrize("ended", [True, False])
def test_an_ended_answer_has_one_eos_at_its_end_and_a_cut_one_has_none(tokenizer: Any, ended: bool) -> None:
    pair = usable(Tokenise(tokenizer, TokenConfig()), chosen_ended=ended)
    assert pair.chosen.completion.count(tokenizer.eos_token_id) == int(ended)
    assert (pair.chosen.completion[-1] == tokenizer.eos_token_id) is ended
    assert pair.chosen.truncated is False


def test_truncation_writes_no_eos_over_the_answer(tokenizer: Any) -> None:
    tokenise = Tokenise(tokenizer, TokenConfig(max_length=20, max_prompt_length=8))
    words = " The film was a long and quiet story about a house by the sea." * 3
    pair = usable(tokenise, chosen=words)
    full = tokenise.completion(words, ended=True)
    assert full[-1] == tokenizer.eos_token_id
    assert pair.chosen.truncated
    assert len(pair.chosen) == 20
    assert pair.chosen.completion == full[: len(pair.chosen.completion)]
    assert tokenizer.eos_token_id not in pair.chosen.completion
    # The short side is whole and still ends.
    assert pair.rejected.completion[-1] == tokenizer.eos_token_id


def test_an_answer_that_fits_but_for_its_eos_loses_only_the_eos(tokenizer: Any) -> None:
    tokenise = Tokenise(tokenizer, TokenConfig())
    prompt, answer = (5, 6), tokenise.completion(" warm and good.", ended=True)
    short = Tokenise(tokenizer, TokenConfig(max_length=1 + len(answer), max_prompt_length=2))
    assert short.sequence(prompt, answer) == TokenSequence(prompt, answer[:-1], truncated=True)


@pytest.mark.parametrize("text", ["</s>", "good</s>", "a </s> b</s>", "</s></s>"])
def test_a_special_token_written_in_an_answer_is_text(tokenizer: Any, text: str) -> None:
    tokenise = Tokenise(tokenizer, TokenConfig())
    assert tokenizer.eos_token_id in tokenizer.encode(text), "the text would become control"
    completion = tokenise.completion(text, ended=False)
    assert tokenizer.eos_token_id not in completion
    assert tokenizer.decode(completion) == text
    assert tokenizer.eos_token_id not in tokenise.prompt(text, chat=False)


def test_the_story_tokenizer_reads_control_text_as_text_too(story_tokenizer: Any) -> None:
    tokenise = Tokenise(story_tokenizer, TokenConfig())
    for text in ("</s>", "once <s> upon", "a</s> b"):
        assert not set(tokenise.completion(text, ended=False)) & set(story_tokenizer.all_special_ids)
    assert tokenise.completion("The end.</s>", ended=True).count(story_tokenizer.eos_token_id) == 1


def test_the_begin_token_stands_once_where_the_tokenizer_would_put_it(
    tokenizer: Any, story_tokenizer: Any
) -> None:
    begin = story_tokenizer.bos_token_id
    pair = usable(Tokenise(story_tokenizer, TokenConfig()))
    assert pair.chosen.prompt[0] == begin
    assert (pair.chosen.prompt + pair.chosen.completion).count(begin) == 1
    assert list(pair.chosen.prompt) == story_tokenizer.encode("The soup was")
    # The tiny tokenizer adds none, and none is invented.
    assert list(usable(Tokenise(tokenizer, TokenConfig())).chosen.prompt) == tokenizer.encode("The soup was")


def test_a_pair_equal_after_truncation_is_left_out(tokenizer: Any) -> None:
    tokenise = Tokenise(tokenizer, TokenConfig(max_length=12, max_prompt_length=4))
    same = " The film was a long and quiet story about a house"
    left_out = row(chosen=same + " by the sea.", rejected=same + " and soup.")
    assert tokenise.pair(left_out) == "identical_after_truncation"
    # The same texts are a pair where there is room for their difference.
    assert isinstance(Tokenise(tokenizer, TokenConfig()).pair(left_out), TokenPair)


def test_reasons_are_counted(tokenizer: Any) -> None:
    tokenise = Tokenise(tokenizer, TokenConfig())
    rows = [
        row(id="kept"),
        row(id="no answer", chosen="", chosen_ended=False),
        row(id="no words, but an end", chosen=""),
        row(id="no prompt", prompt=""),
        row(id="twins", rejected=" warm and good."),
    ]
    kept, dropped = tokenise.pairs(rows)
    assert [p.id for p in kept] == ["kept", "no words, but an end"]
    assert kept[1].chosen.completion == (tokenizer.eos_token_id,)
    assert dropped == {"empty_completion": 1, "empty_prompt": 1, "identical_after_truncation": 1}


def test_a_sequence_without_a_prompt_is_refused(tokenizer: Any) -> None:
    # Nothing would predict its first token, which would silently carry no loss.
    assert Tokenise(tokenizer, TokenConfig()).sequence((), (5, 6)) is None


TEXT = st.text(st.sampled_from("ab soup,.\n<>/é😀"), max_size=60) | st.sampled_from(
    ["", "</s>", "a</s>", "<s>"]
)
CHAT = st.lists(TEXT, min_size=1, max_size=6).map(
    lambda contents: json.dumps(
        [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    )
)
LENGTHS = st.integers(4, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))


def _check_pair(
    tokenise: Tokenise, given_row: dict[str, Any], pair: TokenPair | str, begin: int | None
) -> None:
    """What must hold for any row, kept or left out."""
    limit = tokenise.config.max_length
    context = {"prompt": given_row["prompt"], "chat": given_row["chat"]}
    whole = {
        s: tokenise.completion(given_row[s], given_row[f"{s}_ended"], **context)
        for s in ("chosen", "rejected")
    }
    if isinstance(pair, str):
        assert pair in {"empty_prompt", "empty_completion", "identical_after_truncation"}
        assert (pair == "empty_completion") == (not all(whole.values())) or pair == "empty_prompt"
        return
    assert pair.chosen.prompt == pair.rejected.prompt
    assert pair.chosen.completion != pair.rejected.completion
    prompt = pair.chosen.prompt
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        kept = side.completion
        assert len(kept) >= 1
        assert len(side) <= limit
        assert kept == whole[name][: len(kept)]
        assert side.truncated is (len(kept) < len(whole[name]))
        # Nothing is cut that would have fitted.
        assert not side.truncated or len(side) == limit
        ends = given_row[f"{name}_ended"] and not side.truncated
        assert kept.count(tokenise.eos) == int(ends)
    full = tokenise.prompt(given_row["prompt"], given_row["chat"])
    first = 0 if begin is None else 1
    assert prompt[:first] == full[:first]
    if begin is not None:
        assert prompt[0] == begin
        assert prompt.count(begin) == 1
    if not given_row["chat"]:
        # Cut from the left: what is left is the end of the prompt.
        assert prompt[first:] == full[len(full) - len(prompt) + first :]
    if prompt != full:
        assert len(prompt) <= tokenise.config.max_prompt_length


ROWS = st.fixed_dictionaries(
    {
        "chosen": TEXT,
        "rejected": TEXT,
        "chosen_ended": st.booleans(),
        "rejected_ended": st.booleans(),
    }
)
QUIET = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUIET
@given(sides=ROWS, lengths=LENGTHS, prompt=st.tuples(TEXT, st.just(False)) | st.tuples(CHAT, st.just(True)))
def test_every_kept_pair_is_sound(
    tokenizer: Any, sides: dict[str, Any], lengths: tuple[int, int], prompt: tuple[str, bool]
) -> None:
    config = TokenConfig(max_length=lengths[0], max_prompt_length=lengths[1])
    tokenise = Tokenise(tokenizer, config)
    given_row = {"id": "x", "prompt": prompt[0], "chat": prompt[1], **sides}
    _check_pair(tokenise, given_row, tokenise.pair(given_row), begin=None)


@QUIET
@given(sides=ROWS, lengths=LENGTHS, prompt=st.tuples(TEXT, st.just(False)) | st.tuples(CHAT, st.just(True)))
def test_every_kept_pair_is_sound_with_a_begin_token(
    story_tokenizer: Any, sides: dict[str, Any], lengths: tuple[int, int], prompt: tuple[str, bool]
) -> None:
    config = TokenConfig(template="transcript", max_length=lengths[0], max_prompt_length=lengths[1])
    tokenise = Tokenise(story_tokenizer, config)
    given_row = {"id": "x", "prompt": prompt[0], "chat": prompt[1], **sides}
    _check_pair(tokenise, given_row, tokenise.pair(given_row), begin=story_tokenizer.bos_token_id)


def test_a_chat_prompt_is_the_template_with_the_assistant_opened(tokenizer: Any) -> None:
    ids = Tokenise(tokenizer, TokenConfig()).prompt(json.dumps(TURNS), chat=True)
    assert tokenizer.decode(ids) == (
        "<|user|>Who wrote this long and quiet story?</s>"
        "<|assistant|>A man who lived in a house by the sea.</s>"
        "<|user|>Was it good?</s><|assistant|>"
    )
    assert ids.count(tokenizer.eos_token_id) == 3, "the template's own end tokens are control"


def test_a_long_conversation_loses_whole_turns_from_its_start(tokenizer: Any) -> None:
    tokenise = Tokenise(tokenizer, TokenConfig())
    full = tokenise.prompt(json.dumps(TURNS), chat=True)
    last = tokenise.prompt(json.dumps(TURNS[2:]), chat=True)
    # One token too many: the first question goes, and its answer with it; a user opens what is left.
    assert tokenise.prompt(json.dumps(TURNS), True, len(full)) == full
    assert tokenise.prompt(json.dumps(TURNS), True, len(full) - 1) == last
    # The last turn alone is too long: only now is text cut, from its left, inside the turn.
    cut = tokenise.prompt(json.dumps(TURNS), True, len(last) - 2)
    assert len(cut) <= len(last) - 2
    assert tokenizer.decode(cut) == "<|user|>s it good?</s><|assistant|>"


def test_the_system_turn_outlives_the_others(tokenizer: Any) -> None:
    tokenise = Tokenise(tokenizer, TokenConfig())
    system = {"role": "system", "content": "Be kind."}
    kept = tokenise.prompt(json.dumps([system, TURNS[2]]), chat=True)
    assert tokenise.prompt(json.dumps([system, *TURNS]), True, len(kept)) == kept


def test_without_a_chat_template_conversations_need_another_form(story_tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        Tokenise(story_tokenizer, TokenConfig()).prompt(json.dumps(TURNS), chat=True)


def test_transcripts_name_the_speakers(story_tokenizer: Any) -> None:
    tokenise = Tokenise(story_tokenizer, TokenConfig(template="transcript"))
    ids = tokenise.prompt(json.dumps(TURNS[1:]), chat=True)
    said = "\n\nAssistant: A man who lived in a house by the sea.\n\nHuman: Was it good?\n\nAssistant:"
    assert ids == (story_tokenizer.bos_token_id, *story_tokenizer.encode(said, add_special_tokens=False))
    assert ids[:6] == tokenise.prompt(json.dumps(TURNS[1:]), True, len(ids))[:6]


@pytest.mark.parametrize("template", ["transcript", "plain"])
def test_a_cut_conversation_keeps_its_begin_token(story_tokenizer: Any, template: Any) -> None:
    tokenise = Tokenise(story_tokenizer, TokenConfig(template=template))
    one = json.dumps(TURNS[:1])
    whole = tokenise.prompt(one, chat=True)
    cut = tokenise.prompt(one, True, 22)
    assert len(cut) <= 22 < len(whole)
    assert cut[0] == whole[0] == story_tokenizer.bos_token_id
    assert cut[-5:] == whole[-5:]
    assert (template == "transcript") == story_tokenizer.decode(cut[1:]).strip().startswith("Human:")


def test_plain_conversations_are_their_texts(tokenizer: Any) -> None:
    tokenise = Tokenise(tokenizer, TokenConfig(template="plain"))
    ids = tokenise.prompt(json.dumps(TURNS), chat=True)
    assert tokenizer.decode(ids) == "\n\n".join(t["content"] for t in TURNS)


def test_a_prompt_budget_leaves_room_for_an_answer() -> None:
    with pytest.raises(ValidationError, match="no answer fits"):
        TokenConfig(max_length=16, max_prompt_length=16)


@pytest.mark.parametrize(
    ("prompt", "answer"), [("The", "re was soup"), ("Assistant:", " It was"), ("Hi\n", "no"), ("So ", "it")]
)
def test_no_blank_is_put_between_prompt_and_answer(story_tokenizer: Any, prompt: str, answer: str) -> None:
    tokenise = Tokenise(story_tokenizer, TokenConfig())
    made = usable(tokenise, prompt=prompt, chosen=answer).chosen
    full = story_tokenizer.decode(made.prompt + made.completion, skip_special_tokens=True)
    assert full.removeprefix(" ") == prompt + answer
    # What is sampled comes back to its ids by way of its text.
    assert tokenise.text(made.completion) == answer


def test_a_transcript_writes_the_answer_as_it_writes_earlier_ones(tokenizer: Any) -> None:
    tokenise = Tokenise(tokenizer, TokenConfig(template="transcript"))
    pair = usable(tokenise, prompt=json.dumps(TURNS), chat=True, chosen="It was.", rejected=" No.")
    text = tokenizer.decode(pair.chosen.prompt + pair.chosen.completion)
    assert text.endswith("\n\nHuman: Was it good?\n\nAssistant: It was.</s>")
    assert tokenizer.decode(pair.rejected.completion) == " No.</s>"
