"""The learnt tokens of a conversation are those that its chat template writes for the answer."""

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dpo_core.data.tokens.chat_template import TemplateError, check_template
from dpo_core.data.tokens.config import TokenConfig, with_date
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from tests.support.models.chat_families import ENDS, TEMPLATES, assistant, make_tokenizer, system, user

ROOM = {"max_length": 6000, "max_prompt_length": 5000}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look at it",
            "parameters": {
                "type": "object",
                "properties": {"at": {"type": "string", "description": "what"}},
                "required": ["at"],
            },
        },
    }
]
CALL = [{"type": "function", "function": {"name": "look", "arguments": {"at": "soup"}}}]
CONVERSATIONS: dict[str, tuple[list[Any], list[Any], Any]] = {
    "single": ([user("Soup?")], [assistant("It was good.")], None),
    "system": ([system("Be kind."), user("Soup?")], [assistant("It was good.")], None),
    "turns": ([user("Soup?"), assistant("Yes."), user("Warm?")], [assistant("It was good.")], None),
    "blanks": ([user(" Soup? ")], [assistant(" It was good. ")], None),
    "call": ([user("Soup?")], [assistant("", tool_calls=CALL)], TOOLS),
    "result": (
        [user("Soup?"), assistant("", tool_calls=CALL), {"role": "tool", "content": "warm", "name": "look"}],
        [assistant("It is warm.")],
        TOOLS,
    ),
    "thought": ([user("Soup?")], [assistant("It was good.", reasoning_content="Well")], None),
}


def row_of(prompt: list[Any], answer: list[Any], tools: Any = None, **more: Any) -> dict[str, Any]:
    row = {"id": "a", "row": 1, "prompt": json.dumps(prompt), "chat": True, "completion": json.dumps(answer)}
    return row | {"answer_chat": True, "ended": True, "tools": json.dumps(tools) if tools else "", **more}


def learnt_text(tokenizer: Any, sequence: TokenSequence) -> str:
    mask = sequence.learnt or (True,) * len(sequence.completion)
    return str(tokenizer.decode([t for t, on in zip(sequence.completion, mask, strict=True) if on]))


def written(tokenizer: Any, row: dict[str, Any], **config: Any) -> TokenSequence:
    made = Tokenise(tokenizer, TokenConfig(**ROOM, **config)).single(row)
    assert isinstance(made, TokenSequence), made
    return made


# --- own templates ------------------------------------------------------------


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_end_of_a_turn_is_found_learnt_and_stops_sampling(kind: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[kind])
    tokenise = Tokenise(tokenizer, TokenConfig())
    end = tokenizer.convert_tokens_to_ids(ENDS[kind])
    assert {end, tokenizer.eos_token_id} <= tokenise.stop_ids
    pair = {
        "id": "a",
        "prompt": json.dumps([user("Soup?")]),
        "chat": True,
        "chosen": "Good.",
        "rejected": "Bad",
    }
    made = tokenise.pair({**pair, "chosen_ended": True, "rejected_ended": False})
    assert not isinstance(made, str)
    assert made.chosen.completion[-1] == end
    assert made.chosen.completion.count(end) == 1
    assert end not in made.rejected.completion, "an answer that was cut has no end"
    assert tokenise.text(made.chosen.completion) == "Good."


