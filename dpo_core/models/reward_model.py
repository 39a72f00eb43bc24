"""A scalar reward model: a language model's trunk with a linear head, and the loss that trains it.

Shapes: B rows, T tokens, H hidden size. Sources: Stiennon et al. 2020, the N+ implementation details (arXiv
2403.17031) for the head and the normalisation, Eisenstein et al. 2023 (2312.09244) for the centring term.
"""

import inspect
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from dpo_core.errors import ModelError, StageFailed
from dpo_core.models.load import load_weights
from dpo_core.models.remote_code import is_trusted
from dpo_core.models.transformers_lock import quiet_transformers

_BACKBONE = "backbone"
_HEAD = "head.safetensors"
_TRANSFORMERS = "transformers.models."


class RewardModel(nn.Module):
    """Scores token sequences: `gain · head(hidden state of the last token) + bias`.

    Args:
        backbone: a Hugging Face decoder without its output head (`attention.trunk_of` a causal LM): called
            with ids and attention mask it returns `last_hidden_state` (B,T,H).
        generator: draws the head, N(0, 1/√(H+1)) with bias 0; None takes torch's global one.

    Raises:
        ModelError: the trunk does not run by itself.
    """

    gain: Tensor
    bias: Tensor

    def __init__(self, backbone: nn.Module, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        hidden_size = _hidden_size(backbone)
        self.head = nn.Linear(hidden_size, 1)
        with torch.no_grad():
            self.head.weight.normal_(0.0, 1 / math.sqrt(hidden_size + 1), generator=generator)
            self.head.bias.zero_()
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))
        # Trunks with ALiBi take no positions.
        self._takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters

    def forward(self, ids_BT: Tensor, attention_BT: Tensor, last_index_B: Tensor) -> Tensor:
        """Scores (B,), float32.

        Args:
            ids_BT: padded on either side; pad ids may be any token, EOS included.
            attention_BT: 1 on real tokens, 0 on padding.
            last_index_B: index of each row's last real token, the only place where the score is read.
        """
        hidden_BTH = self._hidden(ids_BT, attention_BT)
        rows = torch.arange(len(ids_BT), device=ids_BT.device)
        return self._score(hidden_BTH[rows, last_index_B])

    def per_token(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """The same score at every position, (B,T): the values of a critic that starts from this model."""
        return self._score(self._hidden(ids_BT, attention_BT))

    def _hidden(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        extra: dict[str, Tensor] = {}
        if self._takes_positions:  # so that padding on the left does not shift the text
            extra["position_ids"] = (attention_BT.long().cumsum(dim=1) - 1).clamp(min=0)
        output = self.backbone(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False, **extra)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _score(self, hidden: Tensor) -> Tensor:
        # The head runs in float32 even under autocast: score differences are small against the scores.
        with torch.autocast(hidden.device.type, enabled=False):
            raw = functional.linear(hidden.float(), self.head.weight.float(), self.head.bias.float())
            return self.gain.float() * raw.squeeze(-1) + self.bias.float()

    @torch.no_grad()
    def normalise(self, scores_N: Tensor) -> None:
        """Set gain and bias so that these scores would have had mean 0 and standard deviation 1.

        Args:
            scores_N: what this model returned for reference samples (of all ranks).

        Raises:
            StageFailed: the scores are not finite, or do not differ.
        """
        scores_N = scores_N.to(self.gain.device, torch.float64)
        mean, std = scores_N.mean(), scores_N.std(correction=0)
        if not (torch.isfinite(std) and std > 0):
            what = (
                f"all {scores_N.numel()} training answers the same score ({mean:g}): it has learnt nothing"
                if torch.isfinite(std)
                else f"some of {scores_N.numel()} training answers a score that is not finite"
            )
            raise StageFailed(
                f"the reward model gives {what}",
                "Check that chosen and rejected answers differ, and lower reward.model.optim.learning_rate",
            )
        # Composed with the present gain and bias; float32 also in a bfloat16 model.
        self.gain = (self.gain.double() / std).float()
        self.bias = ((self.bias.double() - mean) / std).float()

    def save(self, folder: str | Path) -> None:
        """Write the trunk to `folder/backbone`, and the head and its normalisation to `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        trunk: Any = self.backbone
        name = type(trunk).__module__ + "." + type(trunk).__name__
        if not name.startswith(_TRANSFORMERS):
            type(trunk).register_for_auto_class("AutoModel")  # saves its code too
        with quiet_transformers():
            trunk.save_pretrained(folder / _BACKBONE)
        tensors = {
            "weight": self.head.weight,
            "head_bias": self.head.bias,
            "gain": self.gain,
            "bias": self.bias,
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / _HEAD, {"trunk": name})

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "RewardModel":
        """Read what `save` wrote, in eval mode on the CPU; only safetensors are read, and no code is run that
        is not trusted (`remote_code`).

        Raises:
            ModelError: the folder is not a saved reward model, or its parts do not fit together.
        """
        folder = Path(folder)
        for part in (folder / _BACKBONE / "config.json", folder / _HEAD):
            if not part.is_file():
                raise ModelError(
                    f"{folder} is not a saved reward model: {part} is missing", "Train it again."
                )
        try:
            trunk = folder / _BACKBONE
            with safe_open(folder / _HEAD, "pt") as head:
                name = (head.metadata() or {}).get("trunk")
            trunk_class = _class_of(name, trunk)
            arguments = {"local_files_only": True, "trust_remote_code": is_trusted(trunk)}
            if "add_pooling_layer" in inspect.signature(trunk_class.__init__).parameters:
                arguments["add_pooling_layer"] = False  # BERT-like trunks; their causal models have none
            backbone = load_weights(trunk_class, trunk, dtype, **arguments)
            tensors = load_file(folder / _HEAD)
            model = cls(backbone)
            model.head.load_state_dict({"weight": tensors["weight"], "bias": tensors["head_bias"]})
            model.gain, model.bias = tensors["gain"].float(), tensors["bias"].float()
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, ModelError) as error:
            reason = error.problem if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
            raise ModelError(
                f"the reward model in {folder} cannot be read: {reason}",
                "Train it again, or restore the folder.",
            ) from error
        return model.eval()


@torch.no_grad()
def _hidden_size(backbone: Any) -> int:
    """Width of the hidden states that the trunk returns, which in OPT-350m is not its `hidden_size`."""
    training, device = backbone.training, next(backbone.parameters()).device
    try:
        ids_11 = torch.zeros(1, 1, dtype=torch.long, device=device)
        return int(backbone.eval()(input_ids=ids_11, use_cache=False).last_hidden_state.shape[-1])
    except Exception as error:
        raise ModelError(
            f"the trunk {type(backbone).__name__} does not run without its output head "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]})",
            "Train the reward model from another base model, or name a known reward",
        ) from error
    finally:
        backbone.train(training)


def _class_of(name: str | None, folder: Path) -> Any:
    """The class that a trunk was saved from: `AutoModel` would read an OPTDecoder as an OPTModel.

    Args:
        name: with its module. `AutoModel` loads classes of the checkpoint's own code, and models without a
            recorded name.
    """
    if name is None or not name.startswith(_TRANSFORMERS):
        from transformers import AutoModel  # noqa: PLC0415 - see transformers_lock

        return AutoModel
    module, _, last = name.rpartition(".")
    trunk_class = getattr(import_module(module), last, None)
    if trunk_class is None:
        raise ValueError(f"transformers has no class {name}")
    return trunk_class


def bradley_terry_loss(
    chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | None = None, centring: float = 0.0
) -> Tensor:
    """-log σ(r_w - r_l - m) + centring·(r_w + r_l)² of each pair (B,); the mean over pairs is the caller's.

    The centring term (0.01 in the paper) squares the SUM of both scores and keeps their level near 0, which
    the first term leaves free. A margin asks for a larger gap where annotators were more certain.
    """
    gap_B = chosen_B - rejected_B
    if margin_B is not None:
        gap_B = gap_B - margin_B
    loss_B = -functional.logsigmoid(gap_B)
    return loss_B + centring * (chosen_B + rejected_B) ** 2 if centring else loss_B
