"""The example script, on a tiny checkpoint of every backbone."""

import json

import pytest
from backbones import steer_and_score

from pipelines.backbones import BACKBONES


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
