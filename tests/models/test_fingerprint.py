"""A fingerprint accepts the same denoiser in every form, and refuses another one and says what differs."""

import copy
import gc
import json
import re
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import tiny
import torch
from cases import STABLE_DIFFUSION, ZERO_SNR
from peft import LoraConfig
from trace_cases import GaussianData, GaussianDenoiser

from diffusers_fisher import FisherTraceModel, InputError, PipelineDenoiser, UnsupportedError, embedded_checkpoint
from diffusers_fisher.models import denoiser_fingerprint, fingerprint, fingerprint_differences, network_key
from diffusers_fisher.models.fingerprint import _spread

FIRST = json.loads(Path(__file__).with_name("first_fingerprint.json").read_text())
"""The embedded checkpoint's fingerprint of the first release, without `counts` and `matrices`."""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion()


@pytest.fixture(scope="module")
def embedded():
    return tiny.quiet(diffusers.StableDiffusionPipeline.from_pretrained(embedded_checkpoint()))


def first_release(mark):
    return {key: value for key, value in mark.items() if key not in ("counts", "matrices")}


def in_dtype(pipe, dtype):
    """Returns the pipeline with its network in another dtype."""
    return SimpleNamespace(unet=copy.deepcopy(pipe.unet).to(dtype), scheduler=pipe.scheduler)


def test_fingerprint_is_json_and_the_same_for_pipeline_and_denoiser(pipe):
    mark = denoiser_fingerprint(pipe)
    assert json.loads(json.dumps(mark)) == mark
    assert denoiser_fingerprint(PipelineDenoiser(pipe, prompt="a")) == mark
    assert fingerprint_differences(mark, mark) == []


def test_sampler_does_not_change_the_denoiser(pipe):
    mark = denoiser_fingerprint(pipe)
    for kind in (diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.DDPMScheduler):
        other = tiny.stable_diffusion(scheduler=kind.from_config(pipe.scheduler.config))
        assert fingerprint_differences(mark, denoiser_fingerprint(other)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_dtype_does_not_change_the_denoiser(pipe, embedded, dtype):
    mark = denoiser_fingerprint(pipe)
    assert fingerprint_differences(mark, denoiser_fingerprint(in_dtype(pipe, dtype))) == []
    assert fingerprint_differences(denoiser_fingerprint(in_dtype(pipe, dtype)), mark) == []
    other = in_dtype(embedded, dtype)
    assert fingerprint_differences(FIRST, denoiser_fingerprint(other)) == []
    assert fingerprint_differences(denoiser_fingerprint(embedded), denoiser_fingerprint(other)) == []
    FisherTraceModel.from_pretrained(embedded_checkpoint(), subfolder="trace_model").check_fingerprint(other)


def test_weights_that_are_not_in_memory_agree_with_all_others(pipe):
    assert fingerprint_differences(denoiser_fingerprint(pipe), denoiser_fingerprint(in_dtype(pipe, "meta"))) == []


def test_compiled_network_is_the_same_denoiser(pipe):
    mark = denoiser_fingerprint(pipe)
    compiled_whole, compiled_part, compiled_in_place = (in_dtype(pipe, torch.float32) for _ in range(3))
    compiled_whole.unet = torch.compile(
        compiled_whole.unet, backend="eager"
    )  # compiles at the first call, and there is none
    compiled_part.unet.mid_block = torch.compile(compiled_part.unet.mid_block, backend="eager")
    compiled_in_place.unet.compile(backend="eager")
    assert type(compiled_whole.unet).__name__ == "OptimizedModule"
    for other in (compiled_whole, compiled_part, compiled_in_place):
        assert denoiser_fingerprint(other) == mark


def fine_tuned():
    pipe = tiny.stable_diffusion()
    with torch.no_grad():
        for parameter in pipe.unet.parameters():  # a fine-tune by one per cent
            parameter += 0.01 * parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=seeded())
    return pipe


