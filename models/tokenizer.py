"""Tokenizers of checkpoints, as the fast tokenizers of transformers."""

from pathlib import Path
from typing import TYPE_CHECKING

from jaxprune.models import _gguf, _gguf_tokenizer
from jaxprune.models._safetensors import read_json
from jaxprune.models.checkpoint import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(source: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer that belongs to a checkpoint.

    A folder's `tokenizer.json` is read by transformers; the metadata of a GGUF file, and a folder that only has SentencePiece's
    `tokenizer.model`, are assembled with the library `tokenizers`.

    Args:
      source: see `resolve`.

    Raises:
      FileNotFoundError: the folder has neither file, or ChatGLM's, which only its own code reads.
      ValueError: a file that cannot be read, or a kind of tokenizer that is not supported.
    """
    path = resolve(source)
    if path.is_file():
        return _gguf_tokenizer.assemble(_gguf_tokenizer.from_gguf(path, _gguf.open_header(path).metadata))
    if (path / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        file = path / "tokenizer.json"
        if not {"model", "added_tokens"} <= read_json(file).keys():
            raise ValueError(f"{file}: not a tokenizer of the library tokenizers; copy or download it again")
        return PreTrainedTokenizerFast.from_pretrained(path)
    if (named := _class_of(path)).startswith("ChatGLM"):
        raise FileNotFoundError(
            f"{path}: no tokenizer.json, and {named} is Python code of the checkpoint, which is not run here; copy the "
            "tokenizer.json of the same vocabulary into the folder, or give token ids as FILE.npy instead of text"
        )
    if (path / "tokenizer.model").is_file():
        return _gguf_tokenizer.assemble(_gguf_tokenizer.from_sentencepiece(path))
    raise FileNotFoundError(f"{path}: no tokenizer.json and no tokenizer.model; copy the tokenizer's files into the folder")


def _class_of(folder: Path) -> str:
    file = folder / "tokenizer_config.json"
    return str(read_json(file).get("tokenizer_class")) if file.is_file() else ""
