"""Training that is stopped and resumed gives the same parameters as an unbroken run, bit for bit."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from diffusers_fisher import CheckpointError
from diffusers_fisher.files import load_tensors, save_tensors
from diffusers_fisher.seeds import step_generator
from diffusers_fisher.training.state import load_training_state, save_training_state


class Training:
    """A small network with everything that training state holds: buffers, moments, a moving average."""

    def __init__(self, memory_format=torch.contiguous_format, fused=False, width=4):
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, width, 3, padding=1), torch.nn.BatchNorm2d(width), torch.nn.SiLU(),
            torch.nn.Conv2d(width, 3, 3, padding=1),
        )  # fmt: skip
        self.format = memory_format
        self.modules = {"network": network.to(memory_format=memory_format)}
        self.parameters = list(network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-2, weight_decay=0.01, fused=fused)
        self.average = EMAModel(self.parameters, decay=0.9)

    def train(self, start, stop):
        for step in range(start, stop):
            generator = step_generator(0, "batch", step)
            x = torch.randn(2, 3, 5, 5, generator=generator).to(memory_format=self.format)
            loss = (self.modules["network"](x) - x.flip(1)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.average.step(self.parameters)

    def save(self, path, step):
        save_training_state(path, self.modules, self.optimizer, self.average.shadow_params, step)

    def load(self, path):
        step = load_training_state(path, self.modules, self.optimizer, self.average.shadow_params)
        self.average.optimization_step = step
        return step

    def tensors(self):
        moments = [value for state in self.optimizer.state.values() for _, value in sorted(state.items())]
        return [*self.modules["network"].state_dict().values(), *self.average.shadow_params, *moments]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_resumed_training_is_an_unbroken_run_bit_for_bit(tmp_path, memory_format, fused):
    path = tmp_path / "state.safetensors"
    reference = Training(memory_format, fused)
    reference.train(0, 3)
    reference.save(path, 3)
    reference.train(3, 7)
    torch.manual_seed(123)  # nothing may depend on the global generator
    training = Training(memory_format, fused)
    training.train(0, 1)  # loading replaces this state
    assert training.load(path) == 3
    training.train(3, 7)
    pairs = list(zip(reference.tensors(), training.tensors(), strict=True))
    assert len(pairs) == 9 + 6 + 18  # parameters and buffers, averages, two moments and a step per parameter
    assert all(torch.equal(expected, value) for expected, value in pairs)


def test_state_can_be_saved_before_the_first_step(tmp_path):
    training, other = Training(), Training()
    training.save(tmp_path / "state.safetensors", 0)
    other.train(0, 2)
    assert other.load(tmp_path / "state.safetensors") == 0
    other.train(0, 2)
    training.train(0, 2)
    assert all(torch.equal(a, b) for a, b in zip(training.tensors(), other.tensors(), strict=True))


def test_without_a_file_training_starts_at_step_zero(tmp_path):
    training = Training()
    before = [tensor.clone() for tensor in training.tensors()]
    assert training.load(tmp_path / "nothing.safetensors") == 0
    assert all(torch.equal(a, b) for a, b in zip(before, training.tensors(), strict=True))


def remove_tensors(prefix):
    def edit(tensors, metadata):
        return {name: value for name, value in tensors.items() if not name.startswith(prefix)}, metadata

    return edit


MISMATCHES = {
    "other width": (lambda tensors, metadata: (tensors, metadata), {"width": 6}),
    "no module": (remove_tensors("module."), {}),
    "no average": (remove_tensors("average."), {}),
    "no step": (lambda tensors, metadata: (tensors, {}), {}),
    "step is no number": (lambda tensors, metadata: (tensors, {"step": "three"}), {}),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_state_of_another_configuration_is_refused(tmp_path, name):
    edit, changes = MISMATCHES[name]
    path = tmp_path / "state.safetensors"
    training = Training()
    training.train(0, 1)
    training.save(path, 1)
    save_tensors(path, *edit(*load_tensors(path)))
    with pytest.raises(CheckpointError, match=r"(?s)safetensors' does not fit this configuration: .*Resume with"):
        Training(**changes).load(path)


def test_truncated_state_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    Training().save(path, 0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="It may be truncated"):
        Training().load(path)


def test_step_generators_depend_on_seed_and_keys_alone():
    def draw(*keys):
        return torch.randn(4, generator=step_generator(*keys)).tolist()

    torch.manual_seed(5)
    first = draw(0, "batch", 3)
    torch.manual_seed(6)
    assert draw(0, "batch", 3) == first
    others = [draw(1, "batch", 3), draw(0, "batch", 4), draw(0, "order", 3), draw(0, "batch"), draw(0, "batch", "3")]
    assert all(other != first for other in others)
    assert len({tuple(other) for other in others}) == len(others)
    assert step_generator(0, "batch", 3).initial_seed() >= 0