OTHERS = {
    "weights of the denoiser": fine_tuned,
    "configuration of the denoiser": lambda: tiny.stable_diffusion(unet=tiny.unet(act_fn="gelu")),
    "names or shapes of parameters": lambda: tiny.stable_diffusion(unet=tiny.unet(layers_per_block=2)),
    "prediction type: trained for epsilon, got v_prediction": lambda: tiny.stable_diffusion(
        scheduler=tiny.scheduler(prediction_type="v_prediction")
    ),
    "schedule: trained for .*-3.535": lambda: tiny.stable_diffusion(scheduler=tiny.scheduler(beta_end=0.02)),
}


class Matrices(torch.nn.Module):
    """Eight layers of 65,536 weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(256, 256, bias=False) for _ in range(8))


def pipeline_with_change(part, seed, layers=8):
    """Makes a pipeline of `Matrices` whose first layers differ by a part of their size."""
    network, generator = Matrices(), seeded(seed)
    with torch.no_grad():
        for layer in network.layers[:layers]:
            layer.weight += part * layer.weight.std() * torch.randn(layer.weight.shape, generator=generator)
    return SimpleNamespace(unet=network, scheduler=tiny.scheduler())


@pytest.mark.parametrize("part", [0.01, 0.02, 0.03, 0.3])
def test_changes_by_a_per_cent_are_noticed_however_large_the_tensors(part):
    mark = denoiser_fingerprint(pipeline_with_change(0, 0))
    for seed in range(10):
        other_mark = denoiser_fingerprint(pipeline_with_change(part, seed))
        (words,) = fingerprint_differences(mark, other_mark)
        (size,) = re.findall(r"weights of the denoiser \(by about (\S+) of their size\)", words)
        assert part / 2 < float(size) < 4 * part  # the largest of eight projections is about 1.4 standard deviations
        if part > 0.01:  # all eight projections of a change by one per cent may be below the tolerance
            assert len(fingerprint_differences(first_release(mark), other_mark)) == 1


def test_changes_of_a_few_matrices_count_by_their_part_of_all():
    mark = denoiser_fingerprint(pipeline_with_change(0, 0))
    for seed in range(10):
        other_mark = denoiser_fingerprint(pipeline_with_change(0.03, seed, layers=2))
        difference = torch.tensor(other_mark["matrices"]) - torch.tensor(mark["matrices"])
        # The change is 0.03 in two of eight. A root mean square of 32 projections is within 40% (three deviations).
        assert float(difference.square().mean().sqrt()) == pytest.approx(0.03 / 2, rel=0.4)


def test_changes_of_other_parameters_than_the_sampled_ones_are_noticed():
    """16 of 32 layers are sampled one by one. The other 16 change by 3%."""
    network = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(32))
    pipe = SimpleNamespace(unet=network, scheduler=tiny.scheduler())
    mark, before = denoiser_fingerprint(pipe), [layer.weight.clone() for layer in network]
    parameters = dict(sorted(network.named_parameters()))
    sampled_ids = {id(parameters[name]) for name in _spread(list(parameters))}
    with torch.no_grad():
        for layer in network:
            if id(layer.weight) not in sampled_ids:
                layer.weight += 0.03 * layer.weight.std() * torch.randn(64, 64, generator=seeded(1))
    other_mark = denoiser_fingerprint(pipe)
    assert sum(torch.equal(layer.weight, weight) for layer, weight in zip(network, before, strict=True)) == 16
    assert fingerprint_differences(first_release(mark), other_mark) == []
    (words,) = fingerprint_differences(mark, other_mark)
    assert "weights of the denoiser" in words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [["to_q", "to_k", "to_v", "to_out.0"], ["attn2.to_k", "attn2.to_v"]], ids=len)
def test_fused_lora_is_noticed(embedded, targets, dtype):
    mark = denoiser_fingerprint(embedded)
    network = copy.deepcopy(embedded.unet)
    network.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian"))
    generator = seeded()
    sizes = []
    with torch.no_grad():
        for layer in network.modules():
            if hasattr(layer, "lora_B"):
                down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                up.copy_(torch.randn(up.shape, generator=generator))
                up *= 0.05 * layer.weight.norm() / (up @ down).norm()  # by five per cent of the layer's own
                sizes.append(float((up @ down).norm() / layer.weight.norm()))
    assert sizes == pytest.approx([0.05] * len(sizes))
    network.fuse_lora()
    network.unload_lora()
    fused_pipe = SimpleNamespace(unet=network.to(dtype), scheduler=embedded.scheduler)
    other_mark = denoiser_fingerprint(fused_pipe)
    assert other_mark["parameters"] == mark["parameters"]
    (words,) = fingerprint_differences(mark, other_mark)
    assert words.startswith("weights of the denoiser")
    assert words.endswith("another checkpoint, a fine-tune or a fused LoRA")


@pytest.mark.parametrize("words", OTHERS)
def test_another_denoiser_is_refused_with_what_differs(words, pipe):
    model = GaussianData().model()
    model.set_fingerprint(pipe)
    model.check_fingerprint(pipe)
    with pytest.raises(InputError, match=f"What differs: .*{words}"):
        model.check_fingerprint(OTHERS[words]())


def test_fingerprint_survives_saving(pipe, tmp_path):
    model = GaussianData().model()
    model.set_fingerprint(pipe)
    model.save_pretrained(tmp_path)
    loaded_model = FisherTraceModel.from_pretrained(tmp_path)
    loaded_model.check_fingerprint(pipe)
    with pytest.raises(InputError, match="was trained for another denoiser"):
        loaded_model.check_fingerprint(fine_tuned())


def test_model_without_a_fingerprint_takes_every_denoiser(pipe):
    GaussianData().model().check_fingerprint(pipe)


SCHEDULERS = {
    "epsilon": (diffusers.DDIMScheduler, {}),
    "v_prediction": (diffusers.DDIMScheduler, {"prediction_type": "v_prediction"}),
    "sample": (diffusers.DDIMScheduler, {"prediction_type": "sample"}),
    "zero SNR": (diffusers.DDIMScheduler, {**STABLE_DIFFUSION, **ZERO_SNR}),
    "k-diffusion": (diffusers.EulerDiscreteScheduler, {}),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
    "EDM": (diffusers.EDMEulerScheduler, {}),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_denoisers_without_a_network_have_prediction_and_schedule(scheduler):
    kind, config = SCHEDULERS[scheduler]
    instance = kind(**config)
    mark = denoiser_fingerprint(GaussianDenoiser(GaussianData(), instance))
    assert set(mark) == {"prediction_type", "schedule"}
    assert json.loads(json.dumps(mark, allow_nan=False)) == mark
    assert mark["schedule"] == sorted(mark["schedule"])


def test_fingerprint_needs_a_scheduler():
    with pytest.raises(UnsupportedError, match="needs a pipeline or a denoiser with a `scheduler`, got Linear"):
        denoiser_fingerprint(torch.nn.Linear(1, 1))


# The key of a network, which says whether its fingerprint must be computed again


def with_lora(network):
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="gaussian"), "first")
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="gaussian"), "second")
    network.set_adapters(["first"], [1.0])


def scale_lora(network):
    network.set_adapters(["first"], [0.5])


def train_lora(network):
    with torch.no_grad():
        next(module for module in network.modules() if hasattr(module, "lora_B")).lora_B["first"].weight += 0.1


def merge_tokens(network):
    """Changes the network as tomesd does: the blocks get another class, and the network gets settings."""
    block = network.mid_block.attentions[0].transformer_blocks[0]
    block.__class__ = type("ToMeBlock", (type(block),), {})
    network._tome_info = {"args": {"ratio": 0.5}, "hooks": []}


def set_processors(network):
    processor = diffusers.models.attention_processor.AttnProcessor()
    network.set_attn_processor(processor)


def change_processor(network):
    next(iter(network.attn_processors.values())).strength = 0.5


CHANGES = {
    "in place": lambda network: torch.nn.init.ones_(network.conv_out.weight),
    "data in place": lambda network: [parameter.data.mul_(1.001) for parameter in network.parameters()],
    "data of one parameter": lambda network: network.conv_in.weight.data.mul_(1.001),
    "another tensor": lambda network: setattr(network.conv_in, "bias", torch.nn.Parameter(network.conv_in.bias + 0)),
    "adapters": with_lora,
    "scale of an adapter": scale_lora,
    "other adapter": lambda network: network.set_adapter("second"),
    "weights of an adapter": train_lora,
    "no adapters": lambda network: network.disable_adapters(),
    "fused adapter": lambda network: network.fuse_lora(),
    "FreeU": lambda network: network.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "FreeU's factors": lambda network: network.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4),
    "no FreeU": lambda network: network.disable_freeu(),
    "merged tokens": merge_tokens,
    "ratio of merged tokens": lambda network: network._tome_info["args"].update(ratio=0.3),
    "attention processors": set_processors,
    "attribute of a processor": change_processor,
    "forward hook": lambda network: network.mid_block.register_forward_hook(lambda *args: None),
    "forward pre-hook": lambda network: network.mid_block.register_forward_pre_hook(lambda *args: None),
    "configuration": lambda network: network.register_to_config(act_fn="gelu"),
    "dtype": lambda network: network.half(),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # two adapters on purpose
def test_key_changes_with_everything_that_changes_the_network():
    network = tiny.unet()
    key = network_key(network)
    for name, change in CHANGES.items():
        change(network)
        following = network_key(network)
        assert following != key, name
        assert network_key(network) == following, name
        key = following


@pytest.fixture
def computed_networks(monkeypatch):
    """Returns the list of the networks whose fingerprints are computed anew."""
    networks = []
    compute = fingerprint._network_fingerprint

    def compute_and_record(network):
        networks.append(network)
        return compute(network)

    monkeypatch.setattr(fingerprint, "_network_fingerprint", compute_and_record)
    return networks


def test_fingerprint_is_computed_once_and_again_after_a_change(computed_networks):
    pipe = tiny.stable_diffusion()
    marks = [denoiser_fingerprint(each) for each in (pipe, pipe, PipelineDenoiser(pipe, prompt="a"))]
    assert marks[0] == marks[1] == marks[2]
    assert computed_networks == [pipe.unet]
    for parameter in pipe.unet.parameters():
        parameter.data.mul_(torch.linspace(1, 2, parameter.numel()).view_as(parameter))
    assert "weights of the denoiser" in fingerprint_differences(marks[0], denoiser_fingerprint(pipe))[0]
    pipe.unet.conv_in.weight.data.neg_()
    denoiser_fingerprint(pipe)
    assert len(computed_networks) == 3
    pipe.scheduler = tiny.scheduler(beta_end=0.02)  # the scheduler is no part of the network
    assert denoiser_fingerprint(pipe)["schedule"] != marks[0]["schedule"]
    assert len(computed_networks) == 3


def test_a_caller_cannot_change_the_stored_fingerprint(computed_networks, pipe):
    mark = denoiser_fingerprint(pipe)
    mark["weights"].clear()
    assert denoiser_fingerprint(pipe)["weights"]


def test_stored_fingerprints_hold_no_network():
    pipe = tiny.stable_diffusion()
    denoiser_fingerprint(pipe)
    network = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert network() is None


def test_weights_without_a_version_have_a_key():
    with torch.inference_mode():
        network = torch.nn.Linear(3, 3)
    assert network_key(network) == network_key(network)
    assert network_key(torch.nn.Linear(3, 3, device="meta")) != network_key(network)


def test_key_of_few_parameters_reads_64_values_too():
    network = torch.nn.Linear(64, 64, bias=False)
    num_changes = 0
    for index in range(64):
        key = network_key(network)
        network.weight.data[index] += 1
        num_changes += network_key(network) != key
    assert num_changes == 64  # one value of each row


@pytest.mark.slow  # not long, but timed: it must not depend on what else the machine does
def test_key_costs_less_than_5_milliseconds(embedded):
    times = []
    for _ in range(200):
        begin = time.process_time()
        network_key(embedded.unet)
        times.append(time.process_time() - begin)
    assert min(times) < 5e-3  # the least of many, as other processes may slow the machine
