"""The base class of all estimators."""

from __future__ import annotations

import abc
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Self

import torch

from ..denoiser import Denoiser
from ..errors import InputError
from ..noise import DenoisingState
from .agreement import ModelFunction, check_states
from .calibration import TraceCalibration
from .operator import FisherOperator

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


class FisherEstimator(abc.ABC):
    """Base class of estimators, which make a `FisherOperator` of a denoising state. Derive your own from it.

    An estimator must implement `__call__` alone. Set `needs_denoiser = True` if its products evaluate `self.denoiser`.
    An estimator that calls others names them in `components`. This class then binds their denoisers and reports their
    needs and their costs:

        class AverageFisher(FisherEstimator):
            def __init__(self, first, second):
                self.first, self.second = first, second

            @property
            def components(self):
                return {"first": self.first, "second": self.second}

            def __call__(self, state, endpoint=None):
                return 0.5 * (self.first(state, endpoint) + self.second(state, endpoint))

    Attributes:
        denoiser: the denoiser that the products evaluate; None if they evaluate none, or until `bind` sets it.
        needs_denoiser: whether the products evaluate `denoiser`.
        compares_output: whether the denoiser is compared with the model outputs of a run; see `check_outputs`.
        uses_whole_run: whether the gradient of a run is right only after `through_run`, so that the estimator can't
            be used for a single step.
        uses_backward_pass: whether `output_jacobian` of the operators is the backward pass of one evaluation of the
            denoiser. A caller that runs this pass for another gradient may take the product from there.
    """

    denoiser: Denoiser | ModelFunction | None = None
    needs_denoiser: bool = False
    compares_output: bool = True
    uses_whole_run: bool = False
    uses_backward_pass: bool = False

    @abc.abstractmethod
    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> FisherOperator:
        """Returns the Fisher's operator at `state`.

        Args:
            state: the noisy samples (B, ...), their noise level and the model's output.
            endpoint: (B, ...), the clean end of the run; None if it is not known.
        """

    @property
    def components(self) -> Mapping[str, FisherEstimator]:
        """The estimators that this one calls, by the names of the attributes that hold them."""
        return {}

    @property
    def needs_graph(self) -> bool:
        """Whether products differentiate the denoiser, so that a state evaluated with a graph saves an evaluation."""
        return any(component.needs_graph for component in self.components.values())

    @property
    def calls_per_state(self) -> int:
        """Number of denoiser evaluations per operator, without those of exact traces."""
        return sum(component.calls_per_state for component in self.components.values())

    @property
    def calls_per_product(self) -> int:
        """Number of denoiser evaluations per product with the operator."""
        return sum(component.calls_per_product for component in self.components.values())

    @property
    def default_num_probes(self) -> int | None:
        """Default number of probes per level for the trace of a likelihood; None: the exact trace, without probes."""
        numbers = {component.default_num_probes for component in self.components.values()}
        return None if numbers == {None} else 1

    @property
    def models_trace(self) -> bool:
        """Whether the trace comes from a trained model, whose error no probe shows. Likelihoods check such a trace."""
        return any(component.models_trace for component in self.components.values())

    @property
    def holds_condition(self) -> bool:
        """Whether the estimator was given a condition's vectors, so that it is right for that condition alone."""
        return any(component.holds_condition for component in self.components.values())

    @property
    def calibration(self) -> TraceCalibration | None:
        """Errors of the trace's model on held-out images; None where there is no model, or nothing is known."""
        return None

    @property
    def description(self) -> str:
        """Short description of the estimator for results."""
        return type(self).__name__

    @property
    def denoisers(self) -> list[Denoiser | ModelFunction]:
        """The denoisers that the estimator and its components evaluate."""
        result = [] if self.denoiser is None else [self.denoiser]
        return result + [denoiser for component in self.components.values() for denoiser in component.denoisers]

    @property
    def lacks_denoiser(self) -> bool:
        """Whether the estimator or a component needs a denoiser and has none: products raise an error until `bind`."""
        lacks_own = self.needs_denoiser and self.denoiser is None
        return lacks_own or any(component.lacks_denoiser for component in self.components.values())

    def bind(self, denoiser: Denoiser) -> FisherEstimator:
        """Returns a copy with `denoiser` wherever one is missing, or the same object if none is missing.

        Raises:
            InputError: a component belongs to another denoiser (see `check_denoiser`).
        """
        estimator = self.map_components(lambda component: component.bind(denoiser))
        takes_denoiser = self.needs_denoiser and self.denoiser is None
        return estimator.replace(denoiser=denoiser) if takes_denoiser else estimator

    def select_samples(self, rows: torch.Tensor, select: Callable[[Denoiser], Denoiser]) -> FisherEstimator:
        """Returns the estimator of some of a batch's samples.

        An estimator that holds something else per sample than its denoiser must select that too.

        Args:
            rows: (n,) int64, the samples' places in the batch.
            select: returns the denoiser of these samples, see `Denoiser.select_samples`.
        """
        estimator = self.map_components(lambda component: component.select_samples(rows, select))
        return estimator.replace(denoiser=select(self.denoiser)) if isinstance(self.denoiser, Denoiser) else estimator

    def check_denoiser(self, denoiser: Denoiser | DiffusionPipeline) -> None:
        """Checks that the estimator and its components belong to `denoiser`.

        Raises:
            InputError: a component was made for another denoiser; the message says what differs.
        """
        for component in self.components.values():
            component.check_denoiser(denoiser)

    def check_outputs(self, states: Sequence[DenoisingState]) -> None:
        """Checks that the denoiser, and those of the components, give the model outputs of a run's `states`.

        The library calls it once per run, before the first product. Cost: one evaluation at each of the first, the
        middle and the last state. An estimator whose products evaluate the denoiser at the state itself may compare
        there (`diffusers_fisher.fisher.agreement`).

        Raises:
            InputError: the denoiser is another function than the run's.
        """
        if self.needs_denoiser and self.compares_output:
            check_states(self.denoiser, states)
        for component in self.components.values():
            component.check_outputs(states)

    def without_comparison(self) -> Self:
        """Returns the estimator whose denoiser is not compared with the model outputs of a run."""
        estimator = self.map_components(lambda component: component.without_comparison())
        return estimator.replace(compares_output=False) if self.needs_denoiser and self.compares_output else estimator

    def at_guidance_scale(self, guidance_scale: float) -> FisherEstimator:
        """Returns the estimator for runs at another guidance scale than its denoiser's `guidance_scale`.

        Raises:
            InputError: a denoiser has another guidance scale.
        """
        for denoiser in self.denoisers:
            scale = denoiser.guidance_scale if isinstance(denoiser, Denoiser) else None
            if scale not in (None, guidance_scale):
                raise InputError(
                    f"`adjoint_guidance_scale` is {guidance_scale:g}, and the estimator's denoiser has the guidance "
                    f"scale {scale:g}. Pass the denoiser's own."
                )
        return self.without_model_output().without_comparison()

    def without_model_output(self) -> FisherEstimator:
        """Returns the estimator with products that take no difference from the state's own `model_output`.

        It is for states of a run whose output does not come from `denoiser`, for example one with another guidance
        scale.
        """
        return self.map_components(lambda component: component.without_model_output())

    def through_run(self, gradient: torch.Tensor, states: Sequence[DenoisingState]) -> torch.Tensor:
        """Returns the gradient at a run's noise, (B, ...), from the result of the products at the run's `states`.

        The library calls it once per differentiated run, without a graph. The base class returns `gradient` unchanged.
        """
        return gradient

    def map_components(self, change: Callable[[FisherEstimator], FisherEstimator]) -> Self:
        """Returns a copy with `change(component)` for each component, or the same object if no component changes."""
        components = self.components
        changes = {name: change(component) for name, component in components.items()}
        is_same = all(changes[name] is component for name, component in components.items())
        return self if is_same else self.replace(**changes)

    def replace(self, **attributes: object) -> Self:
        """Returns a shallow copy with other `attributes`. The object itself does not change."""
        result = copy.copy(self)
        for name, value in attributes.items():
            object.__setattr__(result, name, value)  # a frozen dataclass refuses setattr
        return result

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self)).parameters.values()
        names = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        arguments = [f"{name}={_short_text(getattr(self, name))}" for name in names if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(arguments)})"


def check_estimator(estimator: object) -> FisherEstimator:
    """Returns `estimator`.

    Raises:
        InputError: `estimator` is not an instance of `FisherEstimator`.
    """
    if isinstance(estimator, FisherEstimator):
        return estimator
    raise InputError(
        f"The estimator is {estimator!r}; pass a Fisher estimator such as DirectFisher() or AutodiffFisher(denoiser), "
        "as an instance. A class of your own derives from diffusers_fisher.FisherEstimator."
    )


def _short_text(value: object) -> str:
    """Returns the `repr` of short values, the name of functions, and the class of other objects."""
    if value is None or isinstance(value, (bool, int, float, str, FisherEstimator)):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"Tensor(shape={tuple(value.shape)})"
    return value.__name__ if inspect.isroutine(value) else f"{type(value).__name__}(...)"
