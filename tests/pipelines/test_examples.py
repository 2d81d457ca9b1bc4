"""The example scripts: on a tiny checkpoint of every backbone, and on tiny components of every family."""

import json
import math

import pytest
from backbones import every_family, steer_and_score

from pipelines.backbones import BACKBONES
from pipelines.outside import SET_UPS


@pytest.mark.parametrize("name", BACKBONES)
def test_script_steers_and_scores(name, tmp_path, capsys):
    backbone = BACKBONES[name]
    backbone.ours().save_pretrained(tmp_path)
    conditions = [str(condition) for condition in backbone.condition or []]
    options = {key: value for key, value in backbone.options.items() if key == "max_sequence_length"}
    height, width = backbone.pixels
    result = steer_and_score.main(
        [name, str(tmp_path), "--steps", "3", "--guidance-steps", "2", "--options", json.dumps(options), "--size",
         str(height), str(width), *(["--condition", *conditions] if conditions else [])]
    )  # fmt: skip
    assert json.loads(capsys.readouterr().out) == result
    assert len(result["rewards"]) == 3
    assert len(result["bits_per_dim"]) == (2 if conditions else 1)
    assert max(result["rewards"]) > result["rewards"][0]


def check_family(name):
    (result,) = every_family.main([name]).values()
    numbers = [value for key in ("bits_per_dim", "rewards") for value in result[key] if isinstance(result[key], list)]
    assert all(math.isfinite(number) for number in numbers)
    assert numbers or "Error: " in result["bits_per_dim"]


@pytest.mark.parametrize("name", ["StableDiffusion", "flux_kontext", "wan21_euler"])
def test_families_run_on_tiny_components(name):
    check_family(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*every_family.CLASSES, *SET_UPS])
def test_every_family_runs_on_tiny_components(name):
    check_family(name)


def test_names_of_families(capsys):
    assert every_family.main(["--list"]) == {}
    assert {"Flux", "ltx"} <= set(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        every_family.main(["nobody"])
    assert "there is no family nobody; there are: StableDiffusion," in capsys.readouterr().err
