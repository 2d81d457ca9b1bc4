"""One bad image never stops a run over a data set: it has a record that says why, which is written once."""

import json
import subprocess
import sys

import pytest
import tiny
import torch
from image_folders import image_folder, saved_pipeline
from PIL import Image, ImageOps

from diffusers_fisher import InputError, StableDiffusionFisherPipeline
from diffusers_fisher.data import ImageData
from diffusers_fisher.evaluation.dataset_likelihood import evaluate_dataset
from diffusers_fisher.evaluation.dataset_settings import DatasetSettings
from diffusers_fisher.evaluation.image_evaluator import is_out_of_memory
from diffusers_fisher.jobs.pipelines import DenoiserSettings

RUN = {"num_inference_steps": 2, "estimator": "finite-difference", "num_probes": 1}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return saved_pipeline(tmp_path_factory.mktemp("pipeline"))


def settings(pipeline, folder, **data):
    return DatasetSettings(denoiser=DenoiserSettings(pipeline), data=ImageData(str(folder), **data), **RUN)


def lines(folder):
    return [json.loads(line) for line in (folder / "likelihoods.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_large_image_has_a_record_which_is_tried_again_on_request_alone(pipeline, tmp_path):
    data, run = image_folder(tmp_path / "data", 3), tmp_path / "run"
    Image.new("RGB", (48, 32)).save(data / "train-1.png")
    assert evaluate_dataset(run, settings(pipeline, data, max_pixels=1000), 2)["evaluated"] == 2
    assert "it has 48x32 pixels; allowed: 1 to 1000 pixels. Set `resolution`" in lines(run)[1]["error"]
    for limit in (1000, 5000, None):  # another limit is no other run
        summary = evaluate_dataset(run, settings(pipeline, data, max_pixels=limit), 2)
        assert (summary["left_out"], summary["last_run"]["images"]) == (1, 0)
    summary = evaluate_dataset(run, settings(pipeline, data), 2, retry_failed=True)
    assert (summary["left_out"], summary["last_run"]["images"]) == (0, 1)


def test_a_batch_of_images_in_their_own_size_has_a_bounded_number_of_pixels(pipeline, tmp_path):
    data, sizes = image_folder(tmp_path / "data", 5), []

    def note_size(module, arguments):
        if type(module).__name__ == "Encoder":
            sizes.append(len(arguments[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note_size)
    try:
        evaluate_dataset(tmp_path / "run", settings(pipeline, data, max_pixels=16 * 16 * 2), 5)
    finally:
        hook.remove()
    assert sizes == [2, 2, 1]


def test_errors_of_allocators_are_known():
    with pytest.raises(RuntimeError) as raised_error:
        torch.empty(2**50)
    assert (
        is_out_of_memory(raised_error.value)
        and is_out_of_memory(MemoryError())
        and is_out_of_memory(torch.OutOfMemoryError())
    )
    with pytest.raises(RuntimeError) as raised_error:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(raised_error.value)


LIMITED = """
import resource, runpy, sys
import diffusers_fisher.cli, diffusers_fisher.evaluation.dataset_likelihood, datasets, transformers
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + {megabytes} * 2**20,) * 2)
sys.argv = ["diffusers-fisher", *sys.argv[1:]]
diffusers_fisher.cli.app()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process so")
@pytest.mark.parametrize("resolution", [[], ["--resolution", "16"]], ids=["network", "reading"])
def test_an_image_without_enough_memory_has_a_record(pipeline, tmp_path, resolution):
    """The network has too little for one image in its own size; with a resolution, reading has too little."""
    data = image_folder(tmp_path / "data", 3)
    Image.new("RGB", (2048, 2048) if not resolution else (12000, 12000)).save(data / "train-1.png")
    command = ["likelihood", "--model", pipeline, "--data", data, "--output", tmp_path / "run", "--batch-size", "2"]
    command += ["--num-inference-steps", "2", "--estimator", "finite-difference", *resolution]
    run = subprocess.run(
        [sys.executable, "-c", LIMITED.format(megabytes=600), *map(str, command)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    rows = lines(tmp_path / "run")
    assert [row["name"] for row in rows if "error" in row] == ["train-1.png"]
    assert "there is not enough memory for it" in rows[1]["error"]


def test_odd_pictures_are_evaluated_as_they_are_shown(pipeline, tmp_path):
    """The command gives the numbers of `log_likelihood` of the opened file, and says which were transparent."""
    data = tmp_path / "data"
    data.mkdir()
    gradient = Image.radial_gradient("L").resize((24, 16)).convert("RGB")
    tags = gradient.getexif()
    tags[274] = 6
    gradient.save(data / "turned.png", exif=tags)
    transparent_copy = gradient.copy()
    transparent_copy.putalpha(Image.linear_gradient("L").resize((24, 16)).point(lambda value: 255 * (value > 99)))
    transparent_copy.save(data / "cut.png")
    (data / "damaged.png").write_bytes((data / "turned.png").read_bytes()[:80])
    summary = evaluate_dataset(tmp_path / "run", settings(pipeline, data))
    rows = {row["name"]: row for row in lines(tmp_path / "run")}
    assert (summary["evaluated"], summary["left_out"], summary["transparent"]) == (2, 1, 1)
    assert rows["cut.png"]["transparent"] and "transparent" not in rows["turned.png"]
    page = (tmp_path / "run" / "index.html").read_text(encoding="utf-8")
    assert "1 images have transparent pixels, which were composed on black." in page
    pipe = tiny.quiet(StableDiffusionFisherPipeline.from_pretrained(pipeline))

    def bits(image):
        from diffusers_fisher import FiniteDifferenceFisher

        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "num_probes": 1, "generator": generator}
        return float(pipe.log_likelihood(image, estimator=FiniteDifferenceFisher(), **options).bits_per_dim)

    with Image.open(data / "turned.png") as image:
        assert bits(image) == pytest.approx(rows["turned.png"]["bits_per_dim"], abs=1e-5)  # float32 of another batch
        assert bits(ImageOps.exif_transpose(image)) == bits(image)


def test_only_bad_images_are_an_error(pipeline, tmp_path):
    image_folder(tmp_path / "data", 2, corrupt=(0, 1))
    with pytest.raises(InputError, match=r"Not one image could be evaluated\. The first: Image 'train-0\.png' of"):
        evaluate_dataset(tmp_path / "run", settings(pipeline, tmp_path / "data"))
