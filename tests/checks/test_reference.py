"""The place of an image among the records of `diffusers-fisher likelihood`: by rank, with the records' settings."""

import json

import image_folders
import numpy
import pytest
import torch

from diffusers_fisher import InputError, backbone_of
from diffusers_fisher.checks.likelihoods import check_reference, place_among, read_reference
from diffusers_fisher.checks.lines import run_line
from diffusers_fisher.checks.subject import Subject
from diffusers_fisher.data import ImageData, open_images
from diffusers_fisher.evaluation.dataset_likelihood import DatasetSettings, evaluate_dataset
from diffusers_fisher.jobs.pipelines import DenoiserSettings, load_pipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Records of 24 images under a tiny pipeline: folder of the records, pipeline and images."""
    folder = tmp_path_factory.mktemp("reference")
    path = image_folders.saved_pipeline(folder / "pipe")
    data = ImageData(path=str(image_folders.image_folder(folder / "images", 24)), caption_column="text")
    settings = DatasetSettings(
        denoiser=DenoiserSettings(path=path), data=data, num_inference_steps=2, estimator="finite-difference", seed=3
    )
    evaluate_dataset(folder / "records", settings, batch_size=12)
    return folder / "records", load_pipeline(settings.denoiser), [*map(open_images(data).__getitem__, range(24))]


def subject_among(run, pipe=None):
    folder, own, examples = run
    images, prompts = torch.stack([each.pixels for each in examples]), [each.caption for each in examples]
    backbone = backbone_of(pipe or own)
    subject = Subject(backbone, backbone.samples_of(images), prompts, images, batch_size=10)
    subject.reference = str(folder)
    return subject


def test_images_of_the_records_have_the_records_own_numbers(run):
    line = run_line("reference", check_reference, subject_among(run))
    assert line.status == "ok", line
    lines = (run[0] / "likelihoods.jsonl").read_text(encoding="utf-8").splitlines()
    known = [json.loads(each)["bits_per_dim"] for each in lines]
    rows = line.figures["images"]
    assert [row["bits_per_dim"] for row in rows] == pytest.approx(known, abs=2e-3)
    order = numpy.argsort(known)
    assert rows[order[0]]["percentile"] < 5 < 95 < rows[order[-1]]["percentile"]
    assert line.figures["records"] == 24 and "24 images among 24 records" in line.measured


def test_records_of_another_checkpoint_are_named(run, tmp_path):
    other = load_pipeline(DenoiserSettings(path=image_folders.saved_pipeline(tmp_path / "pipe")))
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.mul_(1.02)
    line = run_line("reference", check_reference, subject_among(run, other))
    assert line.status == "failed" and "of another checkpoint: weights are different" in line.cause


def test_nothing_is_compared_without_a_reference_or_images(run):
    subject = subject_among(run)
    subject.images = None
    assert "no images to compare" in check_reference(subject).cause
    subject.reference = None
    assert check_reference(subject).status == "not run" and "No reference" in check_reference(subject).cause


def test_percentiles_and_p_values_are_those_of_ranks():
    known = numpy.arange(1.0, 100.0)  # 1 to 99
    assert place_among(50.0, known) == {"percentile": 50.0, "p_value": 1.0}
    assert place_among(0.0, known) == {"percentile": 0.0, "p_value": pytest.approx(0.02)}
    assert place_among(200.0, known) == {"percentile": 100.0, "p_value": pytest.approx(0.02)}
    assert place_among(2.5, known)["p_value"] == pytest.approx(0.06)


def test_p_values_of_usual_images_are_uniform():
    random = numpy.random.default_rng(0)
    known, new = numpy.sort(random.normal(size=999)), random.normal(size=4000)
    values = numpy.array([place_among(value, known)["p_value"] for value in new])
    for level in (0.05, 0.2, 0.5):
        assert abs((values <= level).mean() - level) < 4 * (level / 4000) ** 0.5 + 0.03 * level**0.5


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "has no readable likelihoods.jsonl"),
        (["no json"], "has no readable likelihoods.jsonl"),
        (['{"bits_per_dim": 1.0}'], "has no readable likelihoods.jsonl"),
        (['{"bits_per_dim": 1.0, "dims": 4}'] * 19 + ['{"error": "x"}'], r"has 19 likelihoods of \[4\] dimensions"),
        ([f'{{"bits_per_dim": 1.0, "dims": {4 + n % 2}}}' for n in range(30)], r"30 likelihoods of \[4, 5\]"),
    ],
)  # fmt: skip
def test_other_folders_are_refused(tmp_path, lines, message):
    if lines is not None:
        (tmp_path / "likelihoods.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_reference(tmp_path)


def test_records_of_bounds_are_refused(tmp_path):
    (tmp_path / "likelihoods.jsonl").write_text('{"bits_per_dim": 1.0, "dims": 4}\n' * 20, encoding="utf-8")
    (tmp_path / "settings.json").write_text('{"method": "bound"}', encoding="utf-8")
    with pytest.raises(InputError, match="has bounds, not likelihoods"):
        read_reference(tmp_path)
