"""Models for other programs: each profile says what it cannot hold, and writes what it can."""

from collections.abc import Callable
from typing import NamedTuple

from jaxprune.models.config import LlamaConfig
from jaxprune.models.export import gguf, hf, hf_custom, hf_padded, maxtext

FLOATS = ("float32", "bfloat16", "float16")


class Profile(NamedTuple):
    """A format that another program reads.

    Attributes:
      summary: one line: what reads it.
      problems: why a model of this shape cannot be written so, one sentence each, with what would make it fit; none if it can.
      write: (path, params, cfg, tokenizer) and for GGUF the type -> notes for the user, one line each, or None. Not atomic.
      predicted_bytes: (cfg, type) -> bytes of the numbers in it.
      types: how numbers can be stored, the default first.
      suffix: of the file; empty for a folder.
      uniform: all layers have the same widths.
      multiple_of: what MLP widths should be multiples of.
    """

    summary: str
    problems: Callable[[LlamaConfig], list[str]]
    write: Callable[..., list[str] | None]
    predicted_bytes: Callable[[LlamaConfig, str], int]
    types: tuple[str, ...] = FLOATS
    suffix: str = ""
    uniform: bool = False
    multiple_of: int = 1


PROFILES = {
    "hf": Profile(
        "transformers, vLLM and others, as a plain LLaMA, Mistral or Qwen2; equal layers",
        hf.problems, hf.write, hf.predicted_bytes, uniform=True,
    ),
    "hf-custom": Profile(
        "transformers with trust_remote_code=True; any widths",
        hf_custom.problems, hf_custom.write, hf_custom.predicted_bytes,
    ),
    "hf-padded": Profile(
        "whatever reads hf; any widths, filled up with zeros: saves nothing",
        hf_padded.problems, hf_padded.write, hf_padded.predicted_bytes,
    ),
    "gguf": Profile(
        "llama.cpp; any widths",
        gguf.problems, gguf.write, gguf.predicted_bytes, gguf.TYPES, ".gguf", multiple_of=gguf.BLOCK,
    ),
    "maxtext": Profile(
        "MaxText and other JAX trainers, as parameters stacked over layers in an Orbax checkpoint; equal layers",
        maxtext.problems, maxtext.write, maxtext.predicted_bytes, uniform=True,
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
