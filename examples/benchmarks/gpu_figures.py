"""The tables of docs/gpu.md, for document_figures.py: computed from counted parameters and from runs on a CPU."""

from typing import Any

from figure_tables import document, read_result, table

GB = 1e9
MEMORIES = (8, 16, 24, 80)
MEASURED_PIXELS = 512
MEASURED_WEIGHTS = ("denoiser", "autoencoder")  # that run has these parts in float32; its reward needs no network


def model_memory() -> str:
    models = read_result("model_sizes")["models"]
    rows = [
        [
            name,
            *(f"{2 * parts[part] / GB:.1f}" for part in MEASURED_WEIGHTS),
            f"{2 * sum(parts['text_encoders']) / GB:.1f}",
            f"{2 * _total(parts) / GB:.1f}",
            f"{2 * _largest(parts) / GB:.1f}",
        ]
        for name, parts in models.items()
    ]
    columns = ["weights in 16 bits, GB", "denoiser", "autoencoder", "text encoders", "all", "largest at once"]
    return document(
        table(columns, rows),
        "Computed: two bytes per parameter (bfloat16 or float16), counted in the real classes with the checkpoints' "
        "public settings. float32 takes twice as much.",
    )


def model_fit() -> str:
    models = read_result("model_sizes")["models"]
    rows = []
    for name, parts in models.items():
        working = _working_memory() * (parts["pixels"] / MEASURED_PIXELS) ** 2
        needs = [(2 * _total(parts) + working, "all on the GPU"), (2 * _largest(parts) + working, "model offload")]
        rows.append(
            [
                f"{name}, {parts['pixels']}x{parts['pixels']}",
                f"{working / GB:.1f}",
                *(next((label for need, label in needs if need <= memory * GB), "smaller") for memory in MEMORIES),
            ]
        )
    columns = ["guidance of one image", "working memory, GB", *(f"{memory} GB" for memory in MEMORIES)]
    return document(
        table(columns, rows),
        "Computed, not measured on any GPU. The working memory is what a guidance iteration took beside the weights "
        "in a whole process on a CPU, at Stable Diffusion's size, 512x512 and float32 "
        f"({2 * _working_memory() / GB:.1f} GB with Python and PyTorch), halved for 16 bits and scaled by the number "
        'of pixels. "smaller" means: smaller weights or smaller images, see above.',
    )


def cpu_memory() -> str:
    guidance, likelihood = read_result("guidance_sd15_size_cpu_float32")["methods"], read_result("trace_cost")
    names = {"trace model": "by a trace model", "1 probe": "by one random direction per level"}
    rows = [[f"log_likelihood, {names[key]}", f"{likelihood['peak_bytes'][key] / GB:.1f}"] for key in names]
    methods = {"one step": "the default", "finite difference": "FiniteDifferenceFisher"}
    methods |= {"per-step recomputation": "AutodiffFisher"}
    rows += [[f"guide, {text}", f"{guidance[key]['peak_memory'] / GB:.1f}"] for key, text in methods.items()]
    return document(
        table(["one 512x512 image at Stable Diffusion's size, float32", "peak memory of the process, GB"], rows),
        "Measured on a CPU with random weights. The likelihoods encode nothing: they began with latents.",
    )


def _total(parts: dict[str, Any]) -> int:
    return parts["denoiser"] + parts["autoencoder"] + sum(parts["text_encoders"])


def _largest(parts: dict[str, Any]) -> int:
    """Returns the parameters that model offload has on the GPU at once: the denoiser stays there while images are
    decoded."""
    return max(parts["denoiser"] + parts["autoencoder"], *parts["text_encoders"])


def _working_memory() -> float:
    """Returns the bytes beside the weights of one guidance iteration in 16 bits: half of those in float32."""
    peak = read_result("guidance_sd15_size_cpu_float32")["methods"]["one step"]["peak_memory"]
    weights = read_result("model_sizes")["models"]["Stable Diffusion 1.5"]
    return (peak - 4 * sum(weights[part] for part in MEASURED_WEIGHTS)) / 2
