"""What a method is: a noise, a divergence that the noise pays, and a rule that says when a weight is dead."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vardrop.errors import InvalidValueError
from vardrop.noise import Layout, MultiplicativeNoise, Noise, Place

RuleName = Literal["log_alpha", "magnitude", "snr"]
NUMBERS = {"int": (int, "a whole number"), "float": (int | float, "a number")}
"""What a field annotated as a number may hold, and in words."""
LARGEST_LOG = 40.0
"""Greatest first value of a log std or a log alpha: their squares and products are still float32 numbers."""


@dataclass(frozen=True)
class Paper:
    """The source of a method."""

    key: str
    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def bibtex(self) -> str:
        """A BibTeX entry."""
        return (
            f"@misc{{{self.key},\n  title = {{{self.title}}},\n  author = {{{self.authors}}},\n"
            f"  year = {{{self.year}}},\n  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}}\n}}"
        )


@dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen value with documented hyper-parameters and its paper's defaults.

    A subclass says :meth:`noise` and, where it has one, :meth:`kl`, :meth:`score` and :meth:`project`. Names, the
    command line and the conformance tests follow from the class.
    """

    paper: ClassVar[Paper]
    follows: ClassVar[type[Method] | None] = None
    """The method of the stage before this one, if there is one."""
    by_ensemble: ClassVar[bool] = False
    """Whether a trained net may know nothing in a quiet pass, so that only :func:`vardrop.predict` shows its worth."""
    kl_is_short: ClassVar[bool] = False
    """Whether a weight's KL is a divergence of few enough operations to be worth compiling with its noise."""

    @classmethod
    def command_name(cls) -> str:
        """The method's name on the command line: ``SparseVD`` is ``sparse-vd``."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__).lower()

    @classmethod
    def one_line(cls) -> str:
        """The first sentence of the method's docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]

    @property
    def on_units(self) -> bool:
        """Whether the noise is a gate on the units of a layer, rather than on its weights."""
        return False

    def papers(self, parameter: str) -> tuple[Paper, ...]:
        """The sources of what this method is on the weight of a layer that is called `parameter`."""
        return (self.paper,)

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        """A fresh noise for a layer with this `weight`, whose axes are told by `layout`."""
        raise NotImplementedError(f"{type(self).__name__} must make a noise")

    def continues(self, noise: Noise, first: Noise) -> None:
        """Hands what the noise of the stage before has learned to the fresh `noise`, in a method that follows one."""

    def kl(self, noise: Noise, weight: Tensor) -> Tensor:
        """What the noise pays, summed over all live elements, in nats: a scalar in float32 or better."""
        return torch.zeros((), device=weight.device)

    def price(self, noise: Noise, weight: Tensor) -> Tensor:
        """What the objective counts for the noise: its KL, where the method does not weigh it."""
        return self.kl(noise, weight)

    def score(self, noise: Noise, weight: Tensor) -> Tensor | None:
        """Float64 scores of the shape of the mask, live where ``>= cutoff(threshold)``; ``None``: nothing ever dies."""
        return None

    def cutoff(self, threshold: float | None = None) -> float:
        """The least score that lives, for the method's own threshold or for another one."""
        raise InvalidValueError(f"{type(self).__name__} has no pruning rule, so it has no threshold")

    def step(self, noise: Noise, weight: Tensor, epoch: int) -> None:
        """What a baseline does once for each training loss, such as moving its mask.

        `epoch` counts from 0, and is negative where nobody has begun one.
        """

    @property
    def steps(self) -> bool:
        """Whether it does anything for each training loss, so that marks move as training goes."""
        return type(self).step is not Method.step

    def learning_rates(self, noise: Noise) -> dict[str, float]:
        """Learning rates, by name, of those parameters of the noise that have one of their own."""
        return {}

    def project(self, noise: Noise) -> None:
        """Puts the noise's parameters back into their domain, in place: before each training pass and each count."""


@dataclass(frozen=True)
class WeightMethod(Method):
    """A method on weights, with a choice of pruning rule and of where the sample is drawn.

    Args:
        rule: ``"log_alpha"`` kills a weight at ``log alpha >= threshold``, ``"magnitude"`` at
            ``|mean| < threshold``, ``"snr"`` at ``|mean| / std <= threshold``; ``None`` kills none.
        threshold: ``None`` for the rule's usual one (3, 0.01 and 1).
        sampling: ``"local"`` reparameterisation or the ``"weight"`` itself, once per minibatch; recurrent layers,
            embeddings and attention always draw the weight.
    """

    default_thresholds: ClassVar[dict[str, float]] = {"log_alpha": 3.0, "magnitude": 1e-2, "snr": 1.0}
    rule: RuleName | None = None
    threshold: float | None = None
    sampling: Literal["local", "weight"] = "local"

    def __post_init__(self) -> None:
        if self.rule is None and self.threshold is not None:
            raise InvalidValueError(
                f"{type(self).__name__}(rule=None, threshold={self.threshold}): a threshold needs a rule"
            )
        if self.rule is not None:
            check_choice(self, "rule", tuple(self.default_thresholds))
        check_choice(self, "sampling", ("local", "weight"))
        _check_numbers(self)

    def score(self, noise: Noise, weight: Tensor) -> Tensor | None:
        if self.rule is None:
            return None
        if self.rule == "magnitude":
            return weight.detach().double().abs()
        log_alpha = noise.log_alpha(weight)
        if log_alpha is None or (isinstance(noise, MultiplicativeNoise) and noise.sharing == "layer"):
            return None  # what all weights share tells nothing of any
        log_alpha = log_alpha.detach().double()
        return -log_alpha if self.rule == "log_alpha" else torch.exp(-0.5 * log_alpha)

    def cutoff(self, threshold: float | None = None) -> float:
        if self.rule is None:
            return super().cutoff(threshold)
        value = threshold if threshold is not None else self.threshold
        value = self.default_thresholds[self.rule] if value is None else value
        if math.isnan(value):
            raise InvalidValueError(f"threshold={value}: must be a number")
        if self.rule == "magnitude":
            return value
        return math.nextafter(-value if self.rule == "log_alpha" else value, math.inf)


