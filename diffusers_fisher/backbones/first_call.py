"""Checks of a pipeline's first evaluation: whether one step of its call stands for the steps of a run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only, tree_structure

from ..errors import UnsupportedError
from ..features import is_compiled, watch_outputs
from .echo import EchoScheduler
from .stock_calls import shallow_copy

if TYPE_CHECKING:
    from .base import Backbone

CALL_STEPS = 3
"""Number of steps that a call is told, by which some compute a schedule. The scheduler makes one step all the same."""

PROBE_STEPS = 4
"""Number of steps of the run that is compared with a single step: another one, for calls that depend on it."""

SAME = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative difference of two evaluations at one point by rounding, at most; for other dtypes 1e-4."""

ADVICE = (
    "Differentiate its runs with an estimator that needs no denoiser, such as DirectFisher(), by a loss of "
    "`trajectory.final_sample`; or use a text-to-image pipeline over the same components."
)
"""What a message advises where a pipeline's call is no function of its latents."""


def check_sample(backbone: Backbone, scheduler: EchoScheduler, latents: torch.Tensor) -> None:
    """Refuses a call whose first step is not taken from the `latents` that the call was given.

    Raises:
        UnsupportedError: the call changes the latents or their layout, or steps a second kind of samples beside them.
    """
    sample = scheduler.samples[0]
    if sample.shape != latents.shape:
        raise UnsupportedError(
            f"{backbone.name} changes the layout of its latents within its call: it was given "
            f"{tuple(latents.shape)}, and its network's output has {tuple(scheduler.outputs[0].shape)}, so it is no "
            f"function of samples of one layout. {ADVICE}"
        )
    if not _are_same(sample, latents, latents.dtype):
        raise UnsupportedError(
            f"{backbone.name} changes the `latents` of its call (it scales them, or adds an image) before the first "
            f"step of its scheduler, so it can't be evaluated at a run's samples. {ADVICE}"
        )
    if any(copied.outputs for copied in scheduler.copies):
        raise UnsupportedError(
            f"{backbone.name} denoises a second kind of samples beside its latents, such as sound, on which the "
            f"network's output depends: the latents alone don't determine it. {ADVICE}"
        )


class RecordedNetworks:
    """Records the evaluations of networks in one call, and replays them in another one without an evaluation.

    Args:
        networks: denoising networks of a pipeline by name. Compiled ones are left out: they don't call hooks.
    """

    def __init__(self, networks: Mapping[str, torch.nn.Module]):
        self.networks = {name: network for name, network in networks.items() if not is_compiled(network)}
        self._evaluations: list[tuple[str, object, object]] = []  # name, inputs and output

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records the evaluations that this thread makes inside the block."""
        with contextlib.ExitStack() as stack:
            for name, network in self.networks.items():
                stack.enter_context(watch_outputs(network, functools.partial(self._record, name)))
            yield

    def _record(self, name: str, inputs: object, output: object) -> None:
        self._evaluations.append((name, _detached(inputs), _detached(output)))

    def compare_steps(
        self, backbone: Backbone, output: torch.Tensor, scheduler: EchoScheduler, run: Callable[..., object]
    ) -> None:
        """Compares the recorded call with a run of several steps that all are at the same sample and timestep.

        Args:
            output: model output of the recorded call.
            scheduler: scheduler of several steps that return their sample.
            run: calls the pipeline on a scheduler, with the networks that are its keywords.

        Raises:
            UnsupportedError: the call changes the latents between its steps, or the network's output depends on the
                step's place in the run.
        """
        place, differences = [0, 0], []  # step, and evaluation within the step

        def replay(network_name: str, *args: object, **kwargs: object) -> object:
            step = len(scheduler.outputs)
            place[:] = step, place[1] + 1 if step == place[0] else 1
            if place[1] > len(self._evaluations):
                raise _step_error(backbone, step, "evaluates its network more often than")
            name, inputs, result = self._evaluations[place[1] - 1]
            error = _step_error(backbone, step, "gives its network other inputs than")
            if name != network_name or _shapes(inputs) != _shapes((args, kwargs)):
                raise error
            if not _are_same_inputs(inputs, (args, kwargs), backbone.dtype):
                differences.append(error)
            return _detached(result)

        with torch.no_grad():
            run(scheduler, **self._with_forward(replay))
        first = scheduler.samples[0]
        for sample in scheduler.samples:
            if not _are_same(sample, first, backbone.dtype):
                change = float((sample - first).norm() / first.norm())
                raise UnsupportedError(
                    f"{backbone.name} returned other latents than its scheduler's step, by {change:.2g} of their "
                    f"size: it blends them after the step, or a callback changed them. {ADVICE}"
                )
        if differences:
            raise differences[0]
        for step, other in enumerate(scheduler.outputs):
            if not _are_same(other, output, backbone.dtype):
                raise _step_error(backbone, step, "makes another model output than")

    def replayed(self) -> dict[str, torch.nn.Module]:
        """Returns networks that return the recorded outputs in their order, whatever their inputs are."""
        outputs = iter(self._evaluations)
        return self._with_forward(lambda name, *args, **kwargs: _detached(next(outputs)[2]))

    def _with_forward(self, forward: Callable[..., object]) -> dict[str, torch.nn.Module]:
        """Returns shallow copies of the networks whose call is `forward`, which gets the network's name first."""
        empty: dict[str, dict] = {name: {} for name in ("_forward_pre_hooks", "_forward_hooks")}
        return {
            name: shallow_copy(network, forward=functools.partial(forward, name), **empty)
            for name, network in self.networks.items()
        }


def _step_error(backbone: Backbone, step: int, difference: str) -> UnsupportedError:
    return UnsupportedError(
        f"{backbone.name} acts by the step's index within a run, which a single evaluation does not have: at one "
        f"sample and timestep, step {step} of {PROBE_STEPS} {difference} a single step. Leave out what acts by the "
        f"step, such as a guidance interval. {ADVICE}"
    )


def random_state(arguments: dict[str, Any], device: torch.device) -> Callable[[], None]:
    """Returns a function that restores the present state of the random generators that a call may draw from."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    passed = arguments.get("generator")
    generators += passed if isinstance(passed, list) else [passed] if passed is not None else []
    states = [(generator, generator.get_state()) for generator in generators]

    def restore() -> None:
        for generator, state in states:
            generator.set_state(state)

    return restore


def _detached(tree: object) -> object:
    """Returns nested containers with copies of their tensors, without a graph."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), tree)


def _shapes(tree: object) -> list[torch.Size]:
    return [leaf.shape for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _are_same_inputs(left: object, right: object, dtype: torch.dtype) -> bool:
    """Returns whether nested containers of equal shapes have equal numbers, texts and tensors."""
    if tree_structure(left) != tree_structure(right):
        return False
    return all(
        _are_same(one, other, dtype)
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        else type(one) is type(other) and (not isinstance(one, (bool, int, float, str)) or one == other)
        for one, other in zip(tree_leaves(left), tree_leaves(right), strict=True)
    )


def _are_same(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> bool:
    """Returns whether two tensors differ by the rounding of networks in `dtype` at most."""
    if left.shape != right.shape:
        return False
    left, right = left.detach().double(), right.detach().double()
    return bool((left - right).norm() <= SAME.get(dtype, 1e-4) * right.norm()) or not bool(right.isfinite().all())
