"""How fast a model reads a prompt and writes."""

import statistics
import time

import jax
import numpy as np

from jaxprune.models import Config, Params, decode
from jaxprune.models._mesh import on_host


def latency(params: Params, cfg: Config, *, prompt: int = 128, new: int = 32, repeats: int = 5) -> dict[str, float | int]:
    """Measures greedy generation with a key/value cache, one sequence, after a warm-up that compiles.

    Args:
      params, cfg: the model.
      prompt: tokens of the prompt.
      new: tokens that are written, one step each.
      repeats: times that all is measured.

    Returns:
      `prefill_tokens_per_second`: prompt tokens over the median time of reading the prompt. `decode_tokens_per_second`: one
      over the median time of a step. `prompt_tokens`, `new_tokens`: as given.

    Raises:
      ValueError: a number is less than 1.
    """
    for name, value in dict(prompt=prompt, new=new, repeats=repeats).items():
        if value < 1:
            raise ValueError(f"{name}: {value} given; it must be at least 1")
    tokens = np.arange(prompt, dtype=np.int32)[None] % cfg.vocab
    reading, writing = [], []
    for repeat in range(repeats + 1):
        cache = jax.block_until_ready(decode.init_cache(cfg, 1, prompt + new, params["embed"].dtype))
        begin = time.perf_counter()
        logits, cache = decode.prefill(params, tokens, cfg, cache)
        token = on_host(logits.argmax(-1)).astype(np.int32)
        times = [time.perf_counter() - begin]
        for i in range(new):
            begin = time.perf_counter()
            logits, cache = decode.step(params, token, prompt + i, cfg, cache)
            token = on_host(logits.argmax(-1)).astype(np.int32)
            times.append(time.perf_counter() - begin)
        if repeat:
            reading.append(times[0])
            writing += times[1:]
    return dict(
        prefill_tokens_per_second=prompt / statistics.median(reading),
        decode_tokens_per_second=1 / statistics.median(writing),
        prompt_tokens=prompt,
        new_tokens=new,
    )
