"""A scorer gives the numbers of the command under every engine, and a row for every bad image."""

import io
import math
import multiprocessing
import pickle

import datasets
import numpy
import pandas
import pytest
from image_folders import CAPTIONS, image_folder, saved_pipeline
from PIL import Image

from diffusers_fisher import InputError, LikelihoodScorer
from diffusers_fisher.evaluation import scorer as scorer_module
from diffusers_fisher.evaluation.dataset_likelihood import evaluate_dataset
from diffusers_fisher.evaluation.scorer import NUMBERS, RESULTS

from .test_dataset_likelihood import AGREEMENT, lines, settings_of

COUNT = 5
CORRUPT = (3,)
OPTIONS = {"num_inference_steps": 2, "estimator": "autodiff"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny pipeline, 5 images, one of them truncated, and their likelihoods by the command."""
    folder = tmp_path_factory.mktemp("scorer")
    saved_pipeline(folder / "pipeline")
    image_folder(folder / "images", COUNT, corrupt=CORRUPT)
    evaluate_dataset(folder / "run", settings_of(folder), batch_size=1)
    return folder


@pytest.fixture
def scorer(place):
    """It evaluates one image at a time, as the command did, so that the numbers agree to the bit."""
    return LikelihoodScorer(str(place / "pipeline"), batch_size=1, **OPTIONS)


def columns(place, kind=str):
    paths = [place / "images" / f"train-{number}.png" for number in range(COUNT)]
    captions = [CAPTIONS[number % len(CAPTIONS)] for number in range(COUNT)]
    return {"image": [kind(path) for path in paths], "caption": captions, "key": [path.name for path in paths]}


def expect_the_commands(place, results, tolerance=0.0):
    """Compares columns with the lines of the command."""
    rows = {row["name"]: row for row in lines(place / "run")}
    assert sorted(results["key"]) == sorted(rows)
    for number, key in enumerate(results["key"]):
        row = rows[key]
        if "error" in row:
            assert results["status"][number] == "failed" and "can't be read" in results["error"][number]
            assert all(math.isnan(results[name][number]) for name in NUMBERS)
            assert results["denoiser_calls"][number] == results["dims"][number] == 0
        else:
            assert results["error"][number] == "" and results["status"][number] == "one grid"
            assert (results["denoiser_calls"][number], results["dims"][number]) == (3, row["dims"])
            assert results["bits_per_dim"][number] == pytest.approx(row["bits_per_dim"], abs=tolerance, rel=0)
            for name in set(NUMBERS) - {"bits_per_dim"}:
                # One probe per level, so that none of the errors is infinite.
                assert results[name][number] == pytest.approx(row[name], abs=256 * tolerance, rel=tolerance)


def as_pixels(path):
    try:
        with Image.open(path) as image:
            return numpy.asarray(image)
    except OSError:
        return path.read_bytes()  # a truncated file has no pixels


KINDS = {
    "paths": str,
    "bytes": lambda path: path.read_bytes(),
    "arrays": as_pixels,
    "lazy PIL": lambda path: Image.open(io.BytesIO(path.read_bytes())),
    "undecoded": lambda path: {"bytes": path.read_bytes(), "path": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_every_kind_have_the_numbers_of_the_command(place, scorer, kind):
    results = scorer(columns(place, KINDS[kind]))
    assert list(results) == ["key", *RESULTS]
    assert {results[name].dtype.kind for name in NUMBERS} == {"f"} and results["dims"].dtype == numpy.int64
    expect_the_commands(place, results)


def test_batches_of_several_images_change_rounding_alone(place):
    batch = {name: numpy.array(column, dtype=object) for name, column in columns(place).items()}
    expect_the_commands(place, LikelihoodScorer(str(place / "pipeline"), **OPTIONS)(batch), AGREEMENT)


def test_an_array_of_images_and_refined_grids(place):
    """Ray Data has images of one size as one array (B, H, W, 3)."""
    pixels = numpy.stack([as_pixels(place / "images" / f"train-{number}.png") for number in range(2)])
    results = LikelihoodScorer(str(place / "pipeline"), tolerance=10.0, estimator="autodiff", prompt="a b")(
        {"image": pixels, "caption": ["of no use", 3.5]}
    )
    assert list(results) == list(RESULTS) and list(results["status"]) == ["converged"] * 2
    assert (results["denoiser_calls"] > 3).all() and numpy.isfinite(results["bits_per_dim"]).all()


def test_every_bad_item_is_a_row_with_an_error(place, scorer):
    good = place / "images" / "train-0.png"
    images = [good, None, "absent.png", b"", numpy.zeros((16, 16, 3)), numpy.zeros((16, 16, 5), numpy.uint8)]
    images += [Image.new("RGB", (17, 16)), Image.new("I;16", (16, 16)), 3, good, good, "s3://bucket/a.png"]
    captions = ["a b"] * 9 + [math.nan, 2.5, "a b"]
    results = scorer({"image": images, "caption": captions})
    words = [
        "", "Image '1' of 'the batch' can't be read: it is a NoneType; allowed: PIL, the bytes", "absent.png",
        "Image '3' of 'the batch' can't be read", "it is an array of float64; allowed: uint8", "Cannot handle this",
        "Image '6' has 17x16 pixels; this pipeline takes multiples of", "16 or 32 bits", "it is a int", "",
        "The caption of image '10' is 2.5 (float); allowed: a text", "s3://bucket/a.png",
    ]  # fmt: skip
    for error, status, word in zip(results["error"], results["status"], words, strict=True):
        assert (word in error and error != "") if word else error == ""
        assert (status == "failed") == bool(word)
    assert numpy.isnan(results["log_prob"]).tolist() == [bool(word) for word in words]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": 3}, "`model` is 3 .*; allowed: a string"),
        ({"steps": 3}, r"`steps` is no setting of a scorer; allowed: bins, dtype, .*, tolerance, variant\."),
        ({"method": "bound"}, "`method` is no setting of a scorer"),
        ({"estimator": "best"}, "`estimator` is 'best'; allowed"),
        ({"batch_size": 0}, "`batch_size` is 0; allowed: at least 1"),
        ({"prompt": "a", "caption_column": "text"}, "`prompt` and `caption_column` are both set"),
    ],
)
def test_settings_that_do_not_exist_are_refused_at_once(options, words):
    with pytest.raises(InputError, match=words):
        LikelihoodScorer(**{"model": "absent", **options})


def test_settings_and_batches_that_do_not_fit_are_errors(place, scorer):
    path = str(place / "pipeline")
    batch = columns(place)
    with pytest.raises(InputError, match="'absent' can't be loaded as a pipeline"):
        LikelihoodScorer("absent")(batch)
    with pytest.raises(InputError, match="`resolution` is 12; allowed for this pipeline"):
        LikelihoodScorer(path, resolution=12)(batch)
    with pytest.raises(InputError, match=r"The batch is a DataFrame; allowed: a mapping .* Use `score_frames`"):
        scorer(pandas.DataFrame(batch))
    with pytest.raises(InputError, match=r"The batch has no column 'picture'; it has: image, caption, key\. Set"):
        LikelihoodScorer(path, image_column="picture")(batch)
    with pytest.raises(InputError, match="The batch has no column 'text'; it has"):
        LikelihoodScorer(path, caption_column="text")(batch)
    with pytest.raises(InputError, match="has a column 'status' already, which the results would replace"):
        scorer({**batch, "status": [0] * COUNT})
    with pytest.raises(InputError, match=r"have \{'image': 5, 'caption': 1, 'key': 5\} rows; allowed: one number"):
        scorer({**batch, "caption": ["a"]})


def test_empty_batches_have_the_columns(place):
    results = LikelihoodScorer("never loaded")({"image": [], "key": []})
    assert list(results) == ["key", *RESULTS] and all(len(column) == 0 for column in results.values())


def test_datasets_map_takes_a_scorer(place, scorer):
    """The images are undecoded, so that one that can't be read does not end the run."""
    rows = datasets.Dataset.from_dict(columns(place)).cast_column("image", datasets.Image(decode=False))
    results = rows.map(scorer, batched=True, batch_size=2)
    expect_the_commands(place, results[:])
    assert results.features["bits_per_dim"].dtype == "float64" and results.features["error"].dtype == "string"
    assert (
        rows.map(pickle.loads(pickle.dumps(scorer)), batched=True, batch_size=2)._fingerprint == results._fingerprint
    )


def test_frames_of_spark_keep_their_types_without_a_good_image(place, scorer):
    frame = pandas.DataFrame(columns(place, KINDS["bytes"]))
    frames = list(scorer.score_frames(iter([frame[:2], frame[3:4], frame[2:3], frame[4:], frame[:0]])))
    assert [len(each) for each in frames] == [2, 1, 1, 1, 0]
    kinds = [{name: str(each[name].dtype) for name in RESULTS} for each in frames]
    assert all(kind == kinds[0] for kind in kinds[:-1])  # pandas infers the kind of texts from the texts
    expect_the_commands(place, pandas.concat(frames, ignore_index=True).to_dict("list"))


def test_a_process_loads_the_model_once_for_all_copies_of_a_scorer(place, scorer):
    scorer_module._evaluator.cache_clear()
    for _ in range(2):
        pickle.loads(pickle.dumps(scorer))({"image": []})
        copy = pickle.loads(pickle.dumps(scorer))
        copy({"image": [Image.new("RGB", (16, 16))]})
    assert scorer_module._evaluator.cache_info().misses == 1
    assert len(pickle.dumps(scorer)) < 10_000


@pytest.mark.slow
def test_two_spawned_processes_give_the_numbers_of_the_command(place, scorer):
    whole = columns(place)
    batches = [{name: column[number : number + 1] for name, column in whole.items()} for number in range(COUNT)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        parts = pool.map(scorer, batches, chunksize=1)
    expect_the_commands(place, {name: numpy.concatenate([part[name] for part in parts]) for name in parts[0]})


@pytest.mark.slow
def test_datasets_map_in_two_processes(place, scorer):
    rows = datasets.Dataset.from_dict(columns(place)).cast_column("image", datasets.Image(decode=False))
    expect_the_commands(place, rows.map(scorer, batched=True, batch_size=1, num_proc=2)[:])
