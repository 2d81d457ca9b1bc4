"""The scripts of examples/guidance and the benchmarks' tiny forms run to their end."""

import importlib.util
import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Stable Diffusion, CLIP and an aesthetic head: tiny, random, of the real classes."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.stable_diffusion().save_pretrained(folder / "sd")
    torch.manual_seed(1)
    words = tiny.tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(words), "max_position_embeddings": 8, "eos_token_id": words.eos_token_id}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    parts = [
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)), words,
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    ]  # fmt: skip
    for part in parts:
        part.save_pretrained(folder / "clip")
    head = {"layers.0.weight": torch.randn(4, 12), "layers.0.bias": torch.zeros(4)}
    head |= {"layers.2.weight": torch.randn(1, 4), "layers.2.bias": torch.full((1,), 5.0)}
    save_file(head, folder / "head.safetensors")
    return folder


def test_aesthetic_guidance_of_stable_diffusion(folders, tmp_path, capsys):
    from PIL import Image

    module = script(EXAMPLES / "guidance" / "aesthetic_stable_diffusion.py")
    module.main(
        [
            "--head", str(folders / "head.safetensors"), "--clip", str(folders / "clip"), "--checkpoint",
            str(folders / "sd"), "--prompt", "a b", "c", "--steps", "2", "--guidance-steps", "2", "--device", "cpu",
            "--output", str(tmp_path),
        ]
    )  # fmt: skip
    before, after = map(float, capsys.readouterr().out.split(";")[0].split(" to "))
    assert after >= before
    names = {f"{index:03d}_{name}.png" for index in (0, 1) for name in ("before", "after")}
    assert names | {"index.html"} == {path.name for path in tmp_path.iterdir()}
    with Image.open(tmp_path / "001_after.png") as picture:
        assert picture.size == (16, 16)
    assert "CLIP" not in (tmp_path / "index.html").read_text().split("<figure>")[0]


