"""Calibration text on the command line: its flags, and the tokens that they ask for."""

import dataclasses
from typing import Annotated, Any

import jax

from jaxprune import budgets, calibration_choice, data, folder, methods, pipeline
from jaxprune.commands._common import check_least, check_tokens, flag, say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Text that the scores are computed on."""

    calibration: Annotated[str, flag("SRC")] = "builtin"
    """A text file, FILE.jsonl:FIELD, hub:NAME[:CONFIG[:SPLIT[:FIELD]]], builtin (Python's documentation), self (sampled) or
    FILE.npy (integers, a sequence of token ids in each row; no tokenizer is needed)."""
    samples: Annotated[int | None, flag("N", "the method's own")] = None
    """Sequences."""
    length: Annotated[int | None, flag("T", "the method's own")] = None
    """Tokens in a sequence; of FILE.npy at most a row, to which the method's own length is cut."""
    calibration_sha256: Annotated[str | None, flag("HEX", "any text will do")] = None
    """Stop unless the calibration text has this SHA-256, as recorded in jaxprune.json."""
    candidates: Annotated[int, flag("N")] = 1
    """Draw this many sets and take the one whose pruned model diverges least from the dense one (NIRVANA)."""
    seed: Annotated[int, flag("N")] = 0
    """Of the calibration windows and of random numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How the weights that stay make up for those that go, in closed form."""

    reconstruct: Annotated[str | None, flag("NAME", "the method's own")] = None
    """none; least squares towards what the dense layer adds (dense; admm: by the iterations of Search for Efficient LLMs),
    towards what all units would add after the layers before are pruned (weights), or towards the dense model's residual stream
    (residual); a bias for the mean of what goes (bias)."""
    fit_samples: Annotated[int | None, flag("N", "the method's own")] = None
    """Sequences of calibration text that the weights are fitted on."""
    fit_length: Annotated[int | None, flag("T", "the method's own")] = None
    """Tokens in such a sequence."""


def check_fit(fit: Reconstruction, target: str | None) -> None:
    """Raises ValueError where tokens to fit on are asked for and there are none, or nothing is fitted."""
    check_least(fit, fit_samples=1, fit_length=2)
    for name in ("fit_samples", "fit_length"):
        if target is None and (number := getattr(fit, name)) is not None:
            raise ValueError(f"{name}: {number} given, but no weights are fitted; name a --reconstruct, or leave it out")


def calibration_tokens(
    flags: Calibration,
    fit: Reconstruction,
    settings: pipeline.Settings,
    model: folder.Model,
    target: str | None,
    *,
    by_method: bool = True,
    goal: budgets.Target | None = None,
) -> tuple[data.Calibration, Any]:
    """The calibration tokens that the flags ask for, each step's own, and those that weights are fitted on.

    Where the number of samples is the method's own, a shorter text gives fewer.

    Args:
      flags, fit: what the user asks for.
      settings: of the pruning.
      model: the model.
      target: what is reconstructed, or None, for which there are no tokens to fit on.
      by_method: the method says how many tokens weights are fitted on, where the flags do not.
      goal: see `pipeline.prune`.
    """
    calibration = _for_scores(flags, settings, model, goal)
    if target is None:
        return calibration, None
    own = by_method and flags.calibration != "self" and flags.samples is None and flags.length is None
    method = methods.find(settings.method)
    samples = fit.fit_samples or (method.fit_samples if own else 0)
    length = fit.fit_length or up_to_a_row(flags.calibration, method.fit_length if own else 0)
    if not (samples or length):
        return calibration, calibration.tokens
    default = calibration.tokens.shape
    found = draw(flags, model, samples or default[0], length or default[1], fit.fit_samples is None)
    return calibration, found.tokens


def _for_scores(
    flags: Calibration, settings: pipeline.Settings, model: folder.Model, goal: budgets.Target | None
) -> data.Calibration:
    method = methods.find(settings.method)
    samples = (method.samples if flags.samples is None else flags.samples) * settings.steps
    length = up_to_a_row(flags.calibration, method.length) if flags.length is None else flags.length
    check_least(flags, candidates=1)
    found = draw(flags, model, samples, length, flags.samples is None and settings.steps == 1)
    if flags.candidates > 1:
        found = _least_divergence(flags, settings, model, found, goal)
    if flags.calibration_sha256 is not None:
        data.check_sha256(flags.calibration_sha256, found.sha256, flags.calibration)
    return found


def up_to_a_row(source: str, length: int) -> int:
    """A method's own length, or the tokens in a row of a file of token ids if those are fewer."""
    return min(length, data.read_token_file(source).shape[1]) if data.is_token_file(source) else length


def _least_divergence(
    flags: Calibration,
    settings: pipeline.Settings,
    model: folder.Model,
    first: data.Calibration,
    goal: budgets.Target | None,
) -> data.Calibration:
    if settings.steps > 1 or methods.find(settings.method).scorer is None or methods.find(settings.method).needs == "weights":
        raise ValueError(f"candidates: {flags.candidates} given; that is for methods that score a text once; leave it out")
    samples, length = first.tokens.shape

    def drawn(i: int) -> data.Calibration:
        return draw(dataclasses.replace(flags, seed=flags.seed + i), model, samples, length, False)

    sets = [first, *map(drawn, range(1, flags.candidates))]
    held_out = drawn(flags.candidates).tokens
    choice = calibration_choice.choose(
        [found.tokens for found in sets],
        lambda tokens: pipeline.gates(model.params, model.cfg, tokens, settings, goal=goal),
        model.params,
        model.cfg,
        held_out[: pipeline.divisor(held_out.shape)],
    )
    say(f"divergences {', '.join(f'{kl:.4f}' for kl in choice.kl)}: set {choice.best} is taken")
    return sets[choice.best]


def draw(flags: Calibration, model: folder.Model, samples: int, length: int, or_fewer: bool) -> data.Calibration:
    """Windows of the calibration text, which the model can read."""
    found = data.token_blocks(
        flags.calibration,
        model.tokenizer,
        samples=samples,
        length=length,
        seed=flags.seed,
        or_fewer=or_fewer,
        sampler=lambda n, t, seed: data.self_blocks(model.params, model.cfg, samples=n, length=t, key=jax.random.key(seed)),
    )
    check_tokens(found.tokens, model.cfg, flags.calibration)
    if len(found.tokens) < samples:
        say(f"note: {flags.calibration} has {len(found.tokens)} windows of {length} tokens, the method would take {samples}")
    return found


def described(calibration: data.Calibration, fit_tokens: Any = None) -> dict[str, Any]:
    """What the record says of calibration data."""
    samples, length = calibration.tokens.shape
    fit = {} if fit_tokens is None else dict(fit_samples=len(fit_tokens), fit_length=fit_tokens.shape[1])
    return dict(source=calibration.source, sha256=calibration.sha256, samples=samples, length=length) | fit
