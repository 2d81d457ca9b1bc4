"""`check` ends well on every family, and each broken set-up is named by its cause."""

import json
import math

import diffusers
import pytest
import tiny
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FluxTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig
from pipelines.outside import forget_backbones

from diffusers_fisher import (
    InputError,
    StableDiffusionFisherPipeline,
    UnsupportedError,
    backbone_of,
    check,
)
from diffusers_fisher.checks.calibration import find_cause
from diffusers_fisher.checks.lines import CheckLine, CheckReport, run_line
from diffusers_fisher.checks.pipeline import LINES
from diffusers_fisher.checks.subject import Subject

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NOT_RUN = {"calibration", "trace model", "reference"}


def subject_of(pipe, count=2, prompts=None, size=8):
    """Returns the subject of a check on random latents, for single lines."""
    backbone = backbone_of(pipe)
    samples = torch.randn(count, backbone.latent_channels, size, size, generator=torch.Generator().manual_seed(1))
    if prompts is None and backbone.takes_text:
        prompts = ["a b"] * count
    return Subject(backbone, samples, prompts)


def run(pipe, *names, **options):
    subject = subject_of(pipe, **options)
    for name in names:
        subject.found[name] = run_line(name, LINES[name], subject)
    return subject.found[names[-1]]


FAMILIES = {
    "Stable Diffusion": tiny.stable_diffusion,
    "Stable Diffusion XL": tiny.stable_diffusion_xl,
    "Stable Diffusion 3": lambda: tiny.stable_diffusion_3(texts=True),
    "Flux": lambda: tiny.flux(texts=True),
    "PixArt": tiny.pixart,
    "DDPM": tiny.unconditional,
}


def check_family(name, lines):
    """Checks a tiny pipeline by these lines, and the lines by what holds for all of them."""
    pipe, seen = FAMILIES[name](), []
    for encoder in (pipe.components.get("text_encoder"), pipe.components.get("text_encoder_2")):
        if encoder is not None:  # transformers leaves its hooks
            encoder(torch.zeros(1, 4, dtype=torch.long), output_hidden_states=True)
    before = tiny.snapshot(pipe)
    report = check(pipe, IMAGES, "a b" if name != "DDPM" else None, lines=lines, on_line=seen.append)
    assert tiny.snapshot(pipe) == before
    assert report.failed == [], report
    assert list(report.lines) == seen and [line.name for line in seen] == [name for name in LINES if name in lines]
    # torch has no forward derivative of group norm in channels_last, in which DDPM's networks get their input here.
    not_run = NOT_RUN | ({"step of differences"} if name == "DDPM" else set())
    assert {line.name for line in seen if line.status == "not run"} == not_run & set(lines)
    for line in seen:
        assert line.status == "ok" or line.cause, line
        assert line.status == "not run" or (line.measured and line.figures), line
    json.dumps(report.as_json(), allow_nan=False)
    assert set(report["estimators"].figures["estimators"]) >= {"autodiff", "differences", "direct", "Gaussian"}
    assert report["cost"].figures["evaluations"][0]["peak_bytes"] > 0
    return report


@pytest.mark.parametrize("name", ["Stable Diffusion", "DDPM"])
def test_a_right_checkpoint_ends_well(name):
    check_family(name, [name for name in LINES if name not in ("likelihood", "time")])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_right_checkpoint_ends_well_by_every_line(name):
    report = check_family(name, list(LINES))
    assert math.isfinite(sum(report["likelihood"].figures["bits_per_dim"]))
    assert report["time"].figures["seconds"]["1000"] == 1000 * report["likelihood"].figures["seconds_per_image"]


def test_the_model_draws_samples_where_there_are_no_images():
    report = check(tiny.one_channel(), prompts="a b", lines=["checkpoint", "calibration", "symmetry"])
    assert report["checkpoint"].figures["origin"] == "drawn by the model itself"
    assert report["calibration"].status == "not run" and "0 images" in report["calibration"].cause
    assert report.failed == []


def test_an_untrained_network_is_called_untrained():
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    backbone = backbone_of(tiny.one_channel())
    samples = backbone.samples_of(images)
    subject = Subject(backbone, samples, ["a b"] * 64, images)
    line = run_line("calibration", LINES["calibration"], subject)
    assert line.status == "failed" and "looks untrained" in line.cause and "weights were loaded" in line.cure


# Broken set-ups


def test_a_distilled_network_is_named():
    pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    line = run(pipe, "distillation")
    assert line.status == "warning" and "its scheduler is LCMScheduler" in line.cause
    assert run(tiny.stable_diffusion(), "distillation").status == "ok"