def test_pictures_of_the_embedded_checkpoint(tmp_path):
    module = script(EXAMPLES / "guidance" / "embedded_pictures.py")
    module.main(["--output", str(tmp_path), "--steps", "2", "--guidance-steps", "1"])
    names = {"guidance_morphing.png", "guidance_inpainting.png", "sneakers_to_boots.png"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.slow
def test_tiny_benchmark_has_every_table_and_computes_nothing_twice(tmp_path, monkeypatch):
    guidance = script(EXAMPLES / "benchmarks" / "guidance.py")
    setting = guidance.dataclasses.replace(guidance.TINY, prompts=2, compared_prompts=3, batch=1, steps=1)
    monkeypatch.setattr(guidance, "TINY", setting)
    result = guidance.run(setting, tmp_path / "records")
    methods = {
        "stored graph", "per-step recomputation", "direct", "one step", "finite difference", "gaussian",
        "endpoint, centred", "endpoint, paper",
    }  # fmt: skip
    left_out = {"recomputation, guidance left out", "finite difference, guidance left out"}
    rewards = ["another class", "left minus right", "inpainting"]
    assert set(result["iteration"]["over_floor"]) == methods
    assert set(result["iteration"]["over_floor_with_guidance_left_out"]) == left_out
    assert list(result["gradients"]) == list(result["reward_after_ten_iterations"]) == rewards
    assert all(set(rows) == methods | left_out for rows in result["gradients"].values())
    for name, rows in result["reward_after_ten_iterations"].items():
        assert set(rows) == methods | (left_out if name == "another class" else set())
    for rows in result["gradients"].values():
        assert rows["per-step recomputation"]["relative_error"] < 1e-5  # float32, exact up to the order of sums
    row = result["reward_after_ten_iterations"]["another class"]["direct"]
    assert row["prompts"] == 2
    assert len(row["curve"]) == len(row["seconds_curve"]) == len(row["held_out_curve"]) == 2
    assert list(result["time_to_exact"]) == list(result["per_step"]) == rewards
    assert all(row["prompts"] == 3 for row in result["time_to_exact"].values())
    assert all(list(cells) == ["0.2", "0.4"] for rows in result["per_step"].values() for cells in rows.values())
    json.dumps(result, allow_nan=False)
    check_plot(guidance.picture(result), result)
    monkeypatch.setattr(guidance, "one_iteration", lambda *_: pytest.fail("computed twice"))
    assert guidance.run(setting, tmp_path / "records") == result
    guidance.main(["--tiny", "--records", str(tmp_path / "records"), "--picture", str(tmp_path / "new" / "plot.png")])
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_time_to_exact_compares_prompt_by_prompt_where_the_rewards_meet():
    guidance = script(EXAMPLES / "benchmarks" / "guidance.py")
    exact = {"rewards": [[0, 0], [1, 2], [3, 3]], "held_out": [[0, 0], [5, 5], [1, 2]], "seconds": [2, 3, 5]}
    # The second prompt's second run is worse than its first, so its held-out reward is the first run's.
    direct = {"rewards": [[0, 4], [3, 1], [4, 5]], "held_out": [[0, 7], [4, 9], [6, 6]], "seconds": [1, 1, 1]}
    slow = {**direct, "rewards": [[0, 0], [0, 1], [1, 1]]}
    cells = {"stored graph": [exact], "direct": [direct], "one step": [slow]}
    result = guidance.time_to_exact(cells, "stored graph")
    assert (result["exact_seconds"], result["exact_reward"], result["held_out_exact"]) == (10, 3, 1.5)
    row = result["direct"]
    assert (row["seconds"], row["share_of_exact"]) == (2, 0.2)
    assert (row["held_out"], row["held_out_difference"]) == (5.5, 4)
    assert row["held_out_difference_standard_error"] == pytest.approx(1)  # differences 3 and 5
    assert result["one step"] == {"seconds": None}


def check_plot(figure, result):
    """Checks that every curve and every per-step run lies where its numbers are."""
    table = result["reward_after_ten_iterations"]
    for axes, (name, rows) in zip(figure.axes, table.items(), strict=True):
        assert axes.get_title() == name
        lines = {line.get_label(): line for line in axes.lines}
        for method, row in rows.items():
            assert lines[method].get_xydata().T.tolist() == [row["seconds_curve"], row["curve"]]
        for estimator, cells in result["per_step"][name].items():
            points = lines[f"step by step, {estimator}"]
            assert points.get_xydata().tolist() == [[cell["seconds"], cell["reward"]] for cell in cells.values()]
            assert points.get_color() == lines[estimator].get_color()
        assert len(lines) == len(rows) + len(result["per_step"][name])


@pytest.mark.slow
def test_tiny_form_of_the_large_benchmark(tmp_path, capsys):
    import guidance_sd15_size as benchmark

    setting = benchmark.Setting(steps=1, pixels=64, tiny=True)
    result = benchmark.run(setting, ("floor", "direct", "one step", "per-step recomputation"), tmp_path)
    assert result["faster_exact_method"] == "per-step recomputation"
    assert result["exact_over_default"] > 0
    ratios = [result["methods"][name]["over_floor"] for name in ("direct", "one step")]
    assert result["worst_autodiff_free_over_floor"] == max(ratios)
    for row in result["methods"].values():
        assert row["peak_memory"] >= row["memory_before"] > 1e6
        assert row["seconds"] > 0
    failure = benchmark.run(setting, ("no such method",), tmp_path)
    assert failure["methods"]["no such method"] == {"failed": "exit status 1"}
    assert "no such method" in capsys.readouterr().out
    assert set(failure["methods"]) == {*result["methods"], "no such method"}  # the earlier results too


def test_failures_of_the_large_benchmark_are_kept_or_tried_again(tmp_path, monkeypatch, capsys):
    import guidance_sd15_size as benchmark

    runs = []

    def record_run(setting, method):
        """Stands for the process of one method."""
        runs.append(method)
        fails = method == "direct" and runs.count("direct") == 1
        return {"failed": "exit status -9"} if fails else {"over_floor": 1.0, "seconds": 1.0}

    monkeypatch.setattr(benchmark, "_in_own_process", record_run)
    arguments = ["--tiny", "--records", str(tmp_path), "--methods"]
    benchmark.main([*arguments, "direct", "endpoint, centred"])
    assert runs == ["direct", "endpoint, centred"]
    benchmark.main([*arguments, "direct", "gaussian"])
    assert runs[2:] == ["gaussian"]  # the failure stands
    capsys.readouterr()
    benchmark.main([*arguments, "direct", "gaussian", "--retry-failed"])
    assert runs[3:] == ["direct"]  # successful methods do not run twice
    output = capsys.readouterr().out
    assert "direct" in output and "gaussian" in output and "failed" not in output
    with pytest.raises(SystemExit):
        benchmark.main([*arguments, "no such method"])