@dataclass(frozen=True)
class GateMethod(Method):
    """A method on units: a gate multiplies the inputs or the outputs of each layer.

    Args:
        place: ``"input"`` or ``"output"`` of the layer; ``"auto"`` gates the outputs of convolutions, one value for
            each channel, and the inputs of linear layers. Of the last layer of an ``nn.Sequential`` it gates the
            inputs always, since its outputs are the net's.
        threshold: bound of the method's own rule, named in its first sentence.
        kl_factor: what each unit's KL is multiplied by in the objective, at least 0: above 1 in the layers whose units
            cost most FLOPs, as in the variants of arXiv:1705.07283 and arXiv:1805.10896 that save more of them.
    """

    place: Literal["auto", "input", "output"] = "auto"
    threshold: float = 0.0
    kl_factor: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_choice(self, "place", ("auto", "input", "output"))
        _check_numbers(self)
        check_range(self, "kl_factor", above=0.0, below=1e6, closed=True)

    def price(self, noise: Noise, weight: Tensor) -> Tensor:
        return self.kl_factor * self.kl(noise, weight)

    @property
    def on_units(self) -> bool:
        return True

    def placed(self, weight: Tensor) -> Place:
        """The place for a layer with this `weight`."""
        if self.place != "auto":
            return self.place
        return "output" if weight.dim() > 2 else "input"

    def cutoff(self, threshold: float | None = None) -> float:
        value = self.threshold if threshold is None else threshold
        if math.isnan(value):
            raise InvalidValueError(f"threshold={value}: must be a number")
        return value


def _check_numbers(method: Method) -> None:
    for known in fields(method):
        value = getattr(method, known.name)
        check_number(method, known)
        if isinstance(value, float) and math.isnan(value):
            raise InvalidValueError(f"{type(method).__name__}({known.name}={value}): must be a number, not NaN")
        if isinstance(value, float) and math.isinf(value) and known.name.startswith("init_"):
            raise InvalidValueError(f"{type(method).__name__}({known.name}={value}): a first value must be finite")
        if known.name.startswith("init_log_") and value > LARGEST_LOG:
            raise InvalidValueError(
                f"{type(method).__name__}({known.name}={value}): must be at most {LARGEST_LOG:g}, for a finite variance"
            )


def check_number(owner: object, field: Field[Any]) -> None:
    """Raises where a `field` of `owner`, a dataclass, that is annotated as a number holds something else."""
    value, kind = getattr(owner, field.name), str(field.type).removesuffix(" | None")
    if kind not in NUMBERS or (value is None and kind != field.type):
        return
    number, wanted = NUMBERS[kind]
    if not isinstance(value, number) or isinstance(value, bool):
        raise InvalidValueError(f"{type(owner).__name__}({field.name}={value!r}): must be {wanted}")


def check_choice(method: Method, field: str, allowed: tuple[str, ...]) -> None:
    """Raises unless the value of `field` is among those `allowed`, naming method, field and value."""
    value = getattr(method, field)
    if value not in allowed:
        raise InvalidValueError(
            f"{type(method).__name__}({field}={value!r}): must be one of {', '.join(map(repr, allowed))}"
        )


def check_on(method: WeightMethod, on: str) -> None:
    """Raises unless `on` is ``"weights"``, or ``"inputs"`` without what only weights have: a rule and a sampling."""
    check_choice(method, "on", ("weights", "inputs"))
    if on == "inputs" and (method.rule is not None or method.sampling != "local"):
        raise InvalidValueError(
            f"{type(method).__name__}(on='inputs', rule={method.rule!r}, sampling={method.sampling!r}): "
            "noise on inputs takes rule=None and sampling='local'"
        )


def check_range(
    method: Method,
    field: str,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    closed: bool = False,
    closed_below: bool | None = None,
) -> None:
    """Raises unless ``above < value < below``, naming method, field and value.

    Equality is allowed if `closed`, or only with `below` as `closed_below` says.
    """
    check_number(method, next(known for known in fields(method) if known.name == field))
    value, closed_below = getattr(method, field), closed if closed_below is None else closed_below
    if not ((above <= value if closed else above < value) and (value <= below if closed_below else value < below)):
        low, high = ("<=" if end else "<" for end in (closed, closed_below))
        raise InvalidValueError(
            f"{type(method).__name__}({field}={value}): must satisfy {above:g} {low} {field} {high} {below:g}"
        )


class Listing(dict[str, type[Method]]):
    """Methods by their names on the command line; printed with one line each."""

    @classmethod
    def of(cls, room: Mapping[str, Any]) -> Listing:
        """The methods among the names of a package."""
        found = [value for value in room.values() if isinstance(value, type) and issubclass(value, Method)]
        return cls({method.command_name(): method for method in found if method is not Method})

    def __repr__(self) -> str:
        widest = max(map(len, self))
        return "\n".join(f"{name:{widest}}  {method.one_line()}" for name, method in self.items())
