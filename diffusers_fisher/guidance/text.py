"""The prompts' embedding as a variable that guidance optimises."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..backbones import PipelineDenoiser
from ..backbones.stock_calls import restore_attributes
from ..errors import InputError, UnsupportedError
from ..fisher.estimator import FisherEstimator
from ..fisher.operator import FisherOperator
from ..noise import DenoisingState, expand


class TextEmbedding:
    """Holds the prompts' embedding, the first entry of `encode_prompt`'s result, as a variable of several denoisers.

    Its gradient is that of the network, by automatic differentiation: no estimator of the diffusion Fisher knows how
    the noise depends on the text. Cost: one evaluation with a graph per step of the backward pass, and its backward.

    Attributes:
        value: (B, tokens, width) float32 or wider, from the first encoding on.
        gradient: gradient of the loss with respect to `value`, summed over the steps; None before the first step.
    """

    def __init__(self) -> None:
        self._value: torch.Tensor | None = None
        self._prompt: tuple[object, int] | None = None
        self.gradient: torch.Tensor | None = None

    @property
    def value(self) -> torch.Tensor:
        if self._value is None:
            raise InputError("The prompts have not been encoded yet: run the pipeline first.")
        return self._value

    @value.setter
    def value(self, value: torch.Tensor) -> None:
        self._value = value

    def attach(self, denoiser: PipelineDenoiser) -> None:
        """Puts the variable in the place of the prompts' embedding in all of `denoiser`'s evaluations.

        Raises:
            UnsupportedError: the denoiser's pipeline encodes no prompts.
        """
        if not denoiser.backbone.encodes_prompts:
            raise UnsupportedError(
                f"{denoiser.backbone.name} encodes no prompts, so there is no text embedding to optimise; optimise "
                "the noise, or a control."
            )
        denoiser.substitute = self._substitute

    def _substitute(self, encoding: tuple, prompt: object, prompt_embeds: torch.Tensor | None) -> tuple:
        """Returns the result of `encode_prompt` with the variable in the place of the embedding.

        The first call sets the variable to the embedding. Raises `UnsupportedError` for a list of embeddings.
        """
        source = prompt, id(prompt_embeds)
        if not isinstance(encoding[0], torch.Tensor):
            raise UnsupportedError(
                "The pipeline's `encode_prompt` returns a list of embeddings, of which there is no one tensor to "
                "optimise; optimise the noise, or a control."
            )
        if self._value is None:
            self._prompt = source
            self._value = encoding[0].detach().to(torch.promote_types(encoding[0].dtype, torch.float32), copy=True)
        elif source != self._prompt:
            return encoding  # of negative prompts, where a call encodes them by themselves (Flux)
        return (self._value.to(encoding[0].dtype), *encoding[1:])


class TextGradientEstimator(FisherEstimator):
    """Gives the products of `estimator`, each of which also adds to the text's gradient."""

    def __init__(self, estimator: FisherEstimator, text: TextEmbedding, denoiser: PipelineDenoiser):
        self.estimator = estimator
        self.text = text
        self.text_denoiser = denoiser
        self.uses_whole_run = estimator.uses_whole_run

    @property
    def components(self) -> dict[str, FisherEstimator]:
        return {"estimator": self.estimator}

    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> _TextOperator:
        return _TextOperator(self, state, lambda: self.estimator(state, endpoint=endpoint))

    def through_run(self, gradient: torch.Tensor, states: Sequence[DenoisingState]) -> torch.Tensor:
        return self.estimator.through_run(gradient, states)


class _TextOperator(FisherOperator):
    """Adds to the text's gradient in products with the output's Jacobian, which trajectories take.

    All other products are the estimator's own.
    """

    def __init__(self, parent: TextGradientEstimator, state: DenoisingState, operator: Callable[[], FisherOperator]):
        super().__init__(state)
        self._parent = parent
        self._operator = operator  # a function, because some estimators evaluate the denoiser to make an operator

    def covariance(self, v: torch.Tensor) -> torch.Tensor:
        return self._operator().covariance(v)

    def output_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        parent, state = self._parent, self.state
        with torch.enable_grad():
            # The sample asks for a graph in any case: without it the pipeline would be called under no_grad.
            sample = state.sample.detach().requires_grad_()
            text = parent.text.value.detach().requires_grad_()
            with restore_attributes(parent.text, "_value"):
                parent.text.value = text
                model_input = expand(state.input_scale, sample) * sample
                output = parent.text_denoiser.model_output(model_input, state.known_timestep)
        text_gradient, sample_gradient = torch.autograd.grad(output, (text, sample), v.to(output.dtype))
        parent.text.gradient = text_gradient if parent.text.gradient is None else parent.text.gradient + text_gradient
        if parent.estimator.uses_backward_pass:
            return sample_gradient.to(v.dtype)  # the same graph also gives the estimator's product
        return self._operator().output_jacobian(v)
