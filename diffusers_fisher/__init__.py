"""Access to the diffusion Fisher of pretrained diffusers checkpoints, without differentiating the denoiser.

Wang et al., Efficiently Access Diffusion Fisher: Within the Outer Product Span Space, ICML 2025, arXiv 2505.23264.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    ".checkpoints": ("EMBEDDED_CLASSES", "embedded_checkpoint", "embedded_prompt", "embedded_test_images"),
    ".backbones": ("PipelineDenoiser", "backbone_of"),
    ".distributions": ("Covariance", "DCTBasis", "DiracMixture", "GaussianMixture"),
    ".errors": (
        "CheckpointError", "CoarseGridWarning", "FisherError", "InputError", "NumericalError", "TrajectoryError",
        "UnsupportedError",
    ),
    ".fisher": (
        "AutodiffFisher", "DirectFisher", "EndpointFisher", "Estimate", "ExactFisher", "FiniteDifferenceFisher",
        "FisherEstimator", "FisherOperator", "GaussianFisher", "OneStepFisher", "Probes", "TraceCorrectedFisher",
        "TraceMatchingFisher",
        "centred_endpoint_error_bound", "endpoint_error_bound", "norm_trace_error_bound", "residual_trace_error_bound",
    ),
    ".guidance": (
        "AestheticReward", "ClassifierReward", "GuidanceOutput", "ImageInput", "LinearReward", "MeasurementReward",
        "PosteriorGuidance", "TextImageReward", "WeightedReward", "gaussian_blur", "named_reward",
        "posterior_guidance",
    ),
    ".likelihood": ("LikelihoodComparison", "LikelihoodOutput", "SquaredErrorOutput"),
    ".models": ("FisherTraceModel",),
    ".noise": ("DenoisingState", "NoiseLevel", "noise_level"),
    ".pictures": ("fisher_pictures", "trace_plot"),
    ".pipelines": (
        "DDIMFisherPipeline", "DDPMFisherPipeline", "DiTFisherPipeline", "FisherPipelineMixin", "FluxFisherPipeline",
        "LDMFisherPipeline", "PixArtAlphaFisherPipeline", "PixArtSigmaFisherPipeline",
        "StableDiffusion3FisherPipeline", "StableDiffusionFisherPipeline", "StableDiffusionXLFisherPipeline",
        "custom_pipeline_file", "fisher_pipeline",
    ),
    ".schedulers": ("FisherSchedulerMixin", "Trajectory", "fisher_scheduler"),
    ".schedulers.catalog": (
        "FisherDDIMInverseScheduler", "FisherDDIMScheduler", "FisherDDPMScheduler", "FisherDEISMultistepScheduler",
        "FisherDPMSolverMultistepInverseScheduler", "FisherDPMSolverMultistepScheduler",
        "FisherDPMSolverSinglestepScheduler", "FisherEDMEulerScheduler", "FisherEulerAncestralDiscreteScheduler",
        "FisherEulerDiscreteScheduler", "FisherFlowMatchEulerDiscreteScheduler",
        "FisherFlowMatchHeunDiscreteScheduler", "FisherHeunDiscreteScheduler", "FisherKDPM2DiscreteScheduler",
        "FisherLCMScheduler", "FisherLMSDiscreteScheduler", "FisherPNDMScheduler", "FisherSASolverScheduler",
        "FisherTCDScheduler", "FisherUniPCMultistepScheduler",
    ),
    ".studies.lml": ("LMLDDIMScheduler", "LMLDPMSolverMultistepScheduler", "LMLFlowMatchEulerDiscreteScheduler"),
    "diffusers": ("ModelMixin", "SchedulerMixin"),  # diffusers' loader asks a component's module for these names
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(name for name, home in _HOME_OF.items() if home != "diffusers")


def __getattr__(name: str) -> Any:
    """Imports on first use: `import diffusers_fisher` loads neither diffusers' models nor transformers."""
    if name not in _HOME_OF:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'; it has: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME_OF[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
