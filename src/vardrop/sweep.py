"""The front of error against size: a search over the hyper-parameters of a method, on Optuna."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, get_type_hints

from vardrop.compress import Job, Listeners, compress, differing
from vardrop.errors import InvalidValueError, MissingExtraError, StorageError, TrainingError, VardropWarning
from vardrop.files import make_folder, replace_file
from vardrop.report import figures
from vardrop.settings import alternatives, value_of
from vardrop.train import Schedule
from vardrop.zoo import load_data

if TYPE_CHECKING:
    from optuna import Study, Trial

FRONT = "front.json"
PICTURE = "front.png"
REASON = "reason"
"""Why a trial gave no net, among what the study keeps of it."""
Against = Literal["compression", "flops"]
Value = bool | int | float | str | None


@dataclass(frozen=True)
class Range:
    """What a field may be: a number between two ends, on a log scale, `whole`, or neither; or one of several values."""

    low: float = math.nan
    high: float = math.nan
    log: bool = False
    choices: tuple[Value, ...] = ()
    whole: bool = False

    def suggest(self, trial: Trial, field: str) -> Value:
        """A value for `field` in this trial."""
        if self.choices:
            chosen: Any = trial.suggest_categorical(field, self.choices)
            return cast(Value, chosen)
        if self.whole:
            return trial.suggest_int(field, round(self.low), round(self.high), log=self.log)
        return trial.suggest_float(field, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Point:
    """A finished trial: where its run lies, what it tried, and what came of it on the validation data."""

    run: str
    values: dict[str, Any]
    error: float
    size: float


class _Stopped(BaseException):
    """Ctrl-C on its way through Optuna, which would take it for the failure of a trial."""


def parse_search(settings: Sequence[str], job: Job) -> dict[str, Range]:
    """The ranges that texts such as ``init_log_std=-8:-2``, ``kl_factor=0.1:10:log`` and ``rule=snr,magnitude`` name.

    Raises:
        InvalidValueError: there are none, a field is neither of the method nor of the schedule, or a range is empty.

    >>> from vardrop.sweep import parse_search
    >>> from vardrop.compress import Job
    >>> from vardrop.train import Schedule
    >>> parse_search(["kl_factor=0.1:10:log"], Job("lenet-5", "mnist", vd.ARD(), Schedule()))["kl_factor"].high
    10.0
    """
    known: dict[str, Any] = {}
    for part in (job.method, job.schedule):
        hints = get_type_hints(type(part))
        known |= {field.name: hints[field.name] for field in fields(part)}
    if not settings:
        raise InvalidValueError(f"nothing to search: give --search field=low:high with a field of: {', '.join(known)}")
    found = {}
    for setting in settings:
        field, sign, text = setting.partition("=")
        if not sign or field not in known:
            raise InvalidValueError(
                f"--search {setting!r}: must be field=low:high, field=low:high:log or field=one,two with a field of: "
                f"{', '.join(known)}"
            )
        try:
            found[field] = _range(text, known[field])
        except InvalidValueError as error:
            raise InvalidValueError(f"--search {setting!r}: {error}") from None
    return found


def sweep(
    job: Job,
    search: Mapping[str, Range],
    folder: Path,
    *,
    trials: int,
    against: Against = "compression",
    storage: str | None = None,
    listeners: Listeners | None = None,
    on_trial: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Runs `job` with other hyper-parameters until the study holds `trials` finished trials; gives its front.

    The front is the trials that no other beats in both: the error of the pruned net on the validation data, and its
    size. Each trial is a run in `folder` of its own. Started again, a study goes on, and a trial that was broken off
    is taken up from its checkpoint. Several processes, on several machines, may share one `storage` that is a server;
    the file in `folder` is for one process at a time.

    Args:
        job: what is run; must set validation data apart where the data set itself does not.
        search: what is varied, by field of the method or of the schedule.
        folder: where the runs, ``front.json`` and ``front.png`` go.
        trials: how many finished trials the study is to have; one whose loss diverges, or whose values do not go
            together, is finished too, on no front; a warning tells how many there were, and why.
        against: size by ``"compression"`` of weights, or by ``"flops"`` of the small net.
        storage: where Optuna keeps the study, a URL; an SQLite file in `folder` by default.
        listeners: told of the progress of each run.
        on_trial: told of each finished trial.

    Raises:
        InvalidValueError: no validation data, an unknown measure of size, or `trials` below 1.
        TrainingError: no trial gave a net.
        MissingExtraError: optuna or matplotlib is not installed.
        StorageError: `folder`, or `storage`, cannot be used, or holds a study of the same name that searches something
            else.
    """
    if trials < 1:
        raise InvalidValueError(f"trials={trials}: must be at least 1")
    if against not in get_args(Against):
        raise InvalidValueError(f"against={against!r}: must be one of {', '.join(get_args(Against))}")
    if job.validation < 1 and load_data(job.data, data_root=job.data_root).validation is None:
        raise InvalidValueError(
            f"validation={job.validation}: a search chooses by validation data, and {job.data} sets none apart itself: "
            "give at least 1"
        )
    figures.need()
    optuna = _optuna()
    make_folder(folder)
    study = _study(optuna, job, search, folder, against, storage)

    def lost(trial: Trial, error: Exception) -> Exception:
        trial.set_user_attr(REASON, str(error))
        return cast(Exception, optuna.TrialPruned(str(error)))

    def objective(trial: Trial) -> tuple[float, float]:
        chosen = {field: span.suggest(trial, field) for field, span in search.items()}
        run = folder / _run_name(chosen)
        try:
            tried = _with(job, chosen)
        except InvalidValueError as error:
            raise lost(trial, error) from error
        try:
            result = compress(tried, run, listeners=listeners)
        except TrainingError as error:
            raise lost(trial, error) from error
        except KeyboardInterrupt as stop:
            raise _Stopped from stop
        size = result["compacted"]["flops"] if against == "flops" else result["pruned"]["compression"]
        point = Point(run.name, chosen, result["pruned"]["valid_error"], size)
        trial.set_user_attr("run", run.name)
        on_trial(point)
        return point.error, point.size

    def keep(study: Study, trial: Any) -> None:
        _keep(folder, study, against)

    ends = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    enough = optuna.study.MaxTrialsCallback(trials, states=ends)
    if len(study.get_trials(states=ends)) < trials:
        try:
            study.optimize(objective, callbacks=[enough, keep])
        except _Stopped as stop:
            raise KeyboardInterrupt from stop
    _tell_of_the_lost(study)
    return _keep(folder, study, against)


