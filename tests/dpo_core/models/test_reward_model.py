"""The reward model on small real architectures: the scored token, its scale, training and files."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from dpo_core.errors import ModelError, StageFailed
from dpo_core.models.load import load_model
from dpo_core.models.reward_model import RewardModel, bradley_terry_loss
from dpo_core.scoring.attention import trunk_of
from dpo_core.trainers.ppo import make_critic
from tests.support.models.families import make_family

TEXTS = [[5, 9, 3, 2], [7, 2], [4, 4, 8, 6, 1, 2]]
EOS = 2


def llama(hidden: int = 32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaModel(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def model_of(backbone: nn.Module) -> RewardModel:
    return RewardModel(backbone, torch.Generator().manual_seed(1)).eval()


def batch(texts: list[list[int]], width: int, pad: int, left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.full((len(texts), width), pad)
    attention = torch.zeros_like(ids)
    last = torch.zeros(len(texts), dtype=torch.long)
    for row, text in enumerate(texts):
        start = width - len(text) if left else 0
        ids[row, start : start + len(text)] = torch.tensor(text)
        attention[row, start : start + len(text)] = 1
        last[row] = start + len(text) - 1
    return ids, attention, last


def test_head_statistics() -> None:
    hidden = 4096
    config = LlamaConfig(vocab_size=8, hidden_size=hidden, num_hidden_layers=0, num_attention_heads=32)
    backbone = LlamaModel(config)
    model = RewardModel(backbone, torch.Generator().manual_seed(0))
    weight = model.head.weight.detach()
    expected = 1 / math.sqrt(hidden + 1)
    assert weight.shape == (1, hidden)
    assert abs(weight.mean().item()) < 4 * expected / math.sqrt(hidden)
    assert weight.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * hidden))
    assert model.head.bias.item() == 0.0
    again = RewardModel(backbone, torch.Generator().manual_seed(0))
    assert torch.equal(again.head.weight, weight)


@pytest.mark.parametrize("trunk", [llama, gpt2])
@torch.no_grad()
def test_the_score_does_not_depend_on_padding(trunk: type) -> None:
    """Neither on its length, its side, its token (EOS included), nor on the neighbours in the batch."""
    model = model_of(trunk())
    unpadded = torch.cat([model(*batch([text], len(text), pad=0)) for text in TEXTS])
    assert unpadded.shape == (3,)
    assert unpadded.unique().numel() == 3
    for width, pad, left in [(6, 0, False), (11, EOS, False), (11, 49, False), (11, EOS, True)]:
        torch.testing.assert_close(model(*batch(TEXTS, width, pad, left)), unpadded, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_score_is_read_at_the_given_index() -> None:
    model = model_of(llama())
    ids, attention, last = batch(TEXTS, 8, pad=EOS)
    per_token = model.per_token(ids, attention)
    assert per_token.shape == (3, 8)
    torch.testing.assert_close(model(ids, attention, last), per_token[torch.arange(3), last])
    earlier = model(ids, attention, last - 1)
    torch.testing.assert_close(earlier, per_token[torch.arange(3), last - 1])
    assert (earlier - model(ids, attention, last)).abs().min().item() > 1e-4


@torch.no_grad()
def test_normalise_gives_mean_0_and_std_1_from_any_state() -> None:
    model = model_of(llama())
    texts = [[i, (7 * i) % 50, EOS] for i in range(3, 43)]
    inputs = batch(texts, 3, pad=0)
    model.head.bias.fill_(4.0)
    before = model(*inputs)
    for _ in range(2):  # the second call starts from a gain and a bias that are not 1 and 0
        model.normalise(model(*inputs))
        after = model(*inputs)
        assert after.mean().item() == pytest.approx(0, abs=1e-5)
        assert after.std(correction=0).item() == pytest.approx(1, rel=1e-5)
        model.gain.mul_(3).add_(1)
        model.bias.sub_(2)
    model.gain.fill_(1)
    model.bias.zero_()
    model.normalise(before)
    assert model.gain.item() == pytest.approx(1 / before.std(correction=0).item(), rel=1e-5)
    assert model.bias.item() == pytest.approx(-model.gain.item() * before.mean().item(), rel=1e-5)
    assert torch.equal(model(*inputs).argsort(), before.argsort())


@pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0], [1.0, math.nan, 2.0]])
def test_normalise_refuses_scores_without_scale(scores: list[float]) -> None:
    model = model_of(llama())
    with pytest.raises(StageFailed, match=r"of 3 training answers|all 3 training answers"):
        model.normalise(torch.tensor(scores))
    assert (model.gain.item(), model.bias.item()) == (1.0, 0.0)


@torch.no_grad()
def test_scores_are_float32_under_autocast_and_in_bfloat16() -> None:
    model = model_of(llama())
    inputs = batch(TEXTS, 6, pad=0)
    exact = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*inputs)
    narrow = model.to(torch.bfloat16)(*inputs)
    for scores in (mixed, narrow):
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.05)
    # A head that ran in bfloat16 could only return numbers that bfloat16 can hold.
    assert not torch.equal(mixed.bfloat16().float(), mixed)


@pytest.mark.parametrize("trunk", [llama, gpt2])
def test_save_and_load(tmp_path: Path, trunk: type) -> None:
    model = model_of(trunk())
    inputs = batch(TEXTS, 6, pad=0)
    with torch.no_grad():
        model.head.bias.fill_(0.7)
        model.normalise(model(*inputs))
        model.save(tmp_path / "rm")
        loaded = RewardModel.load(tmp_path / "rm")
        assert not loaded.training
        assert torch.equal(loaded(*inputs), model(*inputs))
    written = {path.suffix for path in (tmp_path / "rm").rglob("*") if path.is_file()}
    assert written == {".json", ".safetensors"}


@pytest.mark.parametrize(
    ("family", "width"),
    [
        ("opt", 32),
        ("opt_350m", 16),
        ("biogpt", 32),
        ("xglm", 32),
        ("mamba", 32),
        ("bert", 32),
        ("mixtral", 32),
        ("qwen3_moe", 32),
        ("deepseek_v3", 32),
    ],
)
@torch.no_grad()
def test_the_trunks_of_other_families(family: str, width: int, tmp_path: Path) -> None:
    """A trunk may be of another class than `AutoModel` would read, and return states of another width."""
    language_model = load_model(make_family(tmp_path / "base", family))
    inputs = batch(TEXTS, 6, pad=0)
    for model in (model_of(trunk_of(language_model)), make_critic(language_model)):
        model.head.weight.normal_(generator=torch.Generator().manual_seed(2))
        assert model.head.in_features == width
        scores = model.eval()(*inputs)
        model.save(tmp_path / "rm")
        again = RewardModel.load(tmp_path / "rm")
        assert type(again.backbone) is type(model.backbone)
        assert torch.equal(again(*inputs), scores)
        assert scores.unique().numel() == 3


def test_a_trunk_that_lacks_weights_or_has_others_is_refused(tmp_path: Path) -> None:
    model_of(llama()).save(tmp_path)
    file = tmp_path / "backbone" / "model.safetensors"
    tensors = load_file(file)
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()} | {"other": torch.ones(1)}, file)
    with pytest.raises(ModelError, match=r"1 weights that LlamaModel has no place for, first other"):
        RewardModel.load(tmp_path)
    tensors.pop("layers.1.mlp.up_proj.weight")
    save_file(tensors, file)
    with pytest.raises(
        ModelError, match=r"lacks 1 weights that its config asks for, first layers\.1\.mlp\.up_proj"
    ):
        RewardModel.load(tmp_path)


def test_a_trunk_that_does_not_run_is_refused() -> None:
    class Broken(LlamaModel):
        def forward(self, *arguments: object, **named: object) -> Any:
            raise AttributeError("no such thing")

    with pytest.raises(ModelError, match="the trunk Broken does not run without its output head"):
        model_of(Broken(llama().config))


def test_load_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a saved reward model"):
        RewardModel.load(tmp_path)
    model_of(llama()).save(tmp_path / "a")
    model_of(llama(hidden=64)).save(tmp_path / "b")
    (tmp_path / "b" / "head.safetensors").replace(tmp_path / "a" / "head.safetensors")
    with pytest.raises(ModelError, match="cannot be read"):
        RewardModel.load(tmp_path / "a")
    (tmp_path / "a" / "head.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ModelError, match="cannot be read"):
        RewardModel.load(tmp_path / "a")


def test_zero_head_is_at_ln_2_and_training_ranks_the_pairs() -> None:
    model = model_of(llama())
    with torch.no_grad():
        model.head.weight.zero_()
    good, bad = [[5, i, EOS] for i in range(10, 18)], [[6, i, EOS] for i in range(10, 18)]
    inputs = batch(good + bad, 3, pad=0)  # both members in one forward
    chosen, rejected = model(*inputs).chunk(2)
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx([math.log(2)] * 8)
    assert not (chosen > rejected).any()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        chosen, rejected = model(*inputs).chunk(2)
        bradley_terry_loss(chosen, rejected).mean().backward()
        optimizer.step()
    chosen, rejected = model(*inputs).chunk(2)
    assert (chosen > rejected).all()
    assert bradley_terry_loss(chosen, rejected).mean().item() < 0.1
    assert model.gain.item() == 1.0, "normalisation is not trained"


def test_bradley_terry_values_and_gradient() -> None:
    chosen = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([1.0, 2.0], dtype=torch.float64)
    margin = torch.tensor([0.0, 1 / 3], dtype=torch.float64)
    loss = bradley_terry_loss(chosen, rejected, margin)
    assert loss[0].item() == pytest.approx(math.log(2), rel=1e-12)
    assert loss[1].item() == pytest.approx(math.log1p(math.exp(1.5 + 1 / 3)), rel=1e-12)
    loss.sum().backward()
    assert chosen.grad is not None
    expected = -torch.sigmoid(rejected - chosen.detach() + margin)
    torch.testing.assert_close(chosen.grad, expected)


def test_a_common_shift_moves_only_the_centring_term() -> None:
    chosen, rejected = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    shifted = (chosen + 4, rejected + 4)
    torch.testing.assert_close(bradley_terry_loss(*shifted), bradley_terry_loss(chosen, rejected))
    centred = bradley_terry_loss(chosen, rejected, centring=0.01) - bradley_terry_loss(chosen, rejected)
    assert centred.tolist() == pytest.approx([0.01 * 1.5**2, 0.01 * 1.0**2], rel=1e-5)
    moved = bradley_terry_loss(*shifted, centring=0.01) - bradley_terry_loss(*shifted)
    assert moved.tolist() == pytest.approx([0.01 * 9.5**2, 0.01 * 9.0**2], rel=1e-5)


def test_bradley_terry_does_not_overflow() -> None:
    chosen = torch.tensor([-1e6, 1e6], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(2))
    loss.sum().backward()
    assert loss.tolist() == [1e6, 0.0]
    assert chosen.grad is not None
    assert chosen.grad.tolist() == [-1.0, 0.0]


def test_the_trunk_of_a_real_checkpoint(shared: Path, tmp_path: Path) -> None:
    language_model = AutoModelForCausalLM.from_pretrained(shared / "models" / "stories260K")
    model = model_of(language_model.base_model)
    inputs = batch(TEXTS, 9, pad=EOS)
    with torch.no_grad():
        scores = model(*inputs)
        model.save(tmp_path)
        torch.testing.assert_close(RewardModel.load(tmp_path)(*inputs), scores, rtol=0, atol=0)
    assert scores.unique().numel() == 3
