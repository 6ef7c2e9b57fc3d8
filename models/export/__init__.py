"""Models for other programs: each profile says what it cannot hold, and writes what it can."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune.models.checkpoint import FLOATS
from jaxprune.models.config import LlamaConfig
from jaxprune.models.export import gguf, hf, hf_custom, hf_padded, maxtext
from jaxprune.models.types import Params


class Profile(NamedTuple):
    """A format that another program reads.

    Attributes:
      summary: one line: what reads it.
      problems: why a model of this shape cannot be written so, one sentence each, with what would make it fit; none if it can.
      write: (path, params, cfg, tokenizer, type) -> notes for the user, one line each. Not atomic.
      predicted_bytes: (cfg, type) -> bytes of the numbers in it.
      types: how numbers can be stored, the default first.
      suffix: of the file; empty for a folder.
      uniform: all layers have the same widths.
      multiple_of: what MLP widths should be multiples of.
    """

    summary: str
    problems: Callable[[LlamaConfig], list[str]]
    write: Callable[[Path, Params, LlamaConfig, Any, str], list[str]]
    predicted_bytes: Callable[[LlamaConfig, str], int]
    types: tuple[str, ...] = FLOATS
    suffix: str = ""
    uniform: bool = False
    multiple_of: int = 1


def _folder(write: Callable[[Path, Params, LlamaConfig, Any], None]) -> Callable[..., list[str]]:
    """A writer of folders, whose numbers are stored in the type that they have and which has nothing to note."""

    def in_its_type(path: Path, params: Params, cfg: LlamaConfig, tokenizer: Any, kind: str) -> list[str]:
        del kind
        write(path, params, cfg, tokenizer)
        return []

    return in_its_type


PROFILES = {
    "hf": Profile(
        "transformers, vLLM and others, as a plain LLaMA, Mistral or Qwen2; equal layers",
        hf.problems, _folder(hf.write), hf.predicted_bytes, uniform=True,
    ),
    "hf-custom": Profile(
        "transformers with trust_remote_code=True; any widths",
        hf_custom.problems, _folder(hf_custom.write), hf_custom.predicted_bytes,
    ),
    "hf-padded": Profile(
        "whatever reads hf; any widths, filled up with zeros: saves nothing",
        hf_padded.problems, _folder(hf_padded.write), hf_padded.predicted_bytes,
    ),
    "gguf": Profile(
        "llama.cpp; any widths",
        gguf.problems, gguf.write, gguf.predicted_bytes, gguf.TYPES, ".gguf", multiple_of=gguf.BLOCK,
    ),
    "maxtext": Profile(
        "MaxText and other JAX trainers, as parameters stacked over layers in an Orbax checkpoint; equal layers",
        maxtext.problems, _folder(maxtext.write), maxtext.predicted_bytes, uniform=True,
    ),
}  # fmt: skip

TYPES = tuple(dict.fromkeys(kind for profile in PROFILES.values() for kind in profile.types))


def find(name: str) -> Profile:
    """The profile of that name.

    Raises:
      ValueError: there is none.
    """
    if name not in PROFILES:
        raise ValueError(f"profile: {name!r} given; allowed are {', '.join(PROFILES)}")
    return PROFILES[name]