def _tell_of_the_lost(study: Study) -> None:
    """Warns of trials that gave nothing, or raises where all did."""
    ended = [trial for trial in study.get_trials() if trial.state.is_finished()]
    reasons = [trial.user_attrs[REASON] for trial in ended if REASON in trial.user_attrs]
    if reasons:
        told = f"{len(reasons)} of {len(ended)} trials gave no net; the last because of {reasons[-1]}"
        if not study.best_trials:
            raise TrainingError(f"{told}; search where values go together and the loss stays finite")
        warnings.warn(told, VardropWarning, stacklevel=3)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("the search", "sweep") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(
    optuna: Any, job: Job, search: Mapping[str, Range], folder: Path, against: Against, storage: str | None
) -> Study:
    """The study, made or taken up.

    Raises:
        StorageError: there is one of this name that searches something else, or the storage is none.
    """
    from sqlalchemy import URL

    place = storage or str(URL.create("sqlite", database=str((folder / "study.db").resolve())))
    try:
        study: Study = optuna.create_study(
            study_name=f"{job.net} {job.data} {job.method.command_name()} {against}",
            storage=place,
            directions=["minimize", "minimize" if against == "flops" else "maximize"],
            load_if_exists=True,
        )
    except Exception as error:  # each kind of storage has errors of its own
        reason = str(error).partition("\n")[0]
        raise StorageError(f"storage {place} cannot keep the study: {type(error).__name__}: {reason}") from error
    searched = {field: str(span) for field, span in search.items()}
    wanted = json.loads(json.dumps({**job.config, "search": searched}))
    stored = study.user_attrs.get("job", wanted)
    if stored != wanted:
        raise StorageError(
            f"{storage or folder} holds another study of this name (it differs in {differing(stored, wanted)}): "
            "choose another folder"
        )
    study.set_user_attr("job", wanted)
    seed = job.schedule.seed + len(study.get_trials()) if storage is None else None  # workers must not try the same
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=storage is not None)
    if storage is None:
        for broken_off in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(broken_off.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(broken_off.params)
    return study


def _with(job: Job, chosen: Mapping[str, Any]) -> Job:
    """`job` with other values in its method and its schedule."""
    own = {field.name for field in fields(job.method)} - {field.name for field in fields(Schedule)}
    schedule = {field: value for field, value in chosen.items() if field not in own}
    method = {field: value for field, value in chosen.items() if field in own}
    return replace(job, method=replace(job.method, **method), schedule=replace(job.schedule, **schedule))


def _run_name(chosen: Mapping[str, Any]) -> str:
    """The same for the same values, so that a trial given again finds its checkpoint."""
    return f"run-{hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]}"


def _range(text: str, hint: Any) -> Range:
    """The range that `text` names for a field of the type `hint`."""
    low, *ends = text.split(":")
    if not ends:
        return Range(choices=tuple(_value(part, hint) for part in text.split(",")))
    high, *log = ends
    span = Range(_end(low, hint), _end(high, hint), log=log == ["log"], whole=int in alternatives(hint))
    if not span.low < span.high or (log and (not span.log or span.low <= 0)):
        raise InvalidValueError("must be low:high with low below high, and low above 0 where :log follows")
    return span


def _end(text: str, hint: Any) -> float:
    number = _value(text, hint)
    if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
        raise InvalidValueError(f"{text} must be a finite number")
    return float(number)


def _value(text: str, hint: Any) -> Value:
    try:
        return value_of(text, hint)
    except InvalidValueError as error:
        raise InvalidValueError(f"{text} {error}") from None


def _point(trial: Any) -> Point:
    error, size = trial.values
    return Point(trial.user_attrs["run"], dict(trial.params), error, size)


def _keep(folder: Path, study: Study, against: Against) -> list[Point]:
    """Writes what the finished trials of `study` gave, draws it, and gives its front."""
    points = [_point(trial) for trial in study.get_trials() if trial.state.name == "COMPLETE"]
    front = sorted((_point(trial) for trial in study.best_trials), key=lambda point: point.error)
    stored = {"against": against, "front": [vars(point) for point in front], "all": [vars(point) for point in points]}
    replace_file(folder / FRONT, lambda path: path.write_text(json.dumps(stored, indent=1)))
    figure = figures.trade_off(
        [(point.size, point.error) for point in points], [(point.size, point.error) for point in front], against
    )
    figures.keep(figure, folder / PICTURE)
    return front
