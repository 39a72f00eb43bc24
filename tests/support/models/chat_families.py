"""Chat templates of many kinds with tokenizers that know their control tokens, for tests."""

import re
from typing import Any

# Small templates, one for each way in which a family ends its turns or opens the assistant's.
TEMPLATES = {
    "end and a line break": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "end of text after the end": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    "trims": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
    ),
    "no end": (
        "[gMASK]{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "two ends": (
        "{% for m in messages %}<|start|>{{ m['role'] }}"
        "{% if m['role'] == 'assistant' %}<|channel|>final<|message|>{{ m['content'] }}"
        "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}"
        "{% else %}<|message|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    "wrapped answer": (
        "{% for m in messages %}<|turn|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|begin|>"
        "{{ m['content'] }}<|finish|>{% else %}{{ m['content'] }}{% endif %}<|over|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant{% endif %}"
    ),
    "empty thought": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
        "<think>\n{{ m['reasoning_content'] or '' }}\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if opened %}<think>\n{% endif %}{% endif %}"
    ),
}
ENDS = {
    "end and a line break": "<|im_end|>",
    "end of text after the end": "<|end|>",
    "trims": "<end_of_turn>",
    "no end": "<|user|>",
    "two ends": "<|return|>",
    "wrapped answer": "<|over|>",
    "empty thought": "<|im_end|>",
}
_CONTROL = r"<\|[^\s<>|{}'\"]+\|>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>"
_PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def make_tokenizer(template: str, eos: str = "<|endoftext|>", bos: str = "<bos>") -> Any:
    """A byte-level tokenizer with the control tokens of a template; thoughts are no special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    base.train_from_iterator(["The soup was good and warm, user assistant system"] * 8, trainer)
    roles = [f"<|{role}|>" for role in ("user", "assistant", "system", "observation")]
    control = sorted({*re.findall(_CONTROL, template), *roles, eos, bos})
    base.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    base.add_tokens([AddedToken(t, special=False, normalized=False) for t in _PLAIN if t in template])
    fast = PreTrainedTokenizerFast(tokenizer_object=base, eos_token=eos, bos_token=bos, pad_token=eos)
    fast.chat_template = template
    return fast


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}
