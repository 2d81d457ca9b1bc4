"""Where processes compute, and how long they wait for each other."""

import datetime

import pytest
import torch
import trace_runs

from diffusers_fisher.jobs.processes import uses_cpu
from diffusers_fisher.training.trace_matching import make_accelerator


@pytest.mark.parametrize(
    ("flag", "accelerator", "expected"), [("true", True, True), ("false", True, False), ("false", False, True)]
)
def test_cpus_are_used_by_request_or_without_an_accelerator(monkeypatch, flag, accelerator, expected):
    monkeypatch.setenv("ACCELERATE_USE_CPU", flag)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    assert uses_cpu() == expected


def test_processes_wait_for_validation_and_paths(tmp_path):
    """torch's default limit is half an hour, and ten minutes on GPUs; both are too short."""
    handler = make_accelerator(trace_runs.config_of(tmp_path)).init_handler
    assert handler.timeout >= datetime.timedelta(days=1)
