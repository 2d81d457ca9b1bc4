"""Configuration files: values arrive in their fields' types, and every mistake is named with its place."""

import dataclasses
import re
from pathlib import Path

import pytest

from diffusers_fisher import InputError
from diffusers_fisher.jobs.config import build_config, load_config


@dataclasses.dataclass
class Stage:
    steps: int
    learning_rate: float
    warmup: float = 0.1


@dataclasses.dataclass
class Config:
    seed: int
    name: str
    stage: Stage
    limit: int | None = None
    sizes: list[int] = dataclasses.field(default_factory=lambda: [8, 16])
    resume: bool = True


GOOD = {"seed": 0, "name": "run", "stage": {"steps": 10, "learning_rate": 1}}


def changed(**changes):
    return {**GOOD, **changes}


def test_values_and_defaults_arrive_in_their_fields():
    config = build_config(Config, changed(limit=3, resume=False))
    assert config == Config(0, "run", Stage(10, 1.0), limit=3, resume=False)
    assert type(config.stage.learning_rate) is float  # 1 in YAML is a fine learning rate
    assert build_config(Config, changed(limit=None)) == Config(0, "run", Stage(10, 1.0))


ALLOWED = r"allowed: \['limit', 'name', 'resume', 'seed', 'sizes', 'stage'\]"
MISTAKES = {
    "unknown key": (changed(sede=1), rf"config has unknown keys \['sede'\]; {ALLOWED}"),
    "unknown key inside": (changed(stage={**GOOD["stage"], "step": 1}), r"config.stage has unknown keys \['step'\]"),
    "missing key": ({"name": "run", "stage": GOOD["stage"]}, "config lacks the key 'seed'.* no default in Config"),
    "missing key inside": (changed(stage={"steps": 1}), "config.stage lacks the key 'learning_rate'"),
    "text for a number": (changed(seed="0"), r"config.seed is '0' \(str\); allowed: int"),
    "fraction for an integer": (changed(seed=0.5), r"config.seed is 0.5 \(float\); allowed: int"),
    "truth value for an integer": (changed(seed=True), r"config.seed is True \(bool\); allowed: int"),
    "truth value for a number": (
        changed(stage={"steps": 1, "learning_rate": True}), r"config.stage.learning_rate is True \(bool\)",
    ),
    "number for a truth value": (changed(resume=1), r"config.resume is 1 \(int\); allowed: bool"),
    "number for a text": (changed(name=3), r"config.name is 3 \(int\); allowed: str"),
    "nothing for a number": (changed(seed=None), r"config.seed is None \(NoneType\); allowed: int"),
    "text for an optional number": (changed(limit="3"), r"config.limit is '3' \(str\); allowed: int, NoneType"),
    "number for a list": (changed(sizes=8), r"config.sizes is 8 \(int\); allowed: list"),
    "list for a stage": (changed(stage=[1]), "config.stage must be a mapping of Stage fields, got list"),
    "text for everything": ("seed: 0", "config must be a mapping of Config fields, got str"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_with_their_place(name):
    values, message = MISTAKES[name]
    with pytest.raises(InputError, match=message):
        build_config(Config, values)


def test_yaml_file_is_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\nname: é\nstage:\n  steps: 10\n  learning_rate: 2.0e-3\n", encoding="utf-8")
    assert load_config(path, Config) == Config(3, "é", Stage(10, 0.002))


FILES = {
    "empty": ("", "must be a mapping of Config fields, got NoneType"),
    "not yaml": ("seed: [1,", "can't be read: "),
    # YAML 1.1 reads a number without a point as a text: it must not become one silently.
    "number that is a text": (
        "seed: 3\nname: a\nstage:\n  steps: 1\n  learning_rate: 2e-3\n",
        r"stage.learning_rate is '2e-3' \(str\); allowed: float",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files_are_refused_by_name(tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(str(path)) + ".*" + message):
        load_config(path, Config)


def test_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"Config file '.*nothing.yaml' can't be read"):
        load_config(tmp_path / "nothing.yaml", Config)


def test_shipped_config_is_what_its_script_reads():
    import train_embedded_checkpoint  # in examples/

    path = Path(__file__).parents[2] / "configs" / "embedded_checkpoint.yaml"
    config = load_config(path, train_embedded_checkpoint.Config)
    for stage in (config.classifier, config.autoencoder, config.diffusion):
        assert 0 < stage.learning_rate < 1
        assert stage.steps % stage.save_every == 0
