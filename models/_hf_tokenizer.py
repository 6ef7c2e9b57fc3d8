"""The tokenizer of a folder, in files that transformers 4 and 5 read alike."""

import json
from pathlib import Path
from typing import Any

from jaxprune.models._safetensors import read_json


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Writes what `tokenizer.save_pretrained` writes, with the names that both versions know in `tokenizer_config.json`.

    Of what transformers 5 writes, version 4 has no class `TokenizersBackend`, stops at a list of `extra_special_tokens`, and
    may clean up spaces where the file does not say.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = read_json(file)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.setdefault("clean_up_tokenization_spaces", bool(tokenizer.clean_up_tokenization_spaces))
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
