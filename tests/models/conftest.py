"""Tiny models of transformers, the oracle, and their folders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=None,
    initializer_range=0.2,
)


@pytest.fixture
def oracle():
    """Builds a random model: (family, settings) -> a torch model in float32 whose norms and biases are random as well."""

    def make(family: str = "llama", **settings: Any) -> Any:
        import torch
        import transformers

        from jaxprune.models._families import FAMILIES

        kind = getattr(transformers, FAMILIES[family].architecture)
        torch.manual_seed(0)
        model = kind(kind.config_class(**SIZES | settings)).float().eval()
        with torch.no_grad():
            for name, x in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    x.copy_(torch.randn(x.shape) * 0.2 + float("norm" in name))
        return model

    return make


@pytest.fixture
def logits_of():
    """(torch model, tokens) -> float32[b, t, v]."""

    def run(model: Any, tokens: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():
            return model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.float().numpy()

    return run


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, (2, 24), dtype=np.int32)


@pytest.fixture
def saved(tmp_path: Path):
    """Saves a torch model into a new folder."""

    def save(model: Any, **options: Any) -> Path:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder, **options)
        return folder

    return save
