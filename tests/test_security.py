"""What SECURITY.md says: files of others run no code, and only what the user names runs."""

import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import diffusers_fisher
from diffusers_fisher import CheckpointError, FisherError, InputError, embedded_checkpoint
from diffusers_fisher.data import ImageData, open_images
from diffusers_fisher.files import write_json
from diffusers_fisher.guidance import named_reward
from diffusers_fisher.guidance.rewards.models import aesthetic_head
from diffusers_fisher.jobs.pipelines import DenoiserSettings, load_pipeline

PACKAGE = Path(diffusers_fisher.__file__).parent
DANGEROUS = {
    r"trust_remote_code\W+True": {"pipelines/__init__.py", "pipelines/custom_pipeline.py"},  # in docstrings alone
    r"weights_only=False": set(),
    r"allow_pickle=True": set(),
    r"(?<!safe_)\byaml\.(unsafe_|full_)?load\b": set(),
    r"^\s*(import|from) (pickle|dill|joblib|marshal|shelve|subprocess)": set(),
    r"(?<![\w.])(eval|exec|compile|__import__)\(": set(),
    r"\bos\.(system|popen)\b": set(),
    r"import_module\(": {  # with names of the package; the reward takes a name of the user
        "__init__.py",
        "backbones/registry.py",
        "studies/transport.py",
        "guidance/rewards/named.py",
    },
}


@pytest.mark.parametrize("pattern", DANGEROUS)
def test_the_package_has_no_call_that_runs_code_of_files(pattern):
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert {name for name, text in files.items() if re.search(pattern, text, re.MULTILINE)} <= DANGEROUS[pattern]


class Harm:
    """An object that makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.fixture
def marker(tmp_path):
    """Yields the path of a file that code from another file would make."""
    file = tmp_path / "harm"
    yield file
    assert not file.exists()


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(embedded_checkpoint(), tmp_path / "checkpoint")


def test_the_harm_works(tmp_path):
    pickle.loads(pickle.dumps(Harm(tmp_path / "harm")))
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_head_that_is_a_pickle_is_refused(tmp_path, marker, write):
    write({"weight": Harm(marker)}, tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match="can't be read as a file of weights alone"):
        aesthetic_head(tmp_path / "head.pth")


def test_weights_that_are_a_pickle_are_refused(checkpoint, marker):
    (checkpoint / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"weight": Harm(marker)}, checkpoint / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="can't be loaded as a pipeline, because of its component 'vae'"):
        load_pipeline(DenoiserSettings(str(checkpoint)))


def write_code(path, marker):
    path.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")


def test_code_beside_a_pipeline_is_not_run(checkpoint, marker, monkeypatch):
    """Neither a file of code of the pipeline nor a module that the index names is imported."""
    monkeypatch.chdir(checkpoint)
    index = json.loads((checkpoint / "model_index.json").read_text())
    for name in ("pipeline", "harmful_module"):
        write_code(checkpoint / f"{name}.py", marker)
    for change in ({"_class_name": ["pipeline", "Mine"]}, {"scheduler": ["harmful_module", "Mine"]}):
        write_json(checkpoint / "model_index.json", index | change)
        with pytest.raises(FisherError):
            load_pipeline(DenoiserSettings(str(checkpoint)))
    assert "harmful_module" not in sys.modules


def test_code_beside_a_reward_model_is_not_run_and_nobody_is_asked(checkpoint, marker, monkeypatch):
    classifier = checkpoint / "classifier"
    config = json.loads((classifier / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
    config["auto_map"]["AutoModelForImageClassification"] = "code.Mine"
    write_json(classifier / "config.json", config)
    write_code(classifier / "code.py", marker)
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("The console was asked."))
    with pytest.raises(InputError, match=r"The reward 'classifier:.*' can't be loaded: "):
        named_reward(f"classifier:{classifier}:coat")


def test_code_beside_images_is_not_run(tmp_path, marker):
    folder = tmp_path / "images"
    folder.mkdir()
    write_code(folder / "images.py", marker)
    with pytest.raises(InputError):
        open_images(ImageData(str(folder)))


def test_the_readme_names_the_page():
    root = PACKAGE.parent
    assert "(SECURITY.md)" in (root / "README.md").read_text(encoding="utf-8")
    assert "tests/test_security.py" in (root / "SECURITY.md").read_text(encoding="utf-8")
