"""A small demonstration that takes seconds: its tables, report, pictures and progress bars."""

import contextlib
import io
import json
import re
import sys

import numpy
import pytest
import torch
from PIL import Image

import diffusers_fisher
from diffusers_fisher import demo, embedded_test_images

ESTIMATORS = [
    "one step (default)", "direct", "finite difference", "exact (autodiff)", "endpoint, centred", "endpoint, paper",
]  # fmt: skip
VERSIONS = ["real", "inverted", "noise-corrupted", "real, 2 probes"]
SMALL = {
    "NUM_IMAGES": 2,
    "SAMPLING": {"num_inference_steps": 3, "guidance_scale": 2.0},
    "GUIDANCE": {"num_guidance_steps": 1},
    "LIKELIHOOD": {"num_inference_steps": 12},
}


@pytest.fixture(scope="module")
def small_demo():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(demo, name, value)
        patch.setattr(demo, "embedded_test_images", lambda: tuple(tensor[:6] for tensor in embedded_test_images()))
        yield


@pytest.fixture(scope="module")
def run(small_demo, tmp_path_factory):
    """Report, folder, stdout and stderr of one run into a folder that does not exist yet."""
    folder = tmp_path_factory.mktemp("demo") / "outputs" / "demo"
    out, err = io.StringIO(), io.StringIO()
    rng, backend = torch.get_rng_state(), "matplotlib.pyplot" in sys.modules
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        report = demo.run_demo(folder)
    assert torch.equal(torch.get_rng_state(), rng)  # every draw comes from the seed
    assert ("matplotlib.pyplot" in sys.modules) is backend  # a caller's backend is not touched
    return report, folder, out.getvalue(), err.getvalue()


def rows(stdout, names):
    """Returns the numbers of the table rows that begin with one of `names`."""
    numbers = {}
    for line in stdout.splitlines():
        for name in names:
            if line.startswith(f"  {name}  "):
                numbers[name] = [float(word) for word in line[2 + len(name) :].split()]
    return numbers


def test_likelihood_table_shows_the_report(run):
    report, _, stdout, _ = run
    assert "(6 test images, bits/dim of the latent)" in stdout
    assert re.search(r"images +bits/dim +std +probe s\.e\. +step error +at most +calls", stdout)
    table = rows(stdout, VERSIONS)
    assert list(table) == list(report["likelihood"]) == VERSIONS
    for name, row in report["likelihood"].items():
        columns = (
            "mean", "standard_deviation", "probe_standard_error", "discretisation_error",
            "largest_discretisation_error", "num_denoiser_calls",
        )  # fmt: skip
        assert table[name] == pytest.approx([row[column] for column in columns], abs=5.1e-4)  # three decimals
        assert row["mean"] == pytest.approx(sum(row["bits_per_dim"]) / 6, abs=1e-4)  # four decimals
        assert len(row["bits_per_dim"]) == 6
        checks = 0 if name == "real, 2 probes" else 9  # of the trace model, at 9 of the 13 levels
        assert row["num_denoiser_calls"] == 12 + 1 + checks
        assert 0 < row["discretisation_error"] <= row["largest_discretisation_error"]
        assert (row["space"], row["density"], row["prior"]) == ("latent", "smoothed", "moment-matched")
        if name == "real, 2 probes":
            assert 0 < row["probe_standard_error"] < 1
            assert row["trace"] == "AutodiffFisher, 2 probes per level"
        else:
            assert row["probe_standard_error"] == 0
            assert row["trace"] == "TraceMatchingFisher (target jacobian), no probes"
    real, probes = (report["likelihood"][name]["mean"] for name in ("real", "real, 2 probes"))
    assert (
        abs(real - probes) < 0.2
    )  # six images by two probes each have a standard error of 0.05; the model has an error too


def test_real_images_are_likelier_than_inverted_and_corrupted_ones(run):
    means = {name: row["mean"] for name, row in run[0]["likelihood"].items()}
    assert means["real"] < means["inverted"] - 0.5  # bits/dim; about 2 apart
    assert means["real"] < means["noise-corrupted"] - 0.2


