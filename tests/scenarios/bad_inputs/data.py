"""Bad data, as a run meets them. What readers find in files and rows: tests/dpo_core/data."""

from tests.scenarios.bad_inputs import World, bad, good_rows, lines


def _with(place: int, **change: object) -> list[dict]:
    rows = good_rows()
    rows[place] |= change
    return rows


# --- files ------------------------------------------------------------------------------------------------


@bad(2, "there is no file or folder", "absent.jsonl", "Check the path")
def data_missing(world: World) -> list[str]:
    return world.run(data={"path": str(world.new_folder() / "absent.jsonl")})


@bad(2, "empty.jsonl is empty (0 bytes)", "Check how it was written")
def data_empty(world: World) -> list[str]:
    return world.run_with("empty.jsonl", "")


@bad(2, "has no data file directly in it; it is empty", "Point data.path at")
def data_in_an_empty_folder(world: World) -> list[str]:
    return world.run(data={"path": str(world.new_folder())})


@bad(2, "line 3 of", "broken.jsonl is not valid JSON", "Correct or delete that line")
def data_with_a_broken_line(world: World) -> list[str]:
    text = lines(good_rows()).splitlines(keepends=True)
    text[2] = '{"prompt": "half\n'
    return world.validate("broken.jsonl", "".join(text))


@bad(2, "the hub data set nobody/nothing (split train) could not be loaded", "HF_HUB_OFFLINE")
def data_on_the_hub_offline(world: World) -> list[str]:
    return world.run(data={"path": "nobody/nothing"})


@bad(2, "cannot be read", "File name too long", "Check the path")
def data_path_too_long(world: World) -> list[str]:
    return world.run(data={"path": f"/tmp/{'x' * 5000}.jsonl"})


# --- rows that fit nothing --------------------------------------------------------------------------------


@bad(2, "the rows fit several formats (prompt-pairs", "stackexchange", "Set data.format to one of")
def data_of_two_formats(world: World) -> list[str]:
    rows = [r | {"question": r["prompt"], "response_j": "a", "response_k": "b"} for r in good_rows()]
    return world.validate("rows.jsonl", lines(rows))


@bad(2, "data.format", "Input should be 'hh', 'prompt-pairs'", "'alpaca'")
def data_of_an_unknown_format(world: World) -> list[str]:
    return world.run(data={"format": "alpaca"})


@bad(2, "none of the 24 rows can be used", "has no turn of the Assistant", "data.format")
def data_of_another_format_than_said(world: World) -> list[str]:
    return world.validate("rows.jsonl", lines(good_rows()), "--set", "data.format=hh")


@bad(2, "the data has 1 distinct prompt(s) in 24 usable rows", "data.eval_path")
def data_of_a_single_prompt(world: World) -> list[str]:
    return world.run_on([row | {"prompt": "The soup"} for row in good_rows()])


@bad(2, "all 24 rows of", "are ties", "by most annotators")
def data_of_ties_only(world: World) -> list[str]:
    votes = {"annotator1": 1, "annotator2": 2, "annotator3": 0}
    rows = [
        {
            "instruction": r["prompt"],
            "input": "",
            "response1": r["chosen"],
            "response2": r["rejected"],
            **votes,
        }
        for r in good_rows()
    ]
    return world.validate("rows.jsonl", lines(rows))


@bad(2, "data.path has pairs, but data.eval_path has prompts", "Use data of the same kind")
def evaluation_data_of_another_kind(world: World) -> list[str]:
    held_out = world.file("held_out.jsonl", lines([{"prompt": "And what of the bread?"}]))
    return world.run(data={"eval_path": held_out, "eval_fraction": None})


# --- the gate ---------------------------------------------------------------------------------------------


@bad(
    3,
    "pairs/fault: 1 of 24",
    "rejected is missing",
    "source rows 2",
    "gate.quarantine=drop",
    adds="load-data",
)
def rejected_is_null(world: World) -> list[str]:
    return world.run_on(_with(1, rejected=None))


@bad(3, "see above: pairs/dropped")
def too_much_to_drop(world: World) -> list[str]:
    rows = [row | ({"chosen": ""} if i % 2 else {}) for i, row in enumerate(good_rows())]
    return world.validate("rows.jsonl", lines(rows), "--set", "gate.quarantine=drop")


@bad(3, "no row is left for evaluation", "the gate dropped 1 rows and kept 24", adds="load-data")
def nothing_left_to_evaluate(world: World) -> list[str]:
    held_out = world.file(
        "held_out.jsonl", lines([{"prompt": "And the bread?", "chosen": "", "rejected": "b"}])
    )
    return world.run(data={"eval_path": held_out, "eval_fraction": None}, gate={"quarantine": "drop"})


def _chats(first: str) -> list[dict]:
    return [
        {
            "prompt": [{"role": first, "content": row["prompt"]}, {"role": "user", "content": "Well?"}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in good_rows()
    ]


@bad(2, "no chat template", "tokens.template", "model.chat_template")
def chats_without_a_template(world: World) -> list[str]:
    model = world.changed_model(lambda model: (model / "chat_template.jinja").unlink())
    return world.validate("chats.jsonl", lines(_chats("system")), "--model", model)


@bad(3, "see above: pairs/template")
def chats_that_the_template_refuses(world: World) -> list[str]:
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
    template += "{% endif %}{{ m.content }}{% endfor %}"
    options = ("--model", str(world.model), "--set", f"model.chat_template={world.file('t.jinja', template)}")
    return world.validate("chats.jsonl", lines(_chats("system")), *options)


# --- dpo validate -----------------------------------------------------------------------------------------


@bad(2, "there is no file or folder", "absent.csv")
def validate_nothing(world: World) -> list[str]:
    return ["validate", str(world.new_folder() / "absent.csv")]


@bad(2, "there is no field data.formt (did you mean format?)", "Correct the override")
def validate_with_an_unknown_override(world: World) -> list[str]:
    return ["validate", str(world.folder / "good.jsonl"), "--set", "data.formt=hh"]


@bad(3, "the data gate refuses", "same.jsonl, see above: ", "pairs/identical")
def validate_refuses(world: World) -> list[str]:
    rows = [row | {"rejected": row["chosen"]} for row in good_rows()]
    return ["validate", world.file("same.jsonl", lines(rows))]


@bad(2, "the gate's baseline", "absent-gate.json", "Set gate.baseline to the gate.json")
def gate_baseline_missing(world: World) -> list[str]:
    return world.run(gate={"baseline": str(world.new_folder() / "absent-gate.json")})


@bad(2, "the gate's baseline is not a profile", "Use the `profile` object")
def gate_baseline_of_another_kind(world: World) -> list[str]:
    path = world.new_folder() / "gate.json"
    path.write_text('{"profile": {"scripts": "Latin"}}')
    return world.run(gate={"baseline": str(path)})
