"""The output of a guidance."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import BaseOutput

from ..outputs import OutputTable

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

COMPLETED = "completed"


@dataclasses.dataclass
class GuidanceOutput(OutputTable, BaseOutput):
    """Holds the best image of every sample, and the history of the guidance.

    Args:
        images: PIL images, array or tensor, by `output_type`.
        rewards: (runs, B) float64, rewards of the image that each step started from; the last row is the end. There
            are guidance steps + 1 runs, fewer where the guidance stopped early.
        best_rewards: (B,) float64, the largest reward of each column.
        latents: (B, ...) float32 initial noise of the best images; pass it as `latents` to get them again. Samplers
            that draw noise at every step need the same noise: see "Reproducing the images" in docs/guidance.md.
        gradient_norms: (steps, B) float64, norm of the reward's gradient with respect to what is optimised.
        seconds: (runs,) float64, wall time of each sampling run with its gradient.
        num_denoiser_calls: evaluations of the denoiser by the sampling runs and the estimator together.
        nsfw_content_detected: one flag per image, where the pipeline has a safety checker; empty otherwise.
        initial_images: images of the first run, without guidance, in the form of `images` (black where a safety
            checker flags them, as `images` are).
        held_out_rewards: (runs, B) float64, rewards of the same images by the reward that is not optimised; no rows
            without such a reward. NaN where it was not finite, which the log says once and which changes nothing else.
        shell_distances: (runs, B) float64, distance of the noise's norm from the norm of Gaussian noise, in standard
            deviations of the latter. Beyond about 3 the model was not trained on such noise.
        whiteness: (runs, B) float64, p-values of the noise: how often white noise is as far from its own mean power in
            every band of frequencies, and from channels without correlation. Uniform for white noise; below 0.01 the
            model was not trained on such noise.
        noise_band_scores: (runs, B, C, bands) float64, the powers in standard deviations: see `NoiseWhiteness`.
        noise_correlation_scores: (runs, B, pairs of channels) float64, the correlations in standard deviations.
        status: "completed", or why the guidance stopped early.
        best_runs: (B,) numbers of the runs that made the images, which are rows of `rewards`.
        prompt_embeds: (B, tokens, width) text embedding of the best images where it was optimised.
        controls: (B, steps, ...) tensors that were added to the model's output at every step for the best images,
            where they were optimised.
        num_cheap_runs: number of the first runs, and rows of `rewards`, that had `num_guidance_inference_steps`. The
            images and `best_rewards` are those of the later runs, `initial_images` those of the first.
        guidance_scheduler: class of the scheduler of the cheap runs; empty without any.
        cheap_rewards, full_rewards: (B,) float64, rewards of the best cheap run of every sample, and of the full run
            from the same noise; None without cheap runs.
        reordered: pairs of samples that `cheap_rewards` and `full_rewards` rank in different orders.
    """

    SAMPLE_COLUMNS = ("best_rewards", "best_runs")

    images: Any
    rewards: torch.Tensor
    best_rewards: torch.Tensor
    latents: torch.Tensor
    gradient_norms: torch.Tensor
    seconds: torch.Tensor
    num_denoiser_calls: int
    nsfw_content_detected: list[bool] = dataclasses.field(default_factory=list)
    initial_images: Any = None
    held_out_rewards: torch.Tensor | None = None
    shell_distances: torch.Tensor | None = None
    whiteness: torch.Tensor | None = None
    noise_band_scores: torch.Tensor | None = None
    noise_correlation_scores: torch.Tensor | None = None
    status: str = COMPLETED
    prompt_embeds: torch.Tensor | None = None
    controls: torch.Tensor | None = None
    best_runs: torch.Tensor | None = None
    num_cheap_runs: int = 0
    guidance_scheduler: str = ""
    cheap_rewards: torch.Tensor | None = None
    full_rewards: torch.Tensor | None = None
    reordered: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"Guidance of {len(self.best_rewards)} sample{'s' * (len(self.best_rewards) > 1)}, {self.status}",
            f"  reward    {float(self.rewards[0].mean()):.4g} before, {float(self.best_rewards.mean()):.4g} at its "
            f"best, on average, in {len(self.rewards)} runs",
        ]
        if self.cheap_rewards is not None and self.full_rewards is not None:
            pairs = f"; they rank {len(self.reordered)} pairs of samples differently" if self.reordered else ""
            lines.append(
                f"  cheap     {float(self.cheap_rewards.mean()):.4g} in runs of {self.guidance_scheduler}, "
                f"{float(self.full_rewards.mean()):.4g} in full runs of the same noise{pairs}"
            )
        if self.held_out_rewards is not None and len(self.held_out_rewards) and self.best_runs is not None:
            best = self.held_out_rewards.gather(0, self.best_runs[None])
            before = float(self.held_out_rewards[0].mean())
            lines.append(f"  held out  {before:.4g} before, {float(best.mean()):.4g} at the best reward")
        lines.append(f"  cost      {float(self.seconds.sum()):.1f} s, {self.num_denoiser_calls} denoiser calls")
        return "\n".join(lines)

    def to_pandas(self) -> pandas.DataFrame:
        """Returns a table with one row per run and sample: `run`, `sample`, `reward`, and the histories beside it."""
        import pandas

        runs, samples = self.rewards.shape
        columns: dict[str, Any] = {
            "run": torch.arange(runs).repeat_interleave(samples), "sample": torch.arange(samples).repeat(runs),
        }  # fmt: skip
        columns |= {name: values.flatten() for name, values in self._histories().items()}
        return pandas.DataFrame({name: values.tolist() for name, values in columns.items()})

    def plot(self) -> Figure:
        """Draws the reward of every sample by run, its mean, and the held-out reward where there is one."""
        from ..figures import make_figure

        names = [name for name in self._histories() if name.endswith("reward")]
        figure, row = make_figure(5 * len(names), 3.2, columns=len(names))
        for axes, name in zip(row, names, strict=True):
            values = self._histories()[name].numpy()
            axes.plot(values, color="0.8", linewidth=0.8)
            axes.plot(values.mean(1), color="C0", marker=".")
            axes.set(xlabel="run", ylabel=name)
        return figure

    def _histories(self) -> dict[str, torch.Tensor]:
        """Returns the numbers (runs, B) that there are, by name."""
        values = {
            "reward": self.rewards, "held_out_reward": self.held_out_rewards, "shell_distance": self.shell_distances,
            "whiteness": self.whiteness,
        }  # fmt: skip
        return {name: each for name, each in values.items() if each is not None and each.shape == self.rewards.shape}
