"""A tiny model of scenes with large random weights: its distributions are far from uniform."""

from pathlib import Path

import pytest
import torch

from dpo_core.models.config import ModelConfig, ScratchConfig
from dpo_core.models.load import convert, load_model, load_tokenizer
from dpo_core.models.save import save_checkpoint


@pytest.fixture(scope="session")
def scenes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    shape = ScratchConfig(layers=1, hidden_size=16, heads=2)
    convert(ModelConfig(name="package:dpo_core.images.scenes_model", scratch=shape), folder / "new")
    model = load_model(folder / "new")
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint(model, load_tokenizer(folder / "new"), folder / "model")
    return folder / "model"