def test_guidance_table_shows_the_report(run):
    report, _, stdout, _ = run
    assert "Steering 'a photo of a sneaker' toward 'ankle boot' (2 images)" in stdout
    assert re.search(r"estimator +reward before +after +seconds +calls", stdout)
    table = rows(stdout, ESTIMATORS)
    assert list(table) == list(report["guidance"]) == ESTIMATORS
    for name, row in report["guidance"].items():
        columns = ("reward_before", "reward_after", "seconds", "num_denoiser_calls")
        assert table[name][:2] + table[name][3:] == pytest.approx(
            [row[c] for c in columns if c != "seconds"], abs=5.1e-4
        )
        assert table[name][2] == pytest.approx(row["seconds"], abs=0.051)  # one decimal
        assert row["rewards"][0] == pytest.approx(row["reward_before"], abs=1e-4)
        assert len(row["rewards"]) == 2
        assert row["reward_after"] >= row["reward_before"]  # the best run counts
        assert row["seconds"] > 0
    before = {round(row["reward_before"], 3) for row in report["guidance"].values()}
    assert len(before) == 1  # all start from the same noise
    calls = {name: row["num_denoiser_calls"] for name, row in report["guidance"].items()}
    assert calls["direct"] == calls["endpoint, paper"] == 2 * 3  # only the sampling runs call the denoiser
    assert calls["one step (default)"] == 2 * 3 + 1 + 1  # a product, and a comparison with the run
    assert calls["finite difference"] > calls["one step (default)"]


def test_report_file_is_the_returned_report(run):
    report, folder, stdout, _ = run
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == report
    assert set(report) == {"likelihood", "guidance", "seconds", "versions"}
    assert 0 < report["seconds"] < 600
    assert f"Images, plots and report.json are in {folder.resolve()} ({report['seconds']} s in all)." in stdout
    assert report["versions"]["diffusers_fisher"] == diffusers_fisher.__version__
    assert {"threads", "diffusers", "transformers", "torch"} < set(report["versions"])


@pytest.mark.parametrize(
    ("name", "size"), [("likelihood", (1320, 480)), ("guidance", (720, 480)), ("gallery", (960, 1134))]
)
def test_pictures_have_their_size_and_content(run, name, size):
    with Image.open(run[1] / f"{name}.png") as image:
        image.load()
        assert (image.format, image.size) == ("PNG", size)
        assert float(numpy.asarray(image.convert("L")).std()) > 5  # of 255: the picture is not blank
    assert sorted(path.name for path in run[1].iterdir()) == [
        "gallery.png", "guidance.png", "likelihood.png", "report.json",
    ]  # fmt: skip


def test_progress_is_shown_on_stderr(run):
    _, _, stdout, stderr = run
    bars = re.findall(r"(\d+)/(\d+) \[", stderr)
    assert bars.count(("13", "13")) >= len(VERSIONS)  # one bar per likelihood, one evaluation per node
    assert bars.count(("2", "2")) >= len(ESTIMATORS)  # one bar per guidance, of 1 + 1 sampling runs
    assert re.search(r"2/2 \[.*reward=-?\d+\.\d+", stderr)
    assert "it/s" not in stdout


def test_numbers_depend_on_the_seed_alone(small_demo, run, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_draw", lambda *_: None)
    monkeypatch.setattr(demo, "ESTIMATORS", {"one step (default)": demo.ESTIMATORS["one step (default)"]})

    def bits(seed):
        report = demo.run_demo(tmp_path / str(seed), seed)
        return report["likelihood"]["noise-corrupted"]["bits_per_dim"], report["guidance"]["one step (default)"][
            "rewards"
        ]

    first = (
        run[0]["likelihood"]["noise-corrupted"]["bits_per_dim"],
        run[0]["guidance"]["one step (default)"]["rewards"],
    )
    assert bits(0) == first
    other_bits = bits(1)
    assert other_bits[0] != first[0]
    assert other_bits[1] != first[1]
