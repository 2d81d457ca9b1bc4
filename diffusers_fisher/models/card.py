"""The model card of a published trace model."""

from collections.abc import Mapping
from typing import Any

MEANINGS = {
    "residual": "squared errors of the denoiser's predicted noise: the **data's** r, as the denoiser sees it",
    "jacobian": "random probes of the denoiser's Jacobian: the **model's own** r, whose likelihood is that of its ODE",
    "norm": "squared norms of clean samples (the paper's target; ill-conditioned at small noise)",
}


def model_card(repo_id: str, config: Mapping[str, Any], description: str = "") -> str:
    """Returns the card's text, which says what the model estimates, for which denoiser, and how to use it."""
    fingerprint = config.get("fingerprint") or {}
    rows = "\n".join(f"| {key} | `{value}` |" for key, value in fingerprint.items()) or "| none | fits any denoiser |"
    return f"""---
library_name: diffusers_fisher
tags: [diffusers, diffusion-fisher, trace-matching, likelihood]
---

# Trace model of the diffusion Fisher

A small network for `r(x, t) = tr Cov[eps|x_t]/d`, so that the trace of the diffusion Fisher, `d (1 - r)/sigma^2`, and
with it a log-likelihood, needs no differentiation of the denoiser (DF-TM, Wang et al., ICML 2025, arXiv 2505.23264).

- Target: `{config["target"]}`, trained on {MEANINGS[config["target"]]}.
- Output: {config["output"]} in the {config["basis"]} basis, for samples in layout `{config["layout"]}` with
  {config["in_channels"]} channels.

{description}

## The denoiser it was trained for

| | |
|---|---|
{rows}

Use with another one is refused with what differs.

## Use

```python
from diffusers_fisher import FisherTraceModel, StableDiffusionFisherPipeline, TraceMatchingFisher

model = FisherTraceModel.from_pretrained("{repo_id}")
pipe = StableDiffusionFisherPipeline.from_pretrained("...")  # the denoiser above
out = pipe.log_likelihood(images, prompt=prompts, estimator=TraceMatchingFisher(model), num_probes=None)
```
"""
