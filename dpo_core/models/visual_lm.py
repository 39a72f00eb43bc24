"""Janus and Janus-Pro of transformers as one causal language model of images.

Ids below the number of codes are image codes, words come after them. The trunk embeds words as the language
model does and codes through the aligner, runs the language model, and the first layer of the generation head;
the output embeddings are the head's last layer, over codes alone. Names and values of the weights stay those
of `JanusForConditionalGeneration`, which reads a saved folder again; so do its tokenizer files, whose ids are
moved only while they are in memory.

Shapes: B rows, T tokens, H hidden size, V words, C codes.
"""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_core.data.tokens.image_codes import image_codes
from dpo_core.errors import ModelError
from dpo_core.models.folder import JANUS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def codes_of(config: Any, folder: Path) -> dict[str, Any]:
    """The `image_codes` of a Janus folder.

    Raises:
        ModelError: its generation_config.json does not name the tokens that open an image and fill the prompt
            that says nothing.
    """
    file = folder / "generation_config.json"
    try:
        facts = json.loads(file.read_bytes())
        opening, padding = facts["generation_kwargs"]["boi_token_id"], facts["pad_token_id"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{file} does not name generation_kwargs.boi_token_id and pad_token_id ({type(error).__name__})",
            "Use a folder of Janus in the format of transformers, with its generation_config.json",
        ) from error
    count = config.vq_config.num_embeddings
    return {
        "count": count,
        "length": config.vision_config.num_image_tokens,
        "codec": JANUS,
        "opening": count + int(opening),
        "padding": count + int(padding),
    }


class VisualEmbeddings(nn.Module):
    """Embeddings (B, T, H) of ids: of words the language model's, of codes the aligner's."""

    def __init__(self, model: Any, count: int) -> None:
        super().__init__()
        self.count = count
        self.words = model.language_model.embed_tokens
        self.codes, self.aligner = model.generation_embeddings, model.generation_aligner

    @property
    def weight(self) -> Tensor:
        """Of the shape that one table of all ids would have, without values."""
        words_VH = self.words.weight
        return torch.empty(self.count + len(words_VH), words_VH.shape[1], device="meta")

    def forward(self, ids_BT: Tensor) -> Tensor:
        words_BTH = self.words((ids_BT - self.count).clamp(min=0))
        codes_BTH = self.aligner(self.codes(ids_BT.clamp(max=self.count - 1)))
        return torch.where(ids_BT[..., None] < self.count, codes_BTH.to(words_BTH), words_BTH)


class VisualTrunk(nn.Module):
    """Everything before the last layer of the generation head."""

    def __init__(self, model: Any, embeddings: VisualEmbeddings, config: Any) -> None:
        super().__init__()
        self.embeddings, self.language_model = embeddings, model.language_model
        self.first, self.activation = model.generation_head.proj_out, model.generation_head.activation_fn
        self.config = config

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the language model."""
        layers: nn.ModuleList = self.language_model.layers
        return layers

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        **attention: Any,
    ) -> Any:
        """The language model's output, with the hidden states (B, T, P) that the last layer reads."""
        output = self.language_model(
            inputs_embeds=self.embeddings(input_ids),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **attention,
        )
        output.last_hidden_state = self.activation(self.first(output.last_hidden_state))
        return output


def register() -> None:
    """Let `AutoModelForCausalLM` make Janus as a causal language model of images."""
    from transformers import AutoModelForCausalLM, JanusConfig  # noqa: PLC0415 - see transformers_lock

    AutoModelForCausalLM.register(JanusConfig, _model_class(), exist_ok=True)


