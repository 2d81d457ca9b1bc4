"""The training example on a few random images writes a folder for stock diffusers, the same folder after a kill."""

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import embedded_training
import fashion_mnist
import pytest
import torch
import train_embedded_checkpoint as example
import yaml
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline

from diffusers_fisher import EMBEDDED_CLASSES, ClassifierReward, InputError, NumericalError
from diffusers_fisher.files import load_tensors

EXAMPLES = Path(example.__file__).parent


def config_for(data, output, **changes):
    stage = {"batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0.01, "warmup_steps": 2, "save_every": 2}
    values = {
        "seed": 0, "data": str(data), "output": str(output), "mixed_precision": "no", "caption_dropout": 0.3,
        "kl_weight": 4e-6, "classifier": example.Optimisation(steps=5, ema_decay=0.0, **stage),
        "autoencoder": example.Optimisation(steps=6, ema_decay=0.9, **stage),
        "diffusion": example.Optimisation(steps=7, ema_decay=0.9, **stage),
    }  # fmt: skip
    return example.Config(**{**values, **changes})


@pytest.fixture(scope="module")
def reference_run(data, tmp_path_factory):
    """The output folder of an unbroken run."""
    output = tmp_path_factory.mktemp("unbroken")
    AcceleratorState._reset_state(True)
    example.run(config_for(data, output))
    return output


def contents(output):
    """Returns the bytes of every file of the finished checkpoint, and the final training states."""
    files = {str(path.relative_to(output)): path.read_bytes() for path in (output / "checkpoint").rglob("*.*")}
    states = {path.name: load_tensors(path) for path in output.glob("*.safetensors")}
    return files, states


def assert_same(output, reference):
    files, states = contents(output)
    expected_files, expected_states = contents(reference)
    assert files.keys() == expected_files.keys()
    assert [name for name in files if files[name] != expected_files[name]] == []
    assert states.keys() == expected_states.keys()
    for name, (tensors, metadata) in states.items():
        assert metadata == expected_states[name][1]
        assert tensors.keys() == expected_states[name][0].keys()
        assert all(torch.equal(value, expected_states[name][0][key]) for key, value in tensors.items())


def test_stock_diffusers_loads_and_runs_the_result(reference_run):
    pipe = StableDiffusionPipeline.from_pretrained(reference_run / "checkpoint")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe("a photo of a bag", num_inference_steps=2, generator=generator, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    assert images.std() > 0
    reward = ClassifierReward.from_pretrained(reference_run / "checkpoint" / "classifier", target=EMBEDDED_CLASSES[0])
    assert reward(torch.zeros(1, 3, 32, 32), [""]).shape == (1,)


def test_result_has_the_files_that_the_package_ships(reference_run):
    folder = reference_run / "checkpoint"
    statistics, metadata = load_tensors(folder / "latent_statistics.safetensors")
    assert "over the 40 training images" in metadata["description"]
    moments = load_tensors(reference_run / "latents.safetensors")[0]["moments"].double()
    assert moments.shape == (40, 8, 8, 8)
    scale = json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]
    mean, log_variance = moments.chunk(2, dim=1)
    assert float(scale * mean.std()) == pytest.approx(1, abs=1e-4)  # the factor is rounded to six decimals
    assert torch.allclose(statistics["mean"].double(), scale * mean.mean(0), atol=1e-6)  # float32 in the file
    total = mean.var(0) + log_variance.exp().mean(0)
    assert torch.allclose(statistics["variance"].double(), scale**2 * total, rtol=1e-6)
    held_out, _ = load_tensors(folder / "test_images.safetensors")
    assert held_out["labels"].bincount().tolist() == [7, 7, 7, 7, 6, 6, 6, 6, 6, 6]
    images, labels = fashion_mnist.load(
        "test", json.loads((reference_run / "assembled.json").read_text())["config"]["data"]
    )
    assert torch.equal(held_out["images"], images[held_out["indices"]])
    assert torch.equal(held_out["labels"], labels[held_out["indices"]])
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert json.loads((reference_run / "assembled.json").read_text())["bytes"] == size


def test_every_part_was_trained(reference_run):
    torch.manual_seed(2)
    initial = example.make_unet().state_dict()
    trained, _ = load_tensors(reference_run / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors")
    changes = [name for name, value in trained.items() if not torch.equal(value, initial[name])]
    # All but biases whose gradient is zero (a key's bias drops out of the softmax); weight decay leaves zeros alone.
    assert len(changes) > 0.9 * len(trained)


@pytest.mark.parametrize(
    ("stage", "module", "file", "make"),
    [
        ("autoencoder", "autoencoder.autoencoder", "vae/diffusion_pytorch_model", example.make_autoencoder),
        ("diffusion", "unet", "unet/diffusion_pytorch_model", example.make_unet),
    ],
)
def test_the_result_has_the_moving_averages(reference_run, stage, module, file, make):
    state, _ = load_tensors(reference_run / f"{stage}_state.safetensors")
    weights, _ = load_tensors(reference_run / "checkpoint" / f"{file}.safetensors")
    names = [name for name, _ in make().named_parameters()]
    assert sorted(weights) == sorted(names)
    assert all(torch.equal(weights[name], state[f"average.{index}"]) for index, name in enumerate(names))
    assert any(not torch.equal(weights[name], state[f"module.{module}.{name}"]) for name in names)


class Killed(BaseException):
    """An exception that the example never catches."""


def die(*_, **__):
    raise Killed


def killing(monkeypatch, deaths):
    """Makes the run raise `Killed` once when a stage, named by its number of steps, reaches a step."""
    indices = embedded_training.batch_indices

    def batch_indices(count, stage, step, seed):
        if (stage.steps, step) in deaths:
            deaths.remove((stage.steps, step))
            raise Killed
        return indices(count, stage, step, seed)

    monkeypatch.setattr(embedded_training, "batch_indices", batch_indices)


def test_killed_and_resumed_training_equals_an_unbroken_run_bit_for_bit(data, reference_run, tmp_path, monkeypatch):
    # Before the first state was saved, between two, and after the last but one; in all stages.
    deaths = [(6, 1), (6, 3), (6, 5), (5, 3), (7, 3)]
    killing(monkeypatch, deaths)
    config = config_for(data, tmp_path)
    for count in range(5, 0, -1):
        assert len(deaths) == count
        torch.manual_seed(count)  # nothing may depend on the global generator
        with pytest.raises(Killed):
            example.run(config)
        AcceleratorState._reset_state(True)
    example.run(config)
    assert_same(tmp_path, reference_run)


def test_a_run_killed_between_training_and_writing_the_result_resumes(data, reference_run, tmp_path, monkeypatch):
    """A folder with half of its files does not count as a finished stage."""
    config = config_for(data, tmp_path)
    for owner, name in (
        (example, "save_tensors"),  # of the latents, before the autoencoder's folder
        (example.AutoencoderKL, "save_pretrained"),
        (example, "save_image_processor"),  # after the classifier's weights
        (example.DDIMScheduler, "save_pretrained"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, die)
            with pytest.raises(Killed):
                example.run(config)
        AcceleratorState._reset_state(True)
    example.run(config)
    assert_same(tmp_path, reference_run)


def test_a_finished_run_is_not_changed(data, reference_run, monkeypatch):
    before = contents(reference_run)[0]
    stamps = {path: path.stat().st_mtime_ns for path in reference_run.rglob("*model.safetensors")}
    for stage in ("train_autoencoder", "train_classifier", "train_diffusion"):
        monkeypatch.setattr(example, stage, lambda *_: pytest.fail("a finished stage ran again"))
    example.run(config_for(data, reference_run))
    assert contents(reference_run)[0] == before
    assert len(stamps) == 4
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


SUICIDE = """
import os, signal, warnings
warnings.simplefilter("ignore")
import torch, embedded_training, train_embedded_checkpoint as example
torch.set_num_threads(1)
indices = embedded_training.batch_indices
def batch_indices(count, stage, step, seed):
    if (stage.steps, step) == (7, 5):
        os.kill(os.getpid(), signal.SIGKILL)
    return indices(count, stage, step, seed)
embedded_training.batch_indices = batch_indices
example.main()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_the_command_line_resumes_after_sigkill(data, reference_run, tmp_path, monkeypatch):
    path, config = tmp_path / "config.yaml", config_for(data, tmp_path / "output")
    path.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    command = [sys.executable, "-c", SUICIDE, "--config", str(path)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (tmp_path / "output" / "checkpoint" / "classifier").exists()
    assert not (tmp_path / "output" / "checkpoint" / "scheduler").exists()
    monkeypatch.setattr(sys, "argv", ["train_embedded_checkpoint.py", "--config", str(path)])
    example.main()
    assert_same(tmp_path / "output", reference_run)


@pytest.mark.slow
def test_two_processes_train_to_the_result_of_one(data, reference_run, tmp_path):
    path, config = tmp_path / "config.yaml", config_for(data, tmp_path / "output")
    path.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(EXAMPLES / "train_embedded_checkpoint.py"), "--config", str(path)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
    torch.manual_seed(1)
    initial = example.Reconstruction(example.make_autoencoder()).state_dict()
    one, two = (
        load_tensors(folder / "autoencoder_state.safetensors")[0] for folder in (reference_run, tmp_path / "output")
    )
    prefix = "module.autoencoder."
    steps = [
        torch.cat([(state[prefix + name] - value).flatten() for name, value in initial.items()])
        for state in (one, two)
    ]
    # AdamW divides by the gradient's size, so rounding of the smallest gradients shows (4e-5). Gradients that are not
    # averaged give 0.7.
    assert float((steps[0] - steps[1]).norm() / steps[0].norm()) < 1e-2


def test_mixed_precision_trains(data, tmp_path):
    config = config_for(data, tmp_path, mixed_precision="bf16")
    accelerator = example.Accelerator(mixed_precision="bf16")
    example.train_autoencoder(config, accelerator, tmp_path / "checkpoint")
    weights, _ = load_tensors(tmp_path / "checkpoint" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_the_loss_log_has_means_of_the_losses(data, tmp_path, monkeypatch):
    def loss_of(modules, indices, generator, rows):
        assert rows == slice(0, 4)
        return (modules["network"](torch.ones(1, 1)) - 3.0).square().mean()

    stage = dataclasses.replace(config_for(data, tmp_path).classifier, steps=200, save_every=50, learning_rate=1e-9)
    killing(monkeypatch, [(200, 160)])
    for attempt in range(2):
        network = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(network.weight)
        torch.nn.init.zeros_(network.bias)
        arguments = ("toy", {"network": network}, loss_of, 40, stage, config_for(data, tmp_path))
        accelerator = example.Accelerator(mixed_precision="no")
        if attempt:
            example.train(*arguments, accelerator)
        else:
            with pytest.raises(Killed):
                example.train(*arguments, accelerator)
    lines = [json.loads(line) for line in (tmp_path / "toy_loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [100, 200]
    assert [line["loss"] for line in lines] == pytest.approx([9.0, 9.0], rel=1e-5)  # also from step 150 on alone


def test_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    def loss_of(modules, indices, generator, rows):
        return modules["network"](torch.full((1, 1), torch.nan)).sum()

    accelerator = example.Accelerator(mixed_precision="no")
    arguments = ("toy", {"network": torch.nn.Linear(1, 1)}, loss_of, 40, config_for(data, tmp_path).classifier)
    with pytest.raises(NumericalError, match=r"toy: loss is not finite at step 0; .* '.*toy_state.safetensors'"):
        example.train(*arguments, config_for(data, tmp_path), accelerator)


def test_batches_are_pieces_of_one_permutation_per_epoch():
    stage = example.Optimisation(1, 4, 1e-3, 0.0, 0, 0.0, 1)
    epochs = [
        torch.cat([embedded_training.batch_indices(10, stage, step, 0) for step in (first, first + 1)])
        for first in (0, 2)
    ]
    for epoch in epochs:
        assert len(epoch.unique()) == 8
    assert not torch.equal(*epochs)
    assert torch.equal(embedded_training.batch_indices(10, stage, 3, 0), epochs[1][4:])
    assert not torch.equal(embedded_training.batch_indices(10, stage, 3, 1), epochs[1][4:])
    with pytest.raises(InputError, match="`batch_size` is 4, but there are 3 images; allowed: at most as many"):
        embedded_training.batch_indices(3, stage, 0, 0)


def rates_from(stage, start):
    """Returns the learning rates of the steps from `start` on, and the rate after the last step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = embedded_training.learning_rates(optimizer, stage, start)
    rates = []
    for _ in range(start, stage.steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_learning_rate_warms_up_and_falls_to_zero():
    stage = example.Optimisation(10, 4, 1.0, 0.0, 2, 0.0, 1)
    rates = rates_from(stage, 0)
    assert [rates[step] for step in (0, 1, 2, 6, 10)] == pytest.approx([1 / 3, 2 / 3, 1, 0.5, 0])
    assert rates_from(dataclasses.replace(stage, warmup_steps=0), 0)[0] == 1.0


def test_learning_rates_of_a_resumed_run_are_those_of_an_unbroken_one():
    stage = example.Optimisation(10, 4, 1e-3, 0.0, 3, 0.0, 1)
    for start in range(10):
        assert rates_from(stage, start) == rates_from(stage, 0)[start:]


def test_idx_files_are_read_and_padded(data):
    images, labels = fashion_mnist.load("train", data)
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == (
        (40, 1, 32, 32),
        torch.uint8,
        (40,),
        torch.int64,
    )
    assert not images[:, :, :2].any()
    assert not images[..., -2:].any()
    raw = fashion_mnist.read_idx(data / "train-images-idx3-ubyte.gz")
    assert torch.equal(images[:, 0, 2:-2, 2:-2], torch.from_numpy(raw.copy()))
    pixels = fashion_mnist.to_rgb(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    assert pixels.tolist() == [[[[-1.0, 1.0]]] * 3]


def test_bad_data_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No folder '.*nothing'.*apt-get install dataset-fashion-mnist"):
        fashion_mnist.load("train", tmp_path / "nothing")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00\x00\x00\x00")
    with pytest.raises(ValueError, match="is not an IDX file of unsigned bytes"):
        fashion_mnist.load("train", tmp_path)
