"""A study of Optuna in an SQLite file, which goes on where it was killed as if it had not been."""

import contextlib
import json
import typing
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

if typing.TYPE_CHECKING:
    import optuna

NAME = "jaxprune"
Trials: TypeAlias = list[Any]  # finished `optuna.trial.FrozenTrial`s, in order


def minimize(
    path: Path,
    objective: Callable[["optuna.trial.Trial", Trials], float],
    first: dict[str, Any],
    *,
    trials: int,
    startup: int,
    seed: int,
    settings: dict[str, Any],
    on_trial: Callable[[int, "optuna.trial.FrozenTrial"], None],
) -> Trials:
    """Asks a tree-structured Parzen estimator for trials until so many are finished.

    Random numbers of a trial depend on `seed` and on how many are finished before it. A trial that a kill left running is
    marked as failed, which the estimator does not read, and asked for again.

    Args:
      path: file of the study, for one process at a time; made if it is not there.
      objective: (trial, those finished before it) -> loss. What it keeps in the trial is there when the study goes on.
      first: parameters of trial 0.
      trials: in all.
      startup: trials with random parameters, trial 0 included.
      seed: of random numbers.
      settings: what the trials depend on, JSON; a study with others is refused.
      on_trial: called with the number of each trial that was run, and the trial.

    Returns:
      All finished trials.

    Raises:
      ValueError: Optuna is missing; the file is no study, or one of other settings.
      OSError: the file cannot be written.
    """
    optuna = _optuna()
    state = optuna.trial.TrialState

    with _opened(path) as study:
        _check(path, study, json.loads(json.dumps(settings)))
        for left in study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            study.tell(left.number, state=state.FAIL)
        done = study.get_trials(deepcopy=False, states=(state.COMPLETE,))
        if not done and not study.get_trials(deepcopy=False, states=(state.WAITING,)):
            study.enqueue_trial(first)
        while len(done) < trials:
            study.sampler = optuna.samplers.TPESampler(
                seed=int(np.random.SeedSequence([seed, len(done)]).generate_state(1)[0]),
                n_startup_trials=startup,
                multivariate=False,
                constant_liar=False,
            )
            trial = study.ask()
            done.append(study.tell(trial, objective(trial, done)))
            on_trial(len(done) - 1, done[-1])
        return done


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ValueError("optuna: is not installed, and this search needs it; pip install 'jaxprune[search]'") from None
    return optuna


@contextlib.contextmanager
def _opened(path: Path) -> Iterator["optuna.Study"]:
    """The study, with Optuna's own messages off."""
    optuna = _optuna()
    path = path.expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:  # says what is wrong with a place that cannot be written
        file.seek(0)
        if (start := file.read(16)) and start != b"SQLite format 3\0":
            raise ValueError(f"{path}: is no SQLite file; name the file of a study, or one that is not there yet")
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = None
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///file:{urllib.parse.quote(str(path))}?uri=true")
        yield optuna.create_study(storage=storage, study_name=NAME, direction="minimize", load_if_exists=True)
    except optuna.exceptions.StorageInternalError as error:
        raise OSError(f"{path}: {error.__cause__ or error}") from error
    finally:
        optuna.logging.set_verbosity(verbosity)
        if storage is not None:
            storage.remove_session()
            storage.engine.dispose()


def _check(path: Path, study: "optuna.Study", settings: dict[str, Any]) -> None:
    old = study.user_attrs.get("settings")
    if old is None:
        if study.get_trials(deepcopy=False):
            raise ValueError(f"{path}: the study does not say what it was made with; name another file")
        study.set_user_attr("settings", settings)
        return
    absent = "absent"
    changed = [
        f"{key} was {old.get(key, absent)}, now {settings.get(key, absent)}"
        for key in sorted(old.keys() | settings.keys())
        if old.get(key, absent) != settings.get(key, absent)
    ]
    if changed:
        raise ValueError(
            f"{path}: a study with other settings ({'; '.join(changed)}); repeat those to go on, or name another file"
        )
