"""What installers and importers see: one version, the public names, light imports, a wheel with everything in it."""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import diffusers_fisher

ROOT = Path(__file__).parent.parent
PACKAGE = Path(diffusers_fisher.__file__).parent
VERSION = diffusers_fisher.__version__


def test_version_is_one_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    assert importlib.metadata.version("diffusers_fisher") == VERSION
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == VERSION
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == VERSION  # newest first


def test_both_papers_are_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    identifiers = [entry["identifiers"][0]["value"] for entry in citation["references"]]
    assert identifiers == ["arXiv:2505.23264", "arXiv:2505.24222"]


def test_public_names_are_sorted_and_there():
    names = diffusers_fisher.__all__
    assert names == sorted(set(names))
    assert len(names) > 30
    for name in names:
        assert getattr(diffusers_fisher, name) is not None
        assert name in dir(diffusers_fisher)
    namespace: dict = {}
    exec("from diffusers_fisher import *", namespace)
    assert set(names) <= set(namespace)


def test_names_that_diffusers_asks_for_are_there_but_not_ours():
    """Its loader looks for them in the module that a saved component names."""
    import diffusers

    for name in ("ModelMixin", "SchedulerMixin"):
        assert getattr(diffusers_fisher, name) is getattr(diffusers, name)
        assert name not in diffusers_fisher.__all__


def test_unknown_name_is_an_attribute_error_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"has no attribute 'FisherDIMScheduler'; it has: .*FisherDDIMScheduler"):
        diffusers_fisher.FisherDIMScheduler  # noqa: B018
    assert not hasattr(diffusers_fisher, "__path")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from diffusers_fisher import nothing", {})


IMPORTS = """
import sys
for statement in {statements!r}:
    exec(statement)
    loaded = {{name.partition(".")[0] for name in sys.modules}}
    print(*sorted(loaded & set({heavy!r})), sep=",")
"""


def test_imports_are_light():
    statements = {
        "import diffusers_fisher": {"torch", "diffusers", "PIL", "pydantic"},
        "from diffusers_fisher import EMBEDDED_CLASSES, InputError, embedded_prompt": {"torch", "diffusers"},
        "import diffusers_fisher.cli": {"torch", "diffusers"},
        "from diffusers_fisher import DirectFisher, DenoisingState, noise_level": {"diffusers"},
        "import diffusers_fisher.testing, diffusers_fisher.likelihood, diffusers_fisher.jobs.config": set(),
        "from diffusers_fisher import PipelineDenoiser": set(),
    }
    never = {"transformers", "accelerate", "matplotlib", "scipy", "jinja2", "pandas"}
    heavy = sorted(never | set().union(*statements.values()))
    code = IMPORTS.format(statements=list(statements), heavy=heavy)
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == len(statements)
    for line, (statement, modules) in zip(lines, statements.items(), strict=True):
        assert not set(line.split(",")) & (never | modules), statement
    assert "torch" in lines[-1]  # the list is read from the process that imported


def test_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_console_script_is_registered():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="diffusers-fisher")
    from diffusers_fisher.cli import app

    assert script.load() is app


def test_constraints_fit_the_requirements():
    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {name.lower(): version for name, version in pins.items()}
    for text in importlib.metadata.requires("diffusers_fisher") or []:
        requirement = Requirement(text)
        if requirement.name.lower() in pins:
            assert requirement.specifier.contains(pins[requirement.name.lower()]), text
    assert {"torch", "diffusers", "transformers", "accelerate"} <= set(pins)


@pytest.mark.slow
def test_wheel_has_everything_and_works_by_itself(tmp_path):
    """The wheel is built from a copy and installed without the source tree."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".*", "outputs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    build = [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        members = {name: archive.read(name) for name in archive.namelist()}
    information = f"diffusers_fisher-{VERSION}.dist-info"
    expected = {
        f"diffusers_fisher/{path.relative_to(source / 'diffusers_fisher')}": path.read_bytes()
        for path in (source / "diffusers_fisher").rglob("*")
        if path.is_file()
    }
    assert "diffusers_fisher/py.typed" in expected
    assert "diffusers_fisher/jobs/templates/page.html" in expected
    assert "diffusers_fisher/checkpoints/fashion_mnist/unet/diffusion_pytorch_model.safetensors" in expected
    assert {name: members.get(name) == content for name, content in expected.items()} == dict.fromkeys(expected, True)
    shared = f"diffusers_fisher-{VERSION}.data/data/share/diffusers_fisher/"
    others = [name for name in members if name not in expected and not name.startswith((f"{information}/", shared))]
    assert others == []
    assert {f"{shared}configs/trace_embedded.yaml", f"{shared}examples/fashion_mnist.py"} <= set(members)
    assert "diffusers-fisher = diffusers_fisher.cli:app" in members[f"{information}/entry_points.txt"].decode()
    assert {f"{information}/licenses/{name}" for name in ("LICENSE", "NOTICE")} <= set(members)
    assert b"Zalando" in members[f"{information}/licenses/NOTICE"]
    metadata = email.message_from_bytes(members[f"{information}/METADATA"])
    assert (metadata["Version"], metadata["License-Expression"]) == (VERSION, "Apache-2.0")
    assert "diffusers<1,>=0.41" in metadata.get_all("Requires-Dist")

    target = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}

    def output(*command):
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=300
        ).stdout.strip()

    assert output(sys.executable, str(target / "bin" / "diffusers-fisher"), "--version") == VERSION
    copied = output(sys.executable, str(target / "bin" / "diffusers-fisher"), "examples", "--output", "copied")
    assert "configs/trace_embedded.yaml" in copied.splitlines()
    assert (tmp_path / "copied" / "examples" / "fashion_mnist.py").is_file()
    question = "from diffusers_fisher import embedded_checkpoint as f; print(f())"
    assert output(sys.executable, "-W", "ignore", "-c", question) == str(
        target / "diffusers_fisher" / "checkpoints" / "fashion_mnist"
    )
    readme = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(readme) >= 5
    code = "\n".join([*readme, "import diffusers_fisher; print(diffusers_fisher.__file__)"])
    assert output(sys.executable, "-W", "ignore", "-c", code).endswith(
        str(target / "diffusers_fisher" / "__init__.py")
    )
