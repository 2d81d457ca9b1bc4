"""The parts of a guidance's runs: denoisers, the estimator, the text embedding, the denoiser of a regulariser."""

from __future__ import annotations

from typing import Any

from ..backbones import Backbone, PipelineDenoiser
from ..backbones.networks import check_no_cache, check_weights
from ..backbones.unguided import switched_off
from ..denoiser import Denoiser
from ..errors import InputError
from ..fisher.estimator import FisherEstimator
from .decoders import Decoder
from .regulariser import LikelihoodRegulariser
from .text import TextEmbedding, TextGradientEstimator


class DenoisersAndEstimator:
    """Holds the denoisers of the sampling run and of the backward pass, the estimator, and the text embedding."""

    def __init__(
        self, backbone: Backbone, arguments: dict[str, Any], estimator: FisherEstimator,
        adjoint_guidance_scale: float | None, optimises_text: bool,
    ):  # fmt: skip
        self.arguments = arguments  # of the sampling runs
        arguments = {name: value for name, value in arguments.items() if not name.startswith("callback")}
        self.forward = self.backward = PipelineDenoiser(backbone, **arguments)
        scale = adjoint_guidance_scale
        if scale is not None and scale != arguments.get("guidance_scale", scale):
            self.backward = PipelineDenoiser(backbone, **{**arguments, "guidance_scale": scale})
            estimator = estimator.at_guidance_scale(scale)
        self.estimator = estimator.bind(self.backward)
        check_weights(backbone.network if self.estimator.needs_graph or optimises_text else None)
        if self.estimator.denoisers:
            purpose = "a run is another function than the denoiser of its backward pass"
            check_no_cache(backbone.name, backbone.network, purpose)
        denoisers = (self.forward, self.backward, *self.estimator.denoisers)
        # By identity, so that each counts once; plain functions don't count their calls.
        counters = {id(each): each for each in denoisers if isinstance(each, Denoiser)}
        self._calls_before = [(each, each.num_calls) for each in counters.values()]
        self.text = TextEmbedding() if optimises_text else None
        if self.text is not None:
            for denoiser in (self.forward, self.backward):
                self.text.attach(denoiser)
            self.estimator = TextGradientEstimator(self.estimator, self.text, self.backward)

    def calls(self) -> int:
        """Returns the evaluations since this object was made, without those of the sampling runs."""
        return sum(each.num_calls - before for each, before in self._calls_before)


def without_guidance(
    denoisers: DenoisersAndEstimator, backbone: Backbone, arguments: dict[str, Any], estimator: FisherEstimator,
    num_iterations: int, climbing_steps: int,
) -> DenoisersAndEstimator:  # fmt: skip
    """Returns the denoisers and the estimator of runs without classifier-free guidance.

    Args:
        denoisers: those of the guided runs.
        num_iterations: `num_unguided_iterations`.
        climbing_steps: largest number that is allowed.

    Raises:
        InputError: another number, runs without such guidance, or what belongs to the guided runs alone.
    """
    if not 0 < num_iterations <= climbing_steps:
        raise InputError(
            f"`num_unguided_iterations` is {num_iterations}; allowed: 0 to {climbing_steps}, the guidance steps that "
            "no full run takes."
        )
    if not denoisers.forward.is_guided:
        raise InputError(
            f"`num_unguided_iterations` is {num_iterations}, but the runs of {backbone.name} have no classifier-free "
            "guidance that could be left out. Leave the option out, or pass a `guidance_scale` above 1."
        )
    if estimator.denoiser is not None or denoisers.text is not None:
        cause = "the estimator has a denoiser of its own" if denoisers.text is None else '`optimise` has "text"'
        raise InputError(
            f"`num_unguided_iterations` is {num_iterations}, but {cause}, which belongs to the guided runs. Leave one "
            "of them out."
        )
    off = switched_off(type(backbone.pipe), backbone.parameters, backbone.config)
    return DenoisersAndEstimator(backbone, {**arguments, **off}, estimator, None, False)


class Pull:
    """Holds a regulariser and its denoiser, which has the runs' prompts and no guidance, as a density must have."""

    def __init__(self, regulariser: LikelihoodRegulariser, backbone: Backbone, arguments: dict[str, Any]):
        off = switched_off(type(backbone.pipe), backbone.parameters, backbone.config)
        call_arguments = {name: value for name, value in arguments.items() if not name.startswith("callback")}
        self._regulariser, self._denoiser = regulariser, PipelineDenoiser(backbone, **{**call_arguments, **off})
        regulariser.check_level(self._denoiser)

    def regularised(self, decode: Decoder) -> Decoder:
        return self._regulariser.regularised(decode, self._denoiser)

    def calls(self) -> int:
        """Returns the evaluations so far."""
        return self._denoiser.num_calls