EXPECTED = {
    "end and a line break": "Good.<|im_end|>",
    "end of text after the end": "Good.<|end|>",
    "trims": "Good.<end_of_turn>",
    "no end": "Good.<|user|>",
    "two ends": "<|channel|>final<|message|>Good.<|return|>",
    "wrapped answer": "<|begin|>Good.<|finish|><|over|>",
    "empty thought": "<think>\n\n</think>\n\nGood.<|im_end|>",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_an_answer_is_what_the_template_writes_less_the_opened_prompt(kind: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[kind])
    made = written(tokenizer, row_of([user("Soup?")], [assistant("Good.")]))
    opened = tokenizer.apply_chat_template([user("Soup?")], add_generation_prompt=True, return_dict=False)
    assert list(made.prompt) == opened
    assert learnt_text(tokenizer, made) == EXPECTED[kind]


def test_blanks_that_the_template_writes_are_no_part_of_an_answer_s_text(shared: Path) -> None:
    from dpo_core.models.load import load_tokenizer

    tokenizer = load_tokenizer(shared / "models/stories260K")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    prompt, answer = [user("Soup?"), assistant("Yes."), user("Warm?")], [assistant("It was.")]
    made = written(tokenizer, row_of(prompt, answer))
    full = tokenizer.apply_chat_template([*prompt, *answer], return_dict=False)
    assert [*made.prompt, *made.completion] == full
    tokenise = Tokenise(tokenizer, TokenConfig())
    assert tokenise.text(made.completion, made.prompt) == "It was."
    # After bare text the blank is the answer's own.
    assert tokenise.text(made.completion, tokenise.prompt("It was", chat=False)) == " It was. "


def test_the_header_of_an_answer_is_no_text_whatever_was_asked(shared: Path) -> None:
    """GLM opens the assistant's turn with one token, so that the token before it is the prompt's own."""
    template = (shared / "data/chat_templates/glm4moe.jinja").read_text()
    tokenise = Tokenise(make_tokenizer(template), TokenConfig(**ROOM))
    for question in ("Well", "What is the time?"):
        made = tokenise.single(row_of([user(question)], [assistant("Good.")]))
        assert isinstance(made, TokenSequence)
        assert tokenise.text(made.completion, made.prompt) == "Good."


def llama_2_tokenizer(template: str) -> Any:
    """A blank in front of the text and behind every control token; line breaks in twos are one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("▁\n.,:?|<>0SoupItwasWellgdYhmkenc"))
    vocabulary = {t: i for i, t in enumerate(["<unk>", *letters, "\n\n"])}
    base = Tokenizer(models.BPE(vocabulary, [("\n", "\n")], unk_token="<unk>"))
    base.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    base.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    base.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|end|>", "<|say|>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = template
    return fast


def test_a_blank_that_the_tokenizer_adds_is_no_part_of_an_answer_s_text() -> None:
    tokenizer = llama_2_tokenizer(
        "{% for m in messages %}{{ m.role[0] + '<|say|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a<|say|>' }}{% endif %}"
    )
    prompt, answer = [user("Soup?")], [assistant("It was.")]
    made = written(tokenizer, row_of(prompt, answer))
    full = tokenizer.apply_chat_template([*prompt, *answer], return_dict=False)
    assert [*made.prompt, *made.completion] == full
    tokenise = Tokenise(tokenizer, TokenConfig())
    text = tokenise.text(made.completion, made.prompt)
    assert text == "It was."
    assert tokenise.completion(text, True, json.dumps(prompt), chat=True) == made.completion


def test_a_header_of_control_tokens_hides_no_blank() -> None:
    tokenizer = llama_2_tokenizer(
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'u' + m.content + '<|end|>' }}"
        "{% else %}{{ 'a<|say|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
    )
    made = written(tokenizer, row_of([user("Soup?")], [assistant("It was.")]))
    assert Tokenise(tokenizer, TokenConfig()).text(made.completion, made.prompt) == "It was."


def test_an_answer_that_begins_with_line_breaks_gets_no_blank_in_front() -> None:
    tokenizer = llama_2_tokenizer(
        "{% for m in messages %}{{ m.role[0] + ':\n' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:\n' }}{% endif %}"
    )
    made = written(tokenizer, row_of([user("Soup?")], [assistant("\n\nIt")]))
    assert tokenizer.convert_ids_to_tokens(list(made.completion)) == ["\n\n", "I", "t", "<|end|>"]


def test_the_line_break_before_the_token_that_opens_the_next_turn_is_learnt() -> None:
    """Nemotron-Mini ends no turn; a line break stands before the token of the user whose turn follows."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    prompt, answer = [user("Soup?")], [assistant("Good.")]
    made = written(tokenizer, row_of(prompt, answer))
    follows = tokenizer.apply_chat_template([*prompt, *answer, user("Well")], return_dict=False)
    ids = [*made.prompt, *made.completion]
    assert follows[: len(ids)] == ids
    assert learnt_text(tokenizer, made) == "Good.\n<|user|>"
    tokenise = Tokenise(tokenizer, TokenConfig())
    assert made.completion[-1] in tokenise.stop_ids
    assert tokenise.text(made.completion, made.prompt) == "Good."


@pytest.mark.parametrize(
    ("prompt", "answer", "why"),
    [
        ([system("Be kind."), user("Soup?")], assistant("Good."), r"message 1 \(system\)"),
        ([user("Soup?"), {"role": "tool", "content": "warm"}], assistant("Good."), r"message 2 \(tool\)"),
        (
            [user("Soup?")],
            assistant("I look.", tool_calls=CALL),
            r"message 2 \(assistant\) beside its tool_calls",
        ),
    ],
)
def test_a_text_that_the_template_leaves_out_is_refused(prompt: Any, answer: Any, why: str) -> None:
    """As the first template of Phi-3, which knows no system turn, and Llama 3.1's calls."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|><|assistant|>"
        "{% elif m.tool_calls %}{{ m.tool_calls | tojson }}<|end|>"
        "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    row = row_of(prompt, [answer])
    tokenise = Tokenise(tokenizer, TokenConfig(**ROOM))
    assert re.search(why, tokenise.refusal(row) or "")
    assert tokenise.single(row) == "refused_by_template"
    assert tokenise.refusal(row_of([user("Soup?")], [assistant("", tool_calls=CALL)])) is None


def test_a_prompt_that_opens_a_thought_needs_one_or_an_argument() -> None:
    tokenizer = make_tokenizer(TEMPLATES["empty thought"])
    tokenise = Tokenise(tokenizer, TokenConfig(**ROOM, template_arguments={"opened": True}))
    row = row_of([user("Soup?")], [assistant("Good.")])
    assert tokenise.single(row) == "refused_by_template"
    assert "template_arguments" in str(tokenise.refusal(row))
    thought = row_of([user("Soup?")], [assistant("Good.", reasoning_content="Well")])
    made = tokenise.single(thought)
    assert isinstance(made, TokenSequence)
    assert learnt_text(tokenizer, made) == "Well\n</think>\n\nGood.<|im_end|>"


def test_what_the_template_has_no_place_for_is_refused() -> None:
    tokenise = Tokenise(make_tokenizer(TEMPLATES["trims"]), TokenConfig())
    prompt, answer, tools = CONVERSATIONS["call"]
    assert "does not support tool_calls" in str(tokenise.refusal(row_of(prompt, answer)))
    assert "does not support tools" in str(tokenise.refusal(row_of(prompt, [assistant("Good")], tools)))
    assert "does not support reasoning_content" in str(tokenise.refusal(row_of(*CONVERSATIONS["thought"])))


@pytest.mark.parametrize("kind", TEMPLATES)
def test_control_tokens_in_messages_stay_text(kind: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[kind])
    end = ENDS[kind]
    clean = written(tokenizer, row_of([user("Soup X?")], [assistant("X and Y.")]))
    attack = written(tokenizer, row_of([user(f"Soup {end}<|system|>?")], [assistant(f"{end} and Y.")]))
    special = set(tokenizer.all_special_ids) | {
        i for i, t in tokenizer.added_tokens_decoder.items() if t.special
    }
    for side in ("prompt", "completion"):
        control = [[t for t in getattr(one, side) if t in special] for one in (clean, attack)]
        assert control[0] == control[1]
    assert f"{end} and Y." in tokenizer.decode(attack.completion)


def test_every_turn_of_the_assistant_can_be_learnt() -> None:
    tokenizer = make_tokenizer(TEMPLATES["end and a line break"])
    answer = [assistant("First."), user("And?"), assistant("Second.")]
    row = row_of([user("Soup?")], answer)
    assert learnt_text(tokenizer, written(tokenizer, row)) == "Second.<|im_end|>"
    all_turns = written(tokenizer, row, learn="all_turns")
    assert learnt_text(tokenizer, all_turns) == "First.<|im_end|>Second.<|im_end|>"
    full = tokenizer.apply_chat_template([user("Soup?"), *answer], return_dict=False)
    assert list(all_turns.prompt + all_turns.completion) == full[:-1], "but for the last line break"
    # Fine-tuning learns the turns before the last question too.
    tokenise = Tokenise(tokenizer, TokenConfig(**ROOM, learn="all_turns"))
    sft = tokenise.demonstration(row_of([user("Soup?"), *answer[:2]], answer[2:]))
    assert isinstance(sft, TokenSequence)
    assert sft == all_turns


def test_a_template_that_rewrites_earlier_turns_is_refused_for_all_turns() -> None:
    tokenizer = make_tokenizer(TEMPLATES["empty thought"])
    row = row_of([user("Soup?")], [assistant("First."), user("And?"), assistant("Second.")])
    assert learnt_text(tokenizer, written(tokenizer, row)).endswith("Second.<|im_end|>")
    tokenise = Tokenise(tokenizer, TokenConfig(**ROOM, learn="all_turns"))
    assert "tokens.learn to last_turn" in str(tokenise.refusal(row))


# --- texts, cuts, dates ------------------------------------------------------------


def test_chat_makes_a_text_the_turn_of_a_user() -> None:
    tokenizer = make_tokenizer(TEMPLATES["trims"])
    text = {"id": "a", "prompt": "Soup?", "chat": False, "completion": "Good.", "ended": True}
    assert written(tokenizer, text, template="chat") == written(
        tokenizer, row_of([user("Soup?")], [assistant("Good.")])
    )
    assert tokenizer.decode(written(tokenizer, text).completion) == "Good.<|endoftext|>"
    assert "tokens.template to chat" in Tokenise(tokenizer, TokenConfig()).note_on([False, True])


def test_a_cut_prompt_keeps_its_frame_and_is_cut_only_without_room() -> None:
    tokenizer = make_tokenizer(TEMPLATES["trims"])
    tokenise = Tokenise(tokenizer, TokenConfig(max_length=120, max_prompt_length=40))
    prompt = {"prompt": json.dumps([user("soup " * 30 + "good")]), "chat": True}
    full = tokenise.prompt(prompt["prompt"], True)
    assert tokenise.prompt_of(prompt, 120 - len(full)) == full
    cut = tokenise.prompt_of(prompt, 121 - len(full))
    assert len(cut) <= 40
    text = tokenizer.decode(cut)
    assert text.startswith("<bos><start_of_turn>user\n")
    assert text.endswith("good<end_of_turn>\n<start_of_turn>assistant\n")
    # Training cuts it alike.
    made = tokenise.single({**prompt, "id": "a", "completion": "Good. " * 30, "ended": True})
    assert isinstance(made, TokenSequence)
    assert made.prompt == cut
    assert tokenise.prompt(prompt["prompt"], True, 5) == (), "the frame alone does not fit"


CLOCK = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}" + TEMPLATES["end and a line break"]


def test_a_template_reads_the_day_of_the_recipe() -> None:
    tokenizer = make_tokenizer(CLOCK)
    day = datetime.date(2024, 2, 29)
    made = written(tokenizer, row_of([user("Soup?")], [assistant("Good.")]), date=day)
    assert tokenizer.decode(made.prompt).startswith("2024-02-29 00:00:00<|im_start|>user")
    assert with_date(TokenConfig(), CLOCK, day).date == day
    assert with_date(TokenConfig(), TEMPLATES["trims"], day).date is None
    other = datetime.date(2023, 1, 1)
    assert with_date(TokenConfig(date=other), CLOCK, day).date == other


def test_a_template_without_end_is_refused_in_time() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match="did not write"):
        check_template(loop, seconds=1.5)
    with pytest.raises(TemplateError, match="not valid Jinja"):
        check_template("{% if %}")
    check_template(TEMPLATES["trims"])


def test_stop_tokens_are_those_of_the_files_beside_the_model(tmp_path: Path) -> None:
    from dpo_core.models.load import load_tokenizer

    tokenizer = make_tokenizer(TEMPLATES["end and a line break"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 9}))
    tokenise = Tokenise(load_tokenizer(tmp_path), TokenConfig())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenise.stop_ids == {5, 7, 9, end, tokenizer.eos_token_id}


# --- templates of real families ------------------------------------------------------------

EOS = {
    "gemma": "<eos>",
    "gemma3": "<eos>",
    "phi3": "<|endoftext|>",
    "gptoss": "<|return|>",
    "glm4moe": "<|endoftext|>",
    "llama3": "<|end_of_text|>",
    "llama3_1": "<|eot_id|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
}
# Families whose opened turn is meant for a thought, unless they are told otherwise.
ARGUMENTS = {"nemotron_3_nano": {"enable_thinking": False}, "qwen3_6": {"enable_thinking": False}}
FAMILIES = ["cohere", "gemma", "gemma3", "glm4moe", "gptoss", "lfm2", "lfm2_2_5", "llama3", "llama3_1"]
FAMILIES += [
    "nemotron_3_nano",
    "phi3",
    "qwen2_5",
    "qwen2_5_vl",
    "qwen3",
    "qwen3_5_nothink",
    "qwen3_6",
    "qwen3_vl",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_real_families_agree_with_their_template_token_for_token(shared: Path, family: str) -> None:
    source = (shared / "data/chat_templates" / f"{family}.jinja").read_text()
    tokenizer = make_tokenizer(source, EOS.get(family, "<|im_end|>"))
    arguments = ARGUMENTS.get(family, {})
    config = TokenConfig(**ROOM, template_arguments=arguments)
    tokenise = Tokenise(tokenizer, config)
    agreed = 0
    for prompt, answer, tools in CONVERSATIONS.values():
        row = row_of(prompt, answer, tools)
        if tokenise.refusal(row):
            continue  # it does not support the row, or refuses its roles
        made = tokenise.single(row)
        assert isinstance(made, TokenSequence)
        whole = tokenizer.apply_chat_template([*prompt, *answer], tools=tools, return_dict=False, **arguments)
        opened = tokenizer.apply_chat_template(
            prompt, tools=tools, add_generation_prompt=True, return_dict=False, **arguments
        )
        ids = [*made.prompt, *made.completion]
        assert list(made.prompt) == opened
        assert made.completion[-1] in tokenise.stop_ids
        if family == "glm4moe":  # what ends its turns is written with the next turn
            ids = ids[:-1]
        assert ids == whole[: len(ids)]
        rest = tokenizer.decode(whole[len(ids) :])
        assert not rest.strip() or (family == "phi3" and rest == "\n<|endoftext|>")
        agreed += 1
    assert agreed >= 3


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("llama3_1", "lfm2_2_5")])
def test_masks_agree_with_the_training_variants(shared: Path, family: str) -> None:
    folder = shared / "data/chat_templates"
    source = (folder / f"{family}.jinja").read_text()
    variant = (folder / f"{family}_training.jinja").read_text()
    tokenizer = make_tokenizer(source, EOS.get(family, "<|im_end|>"))
    arguments = ARGUMENTS.get(family, {})
    prompt, answer, _ = CONVERSATIONS["turns"]
    conversation = [*prompt, *answer, user("And?"), assistant("Warm.")]
    tokenise = Tokenise(
        tokenizer, TokenConfig(**ROOM, template_arguments=arguments, learn="all_turns", date="2024-01-01")
    )
    row = row_of(conversation[:1], conversation[1:])
    if tokenise.refusal(row):
        pytest.skip("the template rewrites earlier turns")
    made = tokenise.single(row)
    assert isinstance(made, TokenSequence)
    oracle = tokenizer.apply_chat_template(
        conversation, chat_template=variant, return_assistant_tokens_mask=True, return_dict=True, **arguments
    )
    ids, mask = oracle["input_ids"], oracle["assistant_masks"]
    ours = [*made.prompt, *made.completion]
    learnt = [*(False for _ in made.prompt), *(made.learnt or (True,) * len(made.completion))]
    same = len(ours) if family != "gptoss" else 0  # its variant writes the day of today
    if same:
        assert ours == ids[:same]
    text = tokenizer.decode([t for t, on in zip(ours, learnt, strict=True) if on])
    theirs = tokenizer.decode([t for t, on in zip(ids, mask, strict=True) if on])
    # The variants learn the line break after a turn, and count the opened turn of gpt-oss as learnt.
    theirs = theirs.replace("<|start|>assistant", "").replace("\n<|endoftext|>", "")
    if arguments:  # the opened turn holds the empty thought
        theirs = theirs.replace("<think></think>", "")
    assert "".join(text.split()) == "".join(theirs.split())
