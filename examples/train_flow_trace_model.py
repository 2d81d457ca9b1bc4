"""Trains the trace model of the embedded Stable Diffusion 3.

    python examples/fashion_mnist.py --output outputs/fashion_mnist
    accelerate launch --cpu --num_cpu_threads_per_process 2 -m diffusers_fisher.training.cache_latents --config configs/trace_embedded_sd3.yaml
    accelerate launch --cpu --num_cpu_threads_per_process 2 examples/train_flow_trace_model.py --config configs/trace_embedded_sd3.yaml

This is `diffusers_fisher.training.trace_matching`, with one empty token in the place of the 256 that the stock call
appends: the same function of the network, many times faster.
"""  # noqa: E501

from diffusers import SD3Transformer2DModel
from empty_tokens import short_context

from diffusers_fisher.training.trace_matching import main

if __name__ == "__main__":
    with short_context(SD3Transformer2DModel):
        main()
