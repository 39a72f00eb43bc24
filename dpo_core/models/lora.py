"""LoRA: adds trainable low-rank adapters to frozen weights, and merges them for a normal checkpoint.

The adapters start at zero, so that the policy starts as the checkpoint that the job names. The reference has
none: DPO reads cached log-probs of a checkpoint, named by its digest, and a job exports the policy with its
adapters merged. Source: Hu et al. 2021, arXiv 2106.09685.
"""

import importlib.util
from typing import Any

import torch

from dpo_core.errors import RecipeError
from dpo_core.models.load import used_parameters
from dpo_core.models.lora_config import LORA_EXTRA, LoraConfig


def add_lora(model: Any, config: LoraConfig, seed: int, *, language_model: bool = True) -> None:
    """Freeze a model in place and add a trainable adapter to its linear layers.

    Args:
        seed: of A; B is zero.
        language_model: it has an output head, which gets no adapter.

    Raises:
        RecipeError: peft is not installed, or the model has no layers of these names.
    """
    if importlib.util.find_spec("peft") is None:
        raise RecipeError(
            "the recipe uses LoRA, and the package peft is not installed",
            LORA_EXTRA,
        )
    import peft  # noqa: PLC0415 - optional

    linear = torch.nn.Linear
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, linear)]
    # Some routers are linear layers that return more than a product; parts of some models are never run.
    used = used_parameters(model) or set(model.parameters())
    skip = [n for n, m in layers if type(m).forward != linear.forward or m.weight not in used]
    targets: str | list[str]
    if isinstance(config.target_modules, tuple):
        targets = list(config.target_modules)
    else:
        targets = "all-linear" if language_model else [n for n, _ in layers]
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        exclude_modules=skip or None,
        task_type="CAUSAL_LM" if language_model else None,
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise RecipeError(
            f"LoRA cannot be added to this model: {str(error).splitlines()[0]}", "Check lora.target_modules"
        ) from error
    if language_model:
        _refuse_head(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    if language_model and getattr(model, "supports_gradient_checkpointing", False):
        # Recomputed layers must see an input that needs a gradient; the frozen embedding gives none.
        model.enable_input_require_grads()


def _refuse_head(model: Any) -> None:
    """Refuse an adapter on the output head or a tied embedding: scoring reads their weight directly."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415 - optional

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    for module in (head, embeddings):
        if isinstance(module, BaseTunerLayer) and (
            module is head or module.weight is getattr(head, "weight", 0)
        ):
            raise RecipeError(
                "LoRA cannot be added to the output head, nor to the embedding that shares its weight",
                "Remove it from lora.target_modules",
            )


def merge_lora(model: Any) -> None:
    """Merge the adapters into the weights and remove them: the model is a plain one afterwards.

    Raises:
        ValueError: a merged weight is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415 - optional

    # Innermost first: fused experts carry a wrapper for each of their weights, one inside the other.
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(True)