@cache
def _model_class() -> Any:
    from transformers import JanusForConditionalGeneration  # noqa: PLC0415 - see transformers_lock
    from transformers.modeling_outputs import CausalLMOutputWithPast  # noqa: PLC0415 - see transformers_lock

    class VisualJanus(JanusForConditionalGeneration):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            codes = image_codes(config)
            assert codes, "config_in names the codes"
            embeddings = VisualEmbeddings(self.model, codes.count)
            trunk = VisualTrunk(self.model, embeddings, config.text_config)
            # Not registered: their parts are those of the model, under whose names they are saved.
            self.__dict__["visual"] = SimpleNamespace(embeddings=embeddings, trunk=trunk)

        def used_parameters(self) -> set[nn.Parameter]:
            """All but the image encoder, the decoder of pixels and the head of words."""
            return {*self.visual.trunk.parameters(), *self.model.generation_head.parameters()}

        def get_input_embeddings(self) -> nn.Module:
            return self.visual.embeddings

        def get_output_embeddings(self) -> nn.Module:
            return self.model.generation_head.vision_head

        def get_decoder(self) -> nn.Module:
            return self.visual.trunk

        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Any = None,
            position_ids: Tensor | None = None,
            past_key_values: Any = None,
            use_cache: bool = False,
            logits_to_keep: int = 0,
        ) -> Any:
            output = self.visual.trunk(input_ids, attention_mask, position_ids, past_key_values, use_cache)
            hidden_BTP = output.last_hidden_state[:, -logits_to_keep:]
            logits_BTC = self.get_output_embeddings()(hidden_BTP)
            return CausalLMOutputWithPast(logits=logits_BTC, past_key_values=output.past_key_values)

    # The name that is saved as the architecture, which transformers reads again.
    VisualJanus.__name__ = VisualJanus.__qualname__ = JanusForConditionalGeneration.__name__
    return VisualJanus


# --- the tokenizer ----------------------------------------------------------------------------------------


def moved(tokenizer: Any, codes: dict[str, Any]) -> "PreTrainedTokenizerBase":
    """The tokenizer with all ids after the codes; its attribute `original` is the one to save.

    Raises:
        ModelError: it is of a kind whose vocabulary is not known here.
    """
    from tokenizers import Tokenizer  # noqa: PLC0415 - only for this model
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - see transformers_lock

    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = json.loads(backend.to_str()) if backend is not None else {}
    words = facts.get("model", {}).get("vocab")
    if not isinstance(words, dict):
        raise ModelError(
            "the tokenizer of the model of images has no vocabulary of words with ids",
            "Use the model's fast tokenizer (tokenizer.json)",
        )
    by = codes["count"]
    # The codes' names have spaces, so that no text is encoded as one.
    facts["model"]["vocab"] = {f"<image code {i}>": i for i in range(by)} | {
        w: i + by for w, i in words.items()
    }
    for token in facts.get("added_tokens") or []:
        token["id"] += by
    for step in _steps(facts.get("post_processor")):
        for special in (step.get("special_tokens") or {}).values():
            special["ids"] = [i + by for i in special["ids"]]
        for side in ("sep", "cls"):
            if side in step:
                step[side] = [step[side][0], step[side][1] + by]
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(facts)), image_codes=codes, **special
    )
    made.chat_template, made.name_or_path = tokenizer.chat_template, tokenizer.name_or_path
    made.original = tokenizer
    return made


def _steps(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A post-processor of a tokenizer, or those of a sequence."""
    if processor is None:
        return []
    return (
        [s for p in processor["processors"] for s in _steps(p)] if "processors" in processor else [processor]
    )


# --- pixels -----------------------------------------------------------------------------------------------


@cache
def _pixel_model(folder: str) -> Any:
    """The frozen model between codes and pixels, and the side of its images, from a folder's files alone."""
    from safetensors import safe_open  # noqa: PLC0415 - only for this model
    from transformers import AutoConfig, JanusVQVAE  # noqa: PLC0415 - see transformers_lock

    config = AutoConfig.from_pretrained(folder)
    prefix = "model.vqmodel."
    weights: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118 - no mapping
            weights |= {name.removeprefix(prefix): opened.get_tensor(name).float() for name in names}
    model = JanusVQVAE(config.vq_config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(f"{folder} lacks weights of its image decoder", "Use a complete folder") from error
    return model.eval().requires_grad_(False), config.vision_config.image_size


def decode(codes_BT: Tensor, folder: Path) -> Tensor:
    """(B, side, side, 3) bytes of images in codes."""
    model, _ = _pixel_model(str(folder))
    parts = [model.decode(part) for part in codes_BT.split(8)]
    pixels_BHW3 = torch.cat(parts).permute(0, 2, 3, 1)
    return ((pixels_BHW3 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def encode(pixels_BHW3: Tensor, folder: Path) -> Tensor:
    """(B, T) codes of images of bytes, of the side that the model draws."""
    model, _ = _pixel_model(str(folder))
    values_B3HW = pixels_BHW3.permute(0, 3, 1, 2).float() / 127.5 - 1
    parts = [model.encode(part).image_tokens.view(len(part), -1) for part in values_B3HW.split(8)]
    return torch.cat(parts)


def side_of(folder: Path) -> int:
    """Pixels of an image's side."""
    side: int = _pixel_model(str(folder))[1]
    return side
