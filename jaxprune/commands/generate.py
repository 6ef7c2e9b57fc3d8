"""`jaxprune generate`: what the model writes."""

import dataclasses
import sys
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jaxprune import _hosts, folder
from jaxprune.commands import _devices
from jaxprune.commands._common import ModelName, Output, flag, stage
from jaxprune.commands._compute import Compute
from jaxprune.models import decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a text, with a key/value cache.

    Example: jaxprune generate smollm2 --prompt "The capital of France is"
    """

    model: ModelName
    prompt: Annotated[str, flag("TEXT")]
    """Text to continue."""
    max_new_tokens: Annotated[int, flag("N")] = 64
    """Stop after this many tokens, or at the end of the text."""
    temperature: Annotated[float, flag("T")] = 0.0
    """0 takes the most likely token each time; more is more random."""
    seed: Annotated[int, flag("N")] = 0
    """Of the sampling."""
    devices: _devices.Devices = _devices.Devices()
    hosts: _devices.Hosts = _devices.Hosts()
    compute: Compute = Compute()
    output: Output = Output()


def run(args: Generate) -> dict[str, Any]:
    """Prints the continuation as it comes."""
    with stage("loading", {}):
        model = _devices.load_any(args.devices, args.model)
    begin = time.monotonic()
    written: list[int] = []
    shown = ""
    for text, tokens in continuations(model, args.prompt, args.max_new_tokens, args.temperature, args.seed):
        if text.startswith(shown) and not text.endswith("\ufffd") and _hosts.first():
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
        written = tokens
    if _hosts.first():
        print(text[len(shown) :])
    seconds = time.monotonic() - begin
    return {
        "tokens": len(written),
        "seconds, compilation included": round(seconds, 2),
        "texts": {"prompt": args.prompt, "continuation": text},
    }


def continuations(model: folder.Model, prompt: str, max_new_tokens: int, temperature: float = 0.0, seed: int = 0):
    """Yields the text so far and its tokens, after each token.

    Raises:
      ValueError: the prompt has no tokens, or an argument is out of range.
    """
    check_prompt(prompt)
    ids = model.tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError("prompt: it has no tokens; give at least one word")
    stream = decode.stream(
        model.params, model.cfg, jnp.asarray([ids], jnp.int32), max_new_tokens=max_new_tokens, temperature=temperature,
        key=jax.random.key(seed), eos_ids=model.cfg.eos_ids,
    )  # fmt: skip
    tokens: list[int] = []
    for token in stream:
        tokens.append(int(token[0]))
        yield model.tokenizer.decode(tokens, skip_special_tokens=True), tokens


def check_prompt(prompt: str) -> None:
    """Raises ValueError if the command line held bytes that are not UTF-8, which Python hands on as lone surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt: not UTF-8 at character {error.start}; convert it to UTF-8") from None


def continuation(model: folder.Model, prompt: str, max_new_tokens: int) -> str:
    """The most likely continuation of a prompt."""
    *_, (text, _) = continuations(model, prompt, max_new_tokens)
    return text
