"""Janus as one causal language model of images, against transformers' own."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, JanusForConditionalGeneration

from dpo_core import job as train
from dpo_core.data.layouts.fields import PairFields
from dpo_core.data.records import to_frame
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import ModelError
from dpo_core.generation.config import SamplingConfig
from dpo_core.generation.generate import sample
from dpo_core.generation.next_token import CachedRows, open_rows
from dpo_core.images.files import read_bytes, store
from dpo_core.images.scenes import CELLS, SIDE, draw
from dpo_core.images.scenes import encode as scene_codes
from dpo_core.model_check import check_model
from dpo_core.models.config import ModelConfig
from dpo_core.models.folder import makes_images
from dpo_core.models.image_codec import pixels_of, texts_of
from dpo_core.models.load import convert, load_model, load_tokenizer
from dpo_core.ranks import SingleRank
from dpo_core.scoring.completion_scores import completion_scores
from dpo_core.scoring.model_shape import shape_of, shape_of_config
from dpo_core.trainers.online.rollouts import Episode, guided_logps
from expectations.config import GateConfig
from expectations.job import run as gate
from expectations.job_file import GateJob
from tests.support.models.janus import CODES, LENGTH, WORDS, make_janus
from tests.support.runs.training_jobs import curve, write_job, write_reference

PROMPTS = ("a red ring", "two big blue dog and the ring")
SAMPLING = SamplingConfig(max_new_tokens=LENGTH, precision="fp32")
TOKENS = TokenConfig(max_length=40, max_prompt_length=20)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than such small products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return JanusForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def ours(folder: Path) -> Any:
    return load_model(folder)


@pytest.fixture(scope="module")
def tokenise(folder: Path) -> Tokenise:
    return Tokenise(load_tokenizer(folder), TOKENS)


def test_words_come_after_the_codes_and_the_null_prompt_is_transformers(
    folder: Path, tokenise: Tokenise
) -> None:
    original = AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        opened = [*original(prompt)["input_ids"], WORDS.index("<image>")]
        assert tokenise.prompt(prompt, False) == tuple(CODES + i for i in opened)
    assert makes_images(folder)
    images = tokenise.images
    assert images is not None
    assert (images.count, images.length, images.codec) == (CODES, LENGTH, "janus")
    start, opening, pad = (CODES + WORDS.index(w) for w in ("<start>", "<image>", "<pad>"))
    assert images.null_prompt(tokenise.prompt("a red ring", False)) == (start, pad, pad, pad, opening)
    assert tokenise.tokenizer.decode([CODES + WORDS.index("ring"), 5]) == "ring <image code 5>"


def test_a_chat_template_writes_the_words_around_a_prompt(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ ' the ' if m['role'] == 'user' else ' ' }}"
        "{{ m['content'] }}{{ ' and' if m['role'] == 'user' else eos_token }}{% endfor %}"
    )
    tokenise = Tokenise(tokenizer, TOKENS.model_copy(update={"template": "chat"}))
    words = "<start> the red ring and <image>".split()  # noqa: SIM905
    prompt = tuple(CODES + WORDS.index(word) for word in words)
    assert tokenise.prompt("red ring", False) == prompt
    image = " ".join(map(str, range(LENGTH)))
    row = {"id": "1", "prompt": "red ring", "chat": False, "completion": image, "ended": True}
    made = tokenise.single(row)
    assert isinstance(made, TokenSequence)
    assert (made.prompt, made.completion) == (prompt, tuple(range(LENGTH)))


def test_all_checks_of_a_model_hold(ours: Any) -> None:
    checked = check_model(ours, precision="fp32", longest=40)
    assert (checked.layout, checked.sampling) == ("packed", "cached")


@torch.no_grad()
def test_logits_are_those_of_transformers(ours: Any, theirs: Any, tokenise: Tokenise) -> None:
    prompt = tokenise.prompt(PROMPTS[1], False)
    image = tuple(range(0, 2 * LENGTH, 2))
    words = theirs.get_input_embeddings()(torch.tensor([[i - CODES for i in prompt]]))
    codes = theirs.prepare_embeddings_for_image_generation(torch.tensor([image]))
    hidden = theirs.model.language_model(inputs_embeds=torch.cat([words, codes], 1)).last_hidden_state
    expected = theirs.model.generation_head(hidden)[0, len(prompt) - 1 : -1].log_softmax(-1)
    (scores,) = completion_scores(ours, [TokenSequence(prompt, image)], "fp32", 2048)
    np.testing.assert_allclose(scores.logps, expected[range(LENGTH), image], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_teacher_forced_log_probs_are_those_of_generation(
    ours: Any, tokenise: Tokenise, guidance: float
) -> None:
    prompts = [tokenise.prompt(text, False) for text in PROMPTS] * 3
    settings = SAMPLING.model_copy(update={"guidance": guidance})
    drawn = sample(ours, prompts, settings, eos_id=0, seed=2)
    episodes = [
        Episode(TokenSequence(p, c.ids), "", i, True, c.logps)
        for i, (p, c) in enumerate(zip(prompts, drawn, strict=True))
    ]
    if guidance == 1:
        scores = completion_scores(ours, [e.sequence for e in episodes], "fp32", 2048)
        forced = np.stack([s.logps for s in scores])
    else:
        device = torch.device("cpu")
        forced = guided_logps(ours, episodes, guidance, temperature=1.0, device=device)[0].numpy()
    np.testing.assert_allclose(forced, [c.logps for c in drawn], atol=1e-4)
    assert len({c.ids for c in drawn}) == 6


@torch.no_grad()
def test_greedy_images_are_those_of_generate(ours: Any, theirs: Any, tokenise: Tokenise) -> None:
    assert isinstance(open_rows(ours, [(1, 2)]), CachedRows)
    for text in PROMPTS:
        prompt = tokenise.prompt(text, False)
        rows = open_rows(ours, [prompt] * 2, 5.0)
        image = []
        for _ in range(LENGTH):
            image.append(rows.logits().argmax(-1))
            rows.extend(image[-1])
        expected = theirs.generate(
            torch.tensor([[i - CODES for i in prompt]]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_mode="image",
            guidance_scale=5,
            do_sample=False,
        )
        assert torch.stack(image, 1).tolist() == expected.tolist() * 2


@torch.no_grad()
def test_pixels_and_codes_are_those_of_the_models_own(folder: Path, theirs: Any, tokenise: Tokenise) -> None:
    images = tokenise.images
    assert images is not None
    codes = torch.arange(2 * LENGTH).reshape(2, LENGTH) % CODES
    texts = [" ".join(map(str, row)) for row in codes.tolist()]
    pixels = pixels_of(images, texts, folder)
    expected = ((theirs.decode_image_tokens(codes) + 1) * 127.5).round().clamp(0, 255)
    assert pixels.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(pixels, expected.numpy().astype(np.uint8))
    assert pixels.std() > 1
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    tokens = theirs.model.vqmodel.encode(values).image_tokens.reshape(2, -1).tolist()
    files = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        files.append(buffer.getvalue())
    assert texts_of(images, files, folder) == [" ".join(map(str, row)) for row in tokens]


def test_only_what_makes_images_is_trained_and_counted(folder: Path, ours: Any) -> None:
    unused = ("model.vision_model.", "model.aligner.", "model.vqmodel.", "lm_head.")
    for name, parameter in load_model(folder).named_parameters():
        assert parameter.requires_grad is not name.startswith(unused), name
    trunk = sum(
        p.numel()
        for n, p in ours.named_parameters()
        if p.ndim >= 2 and not n.startswith(unused) and "embed" not in n and "vision_head" not in n
    )
    assert shape_of(ours).trunk == trunk == shape_of_config(ours.config).trunk


def rows() -> list[dict[str, Any]]:
    def image(seed: int) -> str:
        return " ".join(map(str, np.random.default_rng(seed).integers(0, CODES, LENGTH)))

    ended = {"chosen_ended": True, "rejected_ended": True}
    return [
        {"id": f"{i}", "prompt": PROMPTS[i % 2], "chat": False, "chosen": image(i), "rejected": image(50 + i)}
        | ended
        for i in range(8)
    ]


def saved(work: Path, folder: Path) -> dict[str, torch.Tensor]:
    """What transformers reads of a job's result, with the start's tokenizer and generation settings."""
    model = JanusForConditionalGeneration.from_pretrained(work / "out")
    assert model.generation_config.generation_kwargs == {"boi_token_id": WORDS.index("<image>")}
    assert json.loads((work / "out" / "config.json").read_text())["architectures"] == [
        "JanusForConditionalGeneration"
    ]
    tokenizer = AutoTokenizer.from_pretrained(work / "out")
    assert (
        tokenizer("a red ring")["input_ids"]
        == AutoTokenizer.from_pretrained(folder)("a red ring")["input_ids"]
    )
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def require_trained(state: dict[str, torch.Tensor], theirs: Any, parts: list[str]) -> None:
    changed = {name for name, value in theirs.state_dict().items() if not value.equal(state[name])}
    assert state.keys() == theirs.state_dict().keys()
    assert {name.split(".")[1] for name in changed} == set(parts)


SETTINGS: dict[str, Any] = {
    "engine": {"precision": "fp32", "threads": 1},
    "optim": {"learning_rate": 1e-3, "weight_decay": 0.1},
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": {"rank": 2}},
        pytest.param({"engine": SETTINGS["engine"] | {"zero_stage": 2}}, marks=pytest.mark.slow),
    ],
    ids=["all weights", "LoRA", "ZeRO 2"],
)
def test_a_dpo_job_trains_and_its_result_is_transformers(
    alone: None, folder: Path, theirs: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    shard = write_reference(folder, rows(), tmp_path / "shard")
    settings = SETTINGS | {"batch_size": 4, "micro_batch_size": 4, "epochs": 1} | changes
    job = write_job(tmp_path / "work", "dpo", folder, rows(), settings=settings, reference_logps=str(shard))
    assert train.main(["--config", str(job)]) == 0
    first, second = curve(tmp_path / "work")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert second["loss"] != first["loss"]
    # Adapters are for the aligner and the language model; peft leaves heads out.
    more = [] if "lora" in changes else ["generation_embeddings", "generation_head"]
    parts = ["generation_aligner", "language_model", *more]
    require_trained(saved(tmp_path / "work", folder), theirs, parts)


def test_a_grpo_job_trains_with_guided_scores(alone: None, folder: Path, theirs: Any, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(
        "def bright(prompts, images):\n    return [float(sum(i.convert('L').getdata())) for i in images]\n"
    )
    settings = SETTINGS | {"iterations": 2, "episodes": 8, "group_size": 4, "micro_batch_size": 8}
    job = write_job(
        tmp_path / "work", "grpo", folder,
        [{"prompt": prompt, "chat": False} for prompt in PROMPTS],
        settings=settings | {"guidance": 5.0, "score": "guided"},
        reference=str(folder),
        sampling=SAMPLING.model_dump(mode="json"),
        reward_source=f"{tmp_path / 'reward.py'}:bright",
    )  # fmt: skip
    assert train.main(["--config", str(job)]) == 0
    first, second = curve(tmp_path / "work")
    assert first["sampling/logp_difference/max"] < 1e-4
    assert first["grad_norm"] > 0
    assert second["objective/kl"] != 0
    parts = ["generation_aligner", "generation_head", "language_model", "generation_embeddings"]
    require_trained(saved(tmp_path / "work", folder), theirs, parts)


def test_an_imported_folder_is_the_same_model(folder: Path, theirs: Any, tmp_path: Path) -> None:
    convert(ModelConfig(name=str(folder)), tmp_path / "out")
    state = saved(tmp_path, folder)
    assert all(value.equal(state[name]) for name, value in theirs.state_dict().items())
    (tmp_path / "out" / "generation_config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not name generation_kwargs"):
        load_model(tmp_path / "out")


def test_files_of_scenes_are_their_codes(tokenise: Tokenise) -> None:
    images = tokenise.images
    assert images is not None
    scenes = type(images)(121, CELLS * CELLS, "scenes", 123)
    buffer = io.BytesIO()
    Image.fromarray(draw([])).save(buffer, "png")
    codes = scene_codes(np.stack([draw([])]))[0].tolist()
    assert texts_of(scenes, [buffer.getvalue()], "") == [" ".join(map(str, codes))]
    assert pixels_of(scenes, [" ".join(map(str, codes))], "").shape == (1, SIDE, SIDE, 3)


def test_the_gate_writes_named_images_in_the_models_codes(
    folder: Path, tokenise: Tokenise, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 10, 10, 3), dtype=np.uint8)
    names = []
    for image in noise:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        names.append(store(buffer.getvalue(), tmp_path / "images"))
    pair = PairFields("a red ring", False, names[0], names[1])
    frame = to_frame([pair, pair._replace(prompt="a dog")]).assign(split=["train", "eval"])
    frame.to_parquet(tmp_path / "rows.parquet")
    job = GateJob.model_construct(
        work=str(tmp_path),
        subject="pairs", rows=str(tmp_path / "rows.parquet"), model=str(folder), config=GateConfig(),
        tokens=TOKENS, docs=str(tmp_path / "docs"), out=str(tmp_path / "out.parquet"), baseline=None,
    )  # fmt: skip
    result = gate(job, SingleRank())  # type: ignore[arg-type]
    failed = [
        f["message"] for f in result["report"]["findings"] if not f["passed"] and f["severity"] == "critical"
    ]
    assert not failed
    kept = pd.read_parquet(tmp_path / "out.parquet").to_dict("records")
    expected = texts_of(tokenise.images, [read_bytes(name) for name in names], folder)  # type: ignore[arg-type]
    assert [kept[1]["chosen"], kept[1]["rejected"]] == expected
    assert expected[0] != expected[1]
    pairs, dropped = tokenise.pairs(kept)
    assert (len(pairs), dropped) == (2, {})


@pytest.mark.slow  # a process of its own that imports everything
def test_a_text_run_loads_nothing_of_images() -> None:
    code = (
        "import sys, dpo_core.jobs.train, dpo_core.jobs.evaluate, dpo_core.jobs.sample_pairs\n"
        "import expectations.job, dpo_core.trainers.dpo, dpo_core.trainers.grpo, dpo_core.models.load\n"
        "import dpo_core.rewards.model\n"
        "print([n for n in sys.modules if n.split('.')[0] in ('PIL', 'diffusers') or n.endswith('janus')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
