"""Our models as lm-evaluation-harness (lm_eval) calls them. lm_eval is an extra, so its class is made when it is asked for."""

import functools
import json
from collections.abc import Sequence
from typing import Any

from jaxprune import folder
from jaxprune._continuations import continuations
from jaxprune._log_likelihoods import log_likelihoods
from jaxprune._progress import progress

NEUTRAL = dict(top_k=(None, 0, -1), top_p=(None, 1), num_beams=(None, 1))  # what sampling does without them
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def need_lm_eval() -> None:
    """Raises ValueError if lm_eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError("lm_eval: is not installed, and tasks need it; pip install 'jaxprune[eval]'") from None


def model_class() -> type:
    """The subclass of `lm_eval.api.model.TemplateLM` that is registered as `jaxprune`.

    Its arguments, which `--model_args` gives:

    - `pretrained`: a folder, a `.gguf` file, `smollm2`, a name on the Hugging Face hub, or a `folder.Model`.
    - `dtype`: `float32`, `bfloat16`, or `auto` for what the file holds.
    - `batch_size`: most texts at a time, or `auto` for as many as make 4096 tokens. What stands in `--model_args` wins.
    - `max_length`: tokens that the model reads at most; those of its configuration unless given.
    - `add_bos_token`: put a BOS in front of each text or do not; what the tokenizer does unless given.
    - `device`, `max_batch_size`: not used. JAX chooses the device, see `JAX_PLATFORMS`.

    Texts are encoded as by the model `hf` of lm_eval, an empty context is the BOS (or the EOS where there is none), texts that
    are too long lose their beginning. Greedy generation is the same in any batch: that of `hf` with a batch of one.

    Raises:
      ValueError: lm_eval is not installed.
    """
    need_lm_eval()
    return _registered()


@functools.cache  # lm_eval takes a name once
def _registered() -> type:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class JaxpruneLM(TemplateLM):
        def __init__(
            self,
            pretrained,
            dtype=None,
            batch_size="auto",
            max_length=None,
            add_bos_token=None,
            device=None,
            max_batch_size=None,
        ):
            super().__init__()
            self.batch = _count("batch_size", None if str(batch_size).startswith("auto") else batch_size)
            limit = _count("max_length", max_length)
            loaded = isinstance(pretrained, folder.Model)
            self.model = pretrained if loaded else folder.load(str(pretrained), None if dtype == "auto" else dtype)
            self.max_length = limit or self.model.cfg.max_positions
            self.tokenizer = self.model.tokenizer
            self.add_bos_token = add_bos_token

        @classmethod
        def create_from_arg_obj(cls, arg_dict, additional_config=None):
            return cls(**{k: v for k, v in (additional_config or {}).items() if v is not None} | arg_dict)

        @property
        def eot_token_id(self):
            return self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self):
            return prefix_of(self.tokenizer)

        @property
        def tokenizer_name(self):
            return self.tokenizer.name_or_path.replace("/", "__")

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            ends = dict(add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt)
            return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **ends)

        def tok_encode(self, string, add_special_tokens=None, **_):
            return encoded(self.tokenizer, string, self.add_bos_token if add_special_tokens is None else add_special_tokens)

        def _loglikelihood_tokens(self, requests, **_):
            pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
            out: list[Any] = [None] * len(requests)
            found = log_likelihoods(
                self.model.params, self.model.cfg, pairs, max_length=self.max_length, batch=self.batch, progress=progress
            )
            for i, score, best in found:
                out[i] = (score, best)
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], out[i])
            return out

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            windows: list[Any] = []
            whose = []
            for i, request in enumerate(requests):
                tokens = self.tok_encode(request.args[0])
                for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                    windows.append((None, *make_disjoint_window(pair)))
                    whose.append(i)
            out = [0.0] * len(requests)
            for i, (score, _) in zip(whose, self._loglikelihood_tokens(windows), strict=True):
                out[i] += score
            for request, score in zip(requests, out, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
            return out

        def generate_until(self, requests, disable_tqdm=False):
            alike: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
            asked = [(where, generation(requests[where[0]].args[1])) for where in alike.values()]
            model, out = self.model, [""] * len(requests)
            for where, options in asked:
                prompts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in where]
                eos_ids = tuple({*model.cfg.eos_ids, *([] if self.eot_token_id is None else [self.eot_token_id])})
                options |= dict(eos_ids=eos_ids, max_length=self.max_length, batch=self.batch, progress=progress)
                for j, text in continuations(model.params, model.cfg, self.tokenizer, prompts, **options):
                    out[where[j]] = text
                    self.cache_hook.add_partial("generate_until", requests[where[j]].args, text)
            return out

    return register_model("jaxprune")(JaxpruneLM)


def _count(name: str, value: Any) -> int | None:
    if value is not None and (not str(value).isdecimal() or int(value) < 1):
        raise ValueError(f"{name}: {value!r} given; it must be a whole number of at least 1")
    return None if value is None else int(value)


def prefix_of(tokenizer: Any) -> int:
    """The token that stands for an empty context: the BOS, or the EOS of a tokenizer without one.

    Raises:
      ValueError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(
        "tokenizer: it has neither BOS nor EOS, and a text without a context needs one; set bos_token in its files"
    )


def encoded(tokenizer: Any, text: str, bos: bool | None) -> list[int]:
    """Tokens of a text.

    Args:
      tokenizer: of transformers.
      text: of any length. One that begins with the BOS (or with the EOS of a tokenizer without one) gets no other.
      bos: put a BOS in front or do not; None leaves special tokens to the tokenizer.

    Raises:
      ValueError: a BOS is asked for and the tokenizer has none.
    """
    begins = text.startswith(tokenizer.decode(prefix_of(tokenizer)))
    tokens = tokenizer.encode(text, add_special_tokens=bos is None and not begins, verbose=False)
    if not bos or begins:
        return tokens
    if tokenizer.bos_token_id is None:
        raise ValueError("add_bos_token: True given, but the tokenizer has no BOS; leave it out")
    return [tokenizer.bos_token_id, *tokens]


def generation(asked: dict[str, Any]) -> dict[str, Any]:
    """`until`, `max_new_tokens` and `temperature` from the `generation_kwargs` of a task of lm_eval.

    Raises:
      ValueError: sampling that is not supported is asked for.

    >>> generation({"until": "Q:", "do_sample": False, "temperature": 0.7, "max_gen_toks": 5})
    {'until': ['Q:'], 'max_new_tokens': 5, 'temperature': 0.0}
    """
    rest = dict(asked)
    until = rest.pop("until", None) or []
    limits = [found for name in LENGTHS if (found := rest.pop(name, None)) is not None]
    temperature = float(rest.pop("temperature", None) or 0)
    if not rest.pop("do_sample", temperature > 0):
        temperature = 0.0
    for name, value in rest.items():
        ignored = name in ("top_k", "top_p") and not temperature  # the most likely token is the same with any
        if not ignored and value not in NEUTRAL.get(name, ()):
            raise ValueError(
                f"generation_kwargs: {name}={value!r} given; allowed are until, {LENGTHS[0]}, do_sample and temperature"
            )
    texts: Sequence[str] = [until] if isinstance(until, str) else list(until)
    return dict(until=[t for t in texts if t], max_new_tokens=int(limits[0]) if limits else 256, temperature=temperature)
