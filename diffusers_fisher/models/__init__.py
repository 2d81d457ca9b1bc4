"""Networks that know the diffusion Fisher of a denoiser."""

from ..fisher.trace_output import FisherTraceOutput
from .fingerprint import check_fingerprint, denoiser_fingerprint, fingerprint_differences, network_key
from .trace_model import FisherTraceModel, trace_inputs

__all__ = [
    "FisherTraceModel",
    "FisherTraceOutput",
    "check_fingerprint",
    "denoiser_fingerprint",
    "fingerprint_differences",
    "network_key",
    "trace_inputs",
]
