"""Writes the tables of README and docs from the benchmarks' JSON files; `--check` only compares.

python examples/benchmarks/document_figures.py
"""

import sys
from collections.abc import Callable, Sequence

from curvature_figures import (
    intrinsic_dimension_classes,
    intrinsic_dimension_images,
    intrinsic_dimension_manifolds,
    intrinsic_dimension_others,
    likelihood_bound_fractions,
    posterior_uncertainty_checkpoint,
    posterior_uncertainty_closed_forms,
)
from dataset_figures import dataset_report, dataset_sharing, out_of_distribution, prompt_matching, sample_ranking
from figure_tables import FOLDER, document, read_result, table
from fisher_figures import fisher_ascents, fisher_gradients, fisher_levels
from gpu_figures import cpu_memory, model_fit, model_memory
from guidance_figures import guidance, guidance_curves, guidance_gradients, guidance_per_step, guidance_sd15_size
from likelihood_figures import (
    likelihood_checkpoint,
    likelihood_closed_forms,
    likelihood_comparison,
    likelihood_discretisation,
    likelihood_other_laws,
    likelihood_total_error,
)
from probe_figures import (
    few_steps,
    flow_gradients,
    flow_guidance,
    flow_likelihood,
    flow_products,
    flow_samples,
    likelihood_probes,
)
from study_figures import lml_cells, lml_sweep, transport, transport_learned
from trace_figures import trace_check, trace_cost, trace_embedded, trace_mixture

ROOT = FOLDER.parent.parent


def embedded_checkpoint() -> str:
    result = read_result("embedded_checkpoint")
    reconstruction, generation = result["reconstruction"], result["generation"]
    rows = [
        [scale, f"{row['classified_as_prompted']:.1%}", f"{row['spread_relative_to_real']:.2f}"]
        for scale, row in generation.items()
    ]
    columns = ["guidance scale", "samples classified as prompted", "spread within a class, relative to real images"]
    return document(
        f"A Stable Diffusion in small: 32x32 images, 4x8x8 latents, a UNet of {result['unet_parameters'] / 1e6:.1f} M "
        f"parameters, {result['bytes'] / 1e6:.1f} MB in all. Reconstructions of the 10,000 test images reach "
        f"{reconstruction['psnr_of_mean_error_db']:.1f} dB on the central 28x28, and "
        f"{reconstruction['reconstructions_classified_right']:.1%} of them are classified right "
        f"({reconstruction['images_classified_right']:.1%} of the images themselves).",
        table(columns, rows),
        f"{next(iter(generation.values()))['count']} samples each, DDIM, 25 steps.",
    )


def readme_times() -> str:
    sections = read_result("readme_times")["sections"]
    rows = [[name, ", ".join(f"{each:.0f}" for each in seconds)] for name, seconds in sections.items()]
    return document(
        table(["section", "seconds of its blocks"], rows),
        "Processor time on one core, without the import of PyTorch. A graphics card was not used.",
    )


DOCUMENTS = {
    ROOT / "README.md": (guidance, readme_times, embedded_checkpoint, flow_samples),
    ROOT / "docs" / "guidance.md": (
        guidance_curves,
        guidance_per_step,
        guidance_gradients,
        guidance_sd15_size,
        few_steps,
    ),
    ROOT / "docs" / "estimators.md": (fisher_levels, fisher_gradients, fisher_ascents),
    ROOT / "docs" / "transport.md": (transport, transport_learned),
    ROOT / "docs" / "lml.md": (lml_cells, lml_sweep),
    ROOT / "docs" / "likelihood.md": (
        likelihood_probes,
        trace_check,
        likelihood_closed_forms,
        likelihood_other_laws,
        likelihood_checkpoint,
        likelihood_comparison,
        likelihood_discretisation,
        likelihood_total_error,
    ),
    ROOT / "docs" / "dataset_likelihood.md": (
        dataset_report,
        dataset_sharing,
        out_of_distribution,
        sample_ranking,
        prompt_matching,
    ),
    ROOT / "docs" / "flow.md": (flow_samples, flow_likelihood, flow_products, flow_gradients, flow_guidance),
    ROOT / "docs" / "curvature.md": (
        likelihood_bound_fractions,
        intrinsic_dimension_manifolds,
        intrinsic_dimension_images,
        intrinsic_dimension_classes,
        intrinsic_dimension_others,
        posterior_uncertainty_closed_forms,
        posterior_uncertainty_checkpoint,
    ),
    ROOT / "docs" / "gpu.md": (model_memory, model_fit, cpu_memory),
    ROOT / "docs" / "training.md": (trace_mixture, trace_embedded, trace_cost),
}


def fill(text: str, makers: Sequence[Callable[[], str]]) -> str:
    """Returns the document with every block of figures made again."""
    for make in makers:
        start, end = f"<!-- figures: {make.__name__} -->\n", "<!-- end of figures -->"
        before, after = text.split(start, 1)
        text = f"{before}{start}\n{make()}\n\n{end}{after.split(end, 1)[1]}"
    return text


def main() -> None:
    for path, makers in DOCUMENTS.items():
        current = path.read_text(encoding="utf-8")
        text = fill(current, makers)
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif text != current:
            sys.exit(f"{path.name} differs from the benchmarks' JSON; run this script")


if __name__ == "__main__":
    main()
