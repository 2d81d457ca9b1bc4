"""Values of configuration files get the types of their fields, and every mistake is named with its place."""

import dataclasses
import re
from pathlib import Path

import pytest

from diffusers_fisher import InputError
from diffusers_fisher.jobs.config import build_config, load_config
from diffusers_fisher.jobs.pipelines import DenoiserSettings
from diffusers_fisher.settings import Fraction, settings_class


@settings_class
class Stage:
    steps: int
    learning_rate: float
    warmup: Fraction = 0.1

    def __post_init__(self):
        if self.steps < self.warmup:
            raise InputError(f"`steps` is {self.steps}, `warmup` {self.warmup}; allowed: not fewer steps than that.")


@settings_class
class Config:
    seed: int
    name: str
    stage: Stage
    limit: int | None = None
    sizes: list[int] = dataclasses.field(default_factory=lambda: [8, 16])
    resume: bool = True


GOOD = {"seed": 0, "name": "run", "stage": {"steps": 10, "learning_rate": 1}}


def values(**changes):
    return {**GOOD, **changes}


def test_fields_get_their_values_and_defaults():
    config = build_config(Config, values(limit=3, resume=False))
    assert config == Config(0, "run", Stage(10, 1.0), limit=3, resume=False)
    assert type(config.stage.learning_rate) is float  # YAML may have 1 for a learning rate
    assert build_config(Config, values(limit=None)) == Config(0, "run", Stage(10, 1.0))


MISTAKES = {
    "unknown key": (values(sede=1), "`sede` is an unknown key; allowed: limit, name, resume, seed, sizes, stage"),
    "unknown key inside": (
        values(stage={**GOOD["stage"], "step": 1}),
        r"`stage\.step` is an unknown key; allowed: learning_rate, steps, warmup",
    ),
    "missing key": ({"name": "run", "stage": GOOD["stage"]}, "`seed` is missing and has no default; add it"),
    "missing key inside": (values(stage={"steps": 1}), r"`stage\.learning_rate` is missing"),
    "text for a number": (values(seed="0"), r"`seed` is '0' \(str\); allowed: a valid integer"),
    "fraction for an integer": (values(seed=0.5), r"`seed` is 0\.5 \(float\); allowed: a valid integer"),
    "truth value for an integer": (values(seed=True), r"`seed` is True \(bool\); allowed: a valid integer"),
    "truth value for a number": (
        values(stage={"steps": 1, "learning_rate": True}),
        r"`stage\.learning_rate` is True \(bool\); allowed: a valid number",
    ),
    "number for a truth value": (values(resume=1), r"`resume` is 1 \(int\); allowed: a valid boolean"),
    "number for a text": (values(name=3), r"`name` is 3 \(int\); allowed: a valid string"),
    "nothing for a number": (values(seed=None), r"`seed` is None \(NoneType\); allowed: a valid integer"),
    "text for an optional number": (values(limit="3"), r"`limit` is '3' \(str\); allowed: a valid integer"),
    "number for a list": (values(sizes=8), r"`sizes` is 8 \(int\); allowed: a valid (array|list)"),
    "text in a list": (values(sizes=[8, "9"]), r"`sizes\.1` is '9' \(str\); allowed: a valid integer"),
    "list for a stage": (values(stage=[1]), r"`stage` is \[1\] \(list\); allowed: a mapping with keys learning_rate"),
    "text for everything": ("seed: 0", r"it is 'seed: 0' \(str\); allowed: a mapping with keys limit, name, resume"),
    "number out of its range": (
        values(stage={**GOOD["stage"], "warmup": 1.5}), r"`stage\.warmup` is 1\.5; allowed: less than or equal to 1",
    ),
    "no number": (values(stage={**GOOD["stage"], "warmup": float("nan")}), r"`stage\.warmup` is nan; allowed: "),
    "fields that do not fit": (values(stage={"steps": 0, "learning_rate": 1.0}), "`stage`: `steps` is 0, `warmup`"),
    "two mistakes": (values(seed="0", name=3), r"`seed` is '0' .*integer\. `name` is 3 .*string\."),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_with_their_place(name):
    content, message = MISTAKES[name]
    with pytest.raises(InputError, match="^config: .*" + message):
        build_config(Config, content)


def test_mistakes_in_code_are_named_by_their_field():
    stage = Stage(10, 1.0)
    for make, message in (
        (lambda: Stage(10, 1.0, warmup=2.0), r"^`warmup` is 2\.0; allowed: less than or equal to 1\.$"),
        (lambda: dataclasses.replace(stage, steps=0), r"^`steps` is 0, `warmup` 0\.1; allowed: "),
        (lambda: Stage(10, 1.0, step=1), "^`step` is an unknown key; allowed: learning_rate, steps, warmup"),
        (lambda: DenoiserSettings("embedded", dtype="int8"), r"^`dtype` is 'int8'; allowed: 'float32', 'bfloat16' or"),
        (lambda: Config(0, "run", {"steps": 1}), r"^`stage` is \{.*\(dict\); allowed: an instance of Stage"),
    ):
        with pytest.raises(InputError, match=message):
            make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        stage.steps = 3
    assert dataclasses.asdict(stage) == {"steps": 10, "learning_rate": 1.0, "warmup": 0.1}


def test_yaml_file_is_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\nname: é\nstage:\n  steps: 10\n  learning_rate: 2.0e-3\n", encoding="utf-8")
    assert load_config(path, Config) == Config(3, "é", Stage(10, 0.002))


FILES = {
    "empty": ("", r"it is None \(NoneType\); allowed: a mapping with keys limit"),
    "not yaml": ("seed: [1,", "can't be read: "),
    # YAML 1.1 reads a number without a point as a text: it must not become one silently.
    "number that is a text": (
        "seed: 3\nname: a\nstage:\n  steps: 1\n  learning_rate: 2e-3\n",
        r"`stage\.learning_rate` is '2e-3' \(str\); allowed: a valid number",
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


def test_shipped_config_fits_its_script():
    import train_embedded_checkpoint  # in examples/

    path = Path(__file__).parents[2] / "configs" / "embedded_checkpoint.yaml"
    config = load_config(path, train_embedded_checkpoint.Config)
    for stage in (config.classifier, config.autoencoder, config.diffusion):
        assert 0 < stage.learning_rate < 1
        assert stage.steps % stage.save_every == 0
