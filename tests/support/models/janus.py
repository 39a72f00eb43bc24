"""A tiny Janus with random weights, as a folder that transformers writes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

CONTROL = ("<pad>", "<start>", "<end>", "<image>", "<unknown>")
WORDS = (*CONTROL, "a", "the", "red", "blue", "big", "ring", "dog", "and", "two", "of")
CODES, LENGTH = 48, 16


def make_janus(folder: Path, *, tied: bool = False) -> Path:
    """Sixteen codes of 48, images of 8 x 8 pixels; large weights, so that distributions are not uniform."""
    text = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=len(WORDS), max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 2,
        "num_image_tokens": LENGTH, "projection_dim": 32,
    }  # fmt: skip
    vq = {
        "embed_dim": 8, "num_embeddings": CODES, "latent_channels": 32, "base_channels": 32,
        "channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32,
    }  # fmt: skip
    config = JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, image_token_id=4, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    model = JanusForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    opening = {"boi_token_id": 3}
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, generation_kwargs=opening
    )
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 1)])
    special = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unknown>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder
