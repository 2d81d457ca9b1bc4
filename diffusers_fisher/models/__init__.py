"""Networks that know the diffusion Fisher of a denoiser."""

from .fingerprint import (
    autoencoder_differences,
    check_fingerprint,
    component_key,
    denoiser_fingerprint,
    fingerprint_differences,
    network_key,
)
from .trace_model import FisherTraceModel, FisherTraceOutput, trace_inputs

__all__ = [
    "FisherTraceModel", "FisherTraceOutput", "autoencoder_differences", "check_fingerprint",
    "component_key", "denoiser_fingerprint",
    "fingerprint_differences", "network_key", "trace_inputs",
]  # fmt: skip