def test_guided_and_distilled_outputs_are_not_calibrated():
    pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    assert "its scheduler is LCMScheduler" in find_cause(subject_of(pipe), [])[0]
    assert "distilled guidance" in find_cause(subject_of(tiny.flux(texts=True, guidance_embeds=True)), [])[0]


def test_a_learned_variance_that_the_scheduler_does_not_know_is_named():
    torch.manual_seed(0)
    network = tiny.unconditional_unet(3)
    network.conv_out = torch.nn.Conv2d(network.conv_out.in_channels, 6, 3, padding=1)
    network.register_to_config(out_channels=6)
    for kind, status in (("fixed_small", "failed"), ("learned_range", "ok")):
        pipe = tiny.quiet(DDPMPipeline(unet=network, scheduler=DDPMScheduler(variance_type=kind, clip_sample=False)))
        line = run(pipe, "learned variance")
        assert line.status == status
        assert status == "ok" or ("learned its variance" in line.cause and "learned_range" in line.cure)
        assert run(pipe, "no guidance").status == status


def test_a_cache_is_named():
    torch.manual_seed(0)
    pipe = tiny.flux(texts=True)
    pipe.transformer = FluxTransformer2DModel.from_config(dict(pipe.transformer.config, num_layers=3)).eval()
    tiny.awaken(pipe.transformer)
    assert run(pipe, "pipeline's run").status == "ok"
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    line = run(pipe, "cache")
    assert (
        line.status == "warning" and "FBCHeadBlockHook" in line.measured + line.cause and "disable_cache" in line.cure
    )
    line = run(pipe, "pipeline's run")
    assert line.status == "failed" and "has a cache" in line.cause and "disable_cache" in line.cure


def test_dropout_is_named():
    pipe = tiny.stable_diffusion(unet=tiny.unet(dropout=0.5))
    pipe.unet.train()
    line = run(pipe, "pipeline's run")
    assert line.status == "failed" and "training mode" in line.cause and "eval mode" in line.cure


def test_a_scheduler_of_another_family_is_the_cause_of_every_line_that_evaluates():
    pipe = tiny.stable_diffusion()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    line = run(pipe, "no guidance")
    assert line.status == "failed" and "trained with variance-preserving noise" in line.cause
    assert "Use DDIMScheduler" in line.cure


# Lines and reports


def refuse(error):
    def measure(subject):
        raise error

    return measure


def test_an_error_of_a_line_is_its_cause():
    line = run_line("a", refuse(InputError("Got 3; allowed: 4. Pass 4.")), None)
    assert (line.status, line.cause, line.cure) == ("failed", "Got 3; allowed: 4.", "Pass 4.")
    assert run_line("a", refuse(InputError("One sentence.")), None).cause == "One sentence."
    assert run_line("a", refuse(RuntimeError("broken\nmore")), None).cause == "RuntimeError: broken"
    line = run_line("a", refuse(torch.OutOfMemoryError("3 GiB")), None)
    assert line.status == "not run" and "not enough memory: 3 GiB" in line.cause


def test_a_report_prints_every_line_and_finds_lines_by_name():
    lines = [CheckLine("ok", "fine", name="first"), CheckLine("failed", "", "Broken.", "Mend it.", name="second")]
    report = CheckReport("model", "cpu", lines)
    assert str(report).splitlines() == [
        "Check of model on cpu: 1 ok, 1 failed",
        "first  ok        fine",
        "second failed    Cause: Broken.",
        "                 Mend it.",
    ]
    assert report["second"].cure == "Mend it." and report.failed == ["second"]
    with pytest.raises(InputError, match="no line 'third'; allowed: first, second"):
        report["third"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.rand(2, 3, 15, 16)}, "multiples of 8"),
        ({"images": IMAGES, "prompts": ["a"]}, "1 entries for 2 images"),
        ({"images": IMAGES, "batch_size": 0}, "`batch_size` is 0; allowed: at least 1"),
        ({"images": IMAGES, "lines": ["speed"]}, r"`lines` is \['speed'\]; allowed: some of checkpoint"),
        ({"images": IMAGES, "lines": []}, r"`lines` is \[\]; allowed"),
        ({"images": IMAGES, "prompts": 3}, "`prompt` is 3; allowed: a string"),
    ],
)
def test_bad_arguments_are_refused_before_any_line(arguments, message):
    with pytest.raises(InputError, match=message):
        check(tiny.stable_diffusion(), on_line=lambda line: pytest.fail("a line ran"), **arguments)


def test_a_pipeline_without_a_backbone_is_refused(monkeypatch):
    forget_backbones(monkeypatch)
    with pytest.raises(UnsupportedError, match="AuraFlowPipeline has no backbone of its own"):
        check(tiny.aura_flow())
