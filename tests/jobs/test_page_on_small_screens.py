"""What a report needs on a phone and at night, and that its captions speak of what was asked alone."""

import pytest
import torch

from diffusers_fisher.evaluation.guidance_gallery_report import write_gallery
from diffusers_fisher.jobs.pages import Page, save_picture


def test_a_page_is_laid_out_for_the_width_of_the_screen_and_has_dark_colours():
    page = Page("t")
    page.table(["a"], [["b"]])
    text = page.text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "color-scheme: light dark" in text and "prefers-color-scheme: dark" in text
    assert "overflow-x: auto" in text and '<div class="table"><table>' in text


@pytest.mark.parametrize("held_out", [[], [0.5, 0.4]], ids=["without", "with"])
def test_captions_speak_of_a_held_out_reward_where_there_is_one(tmp_path, held_out):
    (tmp_path / "pictures").mkdir()
    record = {"prompt": "a", "rewards": [0.0, 1.0], "best_run": 1, "held_out": held_out, "seconds": [1.0, 1.0]}
    record |= {"shell_distances": [0.0, 0.0], "whiteness": [0.5, 0.5], "flagged": [], "status": "completed"}
    for name in ("before", "after"):
        record[name] = f"pictures/00000_{name}.png"
        save_picture(torch.zeros(3, 8, 8), tmp_path / record[name])
    settings = {"checkpoint": "c", "reward": "r", "estimator": "one-step"}
    settings |= {"num_guidance_steps": 1, "step_size": 0.2, "optimizer": None}
    write_gallery(tmp_path, [record], settings)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert ("held-out" in page) is bool(held_out)
    assert "shell distance: how far the norm" in page and "bits/dim" not in page
