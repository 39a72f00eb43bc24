"""Check that a model from outside the run has the same tokenizer and chat template as the run's model."""

import tempfile
from pathlib import Path

from dpo_core.errors import RecipeError
from dpo_core.jobs.files import CompareTokensJob, write_job
from dpo_core.models.folder import is_denoiser
from dpo_core.models.remote_code import trusted_digests
from dpo_core.system import digest_file
from tasks.stages.base import Context
from tasks.stages.job import watch

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_OTHER = ("config.json", "model.safetensors.index.json", "metrics.jsonl")


def require_same_tokens(context: Context, base: Path, other: Path, name: str, remedy: str) -> None:
    """Refuse a model that would tokenise the rows differently from the run's model.

    Raises:
        RecipeError: its tokenizer, chat template or end-of-answer tokens differ.
    """
    if is_denoiser(base) != is_denoiser(other):
        kinds = "a language model" if is_denoiser(base) else "a diffusion model"
        raise RecipeError(f"{name} is {kinds}, and the run's model is not", remedy)
    if is_denoiser(base):
        return  # images are compared, not tokens
    if _token_files(base) == _token_files(other):
        return
    with tempfile.TemporaryDirectory(dir=context.workspace, prefix=".compare-tokens-") as folder:
        job = CompareTokensJob(
            work=folder,
            ranks=context.ranks,
            trusted_code=tuple(trusted_digests()),
            model=str(base),
            other=str(other),
        )
        launcher = context.launcher(f"compare tokens {folder}", one_rank=True)
        result = watch("compare-tokens", launcher, write_job(job), 1, context.stop)
    if result["differing"]:
        raise RecipeError(
            f"{name} has another {result['differing'][0]} than the run's model, so the same token ids stand "
            "for other texts in the two",
            remedy,
        )


def _token_files(folder: Path) -> dict[str, str]:
    """Digests of a checkpoint's files that can decide its tokens."""
    return {
        file.name: digest_file(file)
        for file in sorted(folder.iterdir())
        if file.is_file() and file.suffix not in _WEIGHTS and file.name not in _OTHER
    }
