"""The claims of the documents agree with the benchmarks' JSON files."""

import json
from pathlib import Path

import pytest

from diffusers_fisher.likelihood import DEFAULT_SCHEME, SCHEMES

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


def load_figures(name):
    return json.loads((BENCHMARKS / f"{name}.json").read_text())


@pytest.mark.parametrize(("mixture", "limit"), [("one variance", 0.03), ("variance a class", 0.15)])
def test_trace_matching_is_right_at_every_noise_level_after_minutes(mixture, limit):
    """The data's own r is learned in five minutes of a core; the paper's target at the same cost is far off."""
    figures = load_figures("trace_matching_mixture")
    rows = {row["recipe"]: row for row in figures["rows"] if row["mixture"] == mixture}
    assert len(figures["timesteps"]) == len(rows["residual"]["relative_error"]) == 9
    assert max(rows["residual"]["relative_error"]) < limit
    assert rows["residual"]["processor_seconds"] < 300
    assert max(rows["norm (paper's target)"]["relative_error"]) > 10 * max(rows["residual"]["relative_error"])


def test_trace_models_cost_next_to_nothing():
    figures = load_figures("trace_cost")
    assert figures["trace_model_over_denoiser"]["median"] < 0.03
    assert figures["trace_model_over_inversion"]["median"] < 1.05
    assert figures["probe_over_trace_model"]["median"] > 2.5
    assert max(figures["memory_over_inversion"][way] for way in ("trace model", "1 difference")) < 1.1
    assert figures["memory_over_inversion"]["1 probe"] > 1.3
    assert figures["difference_over_probe"]["median"] < 1


def test_trace_models_of_the_embedded_checkpoint_know_what_they_were_trained_on():
    figures = load_figures("trace_embedded")
    errors, jacobians = figures["squared_errors"], figures["full_jacobians"]
    assert errors["mean_absolute_difference"]["residual"] < 0.005
    assert jacobians["mean_absolute_difference"]["jacobian"] < 0.005
    likelihoods = figures["likelihoods"]["bits_per_dim"]
    assert min(likelihoods[target]["correlation"] for target in ("residual", "jacobian")) > 0.95
    jacobian = likelihoods["jacobian"]
    assert abs(jacobian["mean_difference"]) < 0.02
    assert jacobian["mean_absolute_difference"] < 0.05
    assert jacobian["mean_absolute_difference"] < 0.5 * likelihoods["Hutchinson, 1 probe"]["mean_absolute_difference"]


@pytest.mark.parametrize("schedule", ["Stable Diffusion", "flow matching"])
def test_likelihoods_are_those_of_closed_forms(schedule):
    rows = {
        row["calls"]: row
        for row in load_figures("likelihood")["closed_forms"]["summary"]
        if (row["schedule"], row["scheme"]) == (schedule, DEFAULT_SCHEME)
    }
    assert rows[20]["mean"] < 0.01 and rows[20]["worst"] < 0.02
    assert rows[100]["mean"] < 0.001


def test_estimates_of_every_scheme_cover_their_errors():
    rows = [row for row in load_figures("likelihood")["closed_forms"]["summary"] if row["scheme"] != "practice"]
    assert {row["scheme"] for row in rows} == set(SCHEMES)
    for row in rows:
        assert row["covered"] >= 0.95
        assert 1 < row["median_estimate_over_median_error"] < 10


def test_other_laws_than_those_the_grid_was_chosen_on():
    """One law of seven, modes as far apart as none of the others', is beyond 20 calls of flow matching."""
    rows = [row for row in load_figures("likelihood")["other_laws"]["summary"] if row["scheme"] == DEFAULT_SCHEME]
    assert {row["calls"] for row in rows} >= {20, 41, 100}
    for row in rows:
        if row["calls"] >= 20:
            assert row["mean_discretisation_error"] < 0.01
            assert row["covered"] > (0.94 if row["calls"] == 20 else 0.95)


def test_likelihoods_of_the_embedded_checkpoint_are_the_references():
    figures = load_figures("likelihood")
    rows = {(row["what"], row["calls"]): row for row in figures["checkpoint"]["rows"]}
    assert rows[f"{DEFAULT_SCHEME}, Jacobian trace", 40]["worst"] < 0.02
    (trace_model,) = (row for (method, _), row in rows.items() if "DF-TM" in method)
    assert figures["checkpoint"]["images"] >= 16 and trace_model["worst"] < 0.05
    assert figures["trace_model"]["images"] >= 32 and figures["trace_model"]["worst"] < 0.05


def test_likelihoods_of_a_dataset_do_not_depend_on_how_it_is_shared():
    figures = load_figures("dataset_likelihood")
    for name in ("trace-model", "autodiff"):
        assert max(figures["sharing"][name]["largest_difference_bits_per_dim"].values()) < 1e-5
    kill = figures["killed"]
    assert 0 < kill["records_before"] < kill["images"] == kill["records_before"] + kill["computed_after"]
    assert kill["records_changed"] == 0
    assert kill["largest_difference_from_unbroken_bits_per_dim"] < 1e-5
    report = figures["report"]
    assert report["evaluated"] == report["images"] == 10000


