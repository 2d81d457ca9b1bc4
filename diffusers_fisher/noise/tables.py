"""Tables of log(sigma/alpha) over the training timesteps, in float64."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch


def log_noise_to_signal_of(config: Mapping[str, Any], alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Returns log(sigma/alpha) of every training timestep, (T,) float64, increasing.

    The table is computed from the config, because a float32 `alphas_cumprod` makes 1 - alphas_cumprod[0] wrong by
    2.6e-5. If the scheduler's own table differs by more than rounding (trained betas, a beta schedule of its own, a
    lower bound in place of zero terminal SNR), its values are taken.

    Args:
        config: the scheduler's config.
        alphas_cumprod: the scheduler's own table of alpha^2, (T,).
    """
    stored = alphas_cumprod.detach().double().cpu()
    own_log = 0.5 * (torch.log1p(-stored) - stored.log())
    computed = _computed_table(
        config.get("beta_schedule"),
        float(config.get("beta_start", 0.0)),
        float(config.get("beta_end", 0.0)),
        int(config["num_train_timesteps"]),
        bool(config.get("rescale_betas_zero_snr", False)),
    )
    if computed is None or config.get("trained_betas") is not None:
        return own_log
    is_close = ((computed - own_log).abs() < 1e-3) | (computed == own_log)
    return torch.where(is_close, computed, own_log)


@functools.lru_cache(maxsize=32)
def _computed_table(name: str | None, start: float, end: float, count: int, zero_snr: bool) -> torch.Tensor | None:
    if name == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    elif name == "scaled_linear":
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), count, dtype=torch.float64) ** 2
    elif name == "squaredcos_cap_v2":
        time = torch.arange(count + 1, dtype=torch.float64) / count
        bars = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - bars[1:] / bars[:-1]).clamp(max=0.999)
    else:
        return None
    log_bar = torch.log1p(-betas).cumsum(0)
    if zero_snr:  # Lin et al., 2023 (arXiv 2305.08891), algorithm 1
        root = (0.5 * log_bar).exp()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return 0.5 * (torch.log1p(-(root**2)) - 2 * root.log())
    return 0.5 * (torch.log(-torch.expm1(log_bar)) - log_bar)