def test_guidance_by_the_default_outpaces_the_exact_gradients():
    figures = load_figures("guidance")
    assert figures["setting"]["prompts"] == 64 and figures["setting"]["steps"] == 25
    for rows in figures["time_to_exact"].values():
        row = rows["one step"]
        assert row["share_of_exact"] <= 0.5
        assert row["held_out_difference"] > -2 * row["held_out_difference_standard_error"]
        assert rows["direct"]["share_of_exact"] <= 0.5
    assert max(rows["per-step recomputation"]["relative_error"] for rows in figures["gradients"].values()) < 1e-5


def test_projected_noise_stays_white():
    figures = load_figures("noise_whiteness")
    for rows in figures["after"].values():
        assert max(rows[projection]["whiteness_below_0.01"] for projection in ("soft", "hard")) <= 0.02
        assert all(row["after"] > row["before"] for row in rows.values())
    assert figures["after"]["left minus right"]["none"]["whiteness_below_0.01"] > 0.5


def test_guidance_by_few_steps_takes_fewer_calls():
    for rows in load_figures("guidance_steps")["rewards"].values():
        assert rows["5 steps"]["denoiser_calls_over_full_runs"] < 0.45
        assert rows["8 steps"]["denoiser_calls_over_full_runs"] < 0.55
        assert max(rows[way]["pairs_reordered"] for way in ("5 steps", "8 steps")) < 0.05


def test_guidance_at_stable_diffusions_size_costs_little_more_than_no_gradient():
    figures = load_figures("guidance_sd15_size_cpu_float32")
    assert figures["setting"]["steps"] == 25 and figures["setting"]["pixels"] == 512
    assert figures["worst_autodiff_free_over_floor"] <= 1.05
    assert figures["exact_over_default"] >= 2.5


@pytest.mark.parametrize(("steps", "limit"), [(20, 0.2), (40, 0.15)])
def test_bounds_of_the_embedded_checkpoint_lie_little_above_the_odes_value(steps, limit):
    """A table of squared errors is no tighter than the trace model, which is the default."""
    figures = load_figures("likelihood_bound")
    rows = {row["fraction"]: row for row in figures["rows"] if row["steps"] == steps}
    default, table = rows["trace model (target jacobian)"], rows["table of squared errors, mean latents"]
    assert 0 < default["above_ode"] < limit
    assert default["standard_error_per_image"] < 0.03
    assert table["above_trace_model"] > -2 * table["above_trace_model_standard_error"] - 0.001
    assert rows["0.5 at every level"]["above_trace_model"] > 0.1
    scatter = figures["scatter_in_bits_per_dim"]
    assert scatter["pairs_in_strata"] < scatter["independent_draws"]


def test_dimensions_of_manifolds_are_right():
    rows = load_figures("intrinsic_dimension")["closed_forms"]
    assert {row["schedule"] for row in rows} == {"Stable Diffusion", "flow matching"}
    for row in rows:
        assert row["exact_worst_relative_error"] < 0.05
    probes = [row for row in rows if row["points"] >= 8]
    assert min(row["within_3_standard_errors"] for row in probes) > 0.9
    assert max(row["root_mean_square_of_errors_over_stated"] for row in probes) < 1.5


def test_dimensions_of_images_beyond_the_encoders_noise_rise_with_their_complexity():
    figures = load_figures("intrinsic_dimension")
    levels = {row["noise_to_signal"]: row for row in figures["complexity"]["levels"]}
    assert figures["complexity"]["images"] >= 500
    for name in ("excess_with_png_bytes", "excess_with_png_bytes_within_classes", "png_bytes_within_classes"):
        assert levels[0.68][name]["correlation"] > 5 * levels[0.68][name]["standard_error"]
    assert levels[0.06]["png_bytes"]["correlation"] < -0.4  # simple images have the larger dimensions there
    model = figures["complexity"]["trace_model"]
    assert all(
        error < 2 * stated + 0.5
        for error, stated in zip(model["root_mean_square_error"], model["stated"], strict=True)
    )
    auroc = figures["other_images"]["auroc"]
    assert auroc["both, distance"]["blank"]["auroc"] > 0.85 > 0.7 > auroc["likelihood"]["blank"]["auroc"]
    assert min(cell["auroc"] for cell in auroc["both, distance"].values()) > 0.85


def test_posterior_deviations_are_those_of_samples():
    figures = load_figures("posterior_uncertainty")
    for row in figures["closed_forms"]:
        assert abs(row["covered"]["68%"] - 0.683) < 0.05
        assert abs(row["covered"]["95%"] - 0.95) < 0.02
        assert abs(row["along_directions"]["95%"] - 0.95) < 0.05  # 150 numbers: 0.018
    for row in figures["checkpoint"]:
        assert row["draws"] >= 48
        assert abs(row["sampled_over_stated"] - 1) < 0.1
        assert abs(row["covered"]["68%"] - 0.683) < 0.05
        assert row["covered"]["95%"] > 0.9
        assert abs(row["pixels"]["sampled_over_stated"] - 1) < 0.15
        assert row["pixels"]["rank_correlation"] > 0.9


@pytest.mark.parametrize("name", ["guide", "log_likelihood"])
def test_memory_stays_flat_over_many_runs(name):
    run = load_figures("memory")[name]
    assert run["tensors_left"] == 0
    first, second = run["megabytes"][10 : len(run["megabytes"]) // 2], run["megabytes"][len(run["megabytes"]) // 2 :]
    assert max(second) < 1.01 * max(first)
