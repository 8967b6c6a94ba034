"""The examples do what the README says of them, here without a network."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import p2pcoord
from benchmarks.text_alone import each_alone, reach
from node.training.text_workload import Text
from node.training.workload_loading import load_workload, parse_spec
from p2pcoord.run_file import parse_run_file

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_four_machines_bring_the_digits_above_90_percent(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        digits = load_workload(parse_spec(f"{EXAMPLES}/digits.py:Digits"))
        settings = parse_run_file("", workload_defaults=digits.run_defaults())
        accuracy = list(reach(digits, "accuracy", settings, range(4), 4, tmp_path / "run"))
    finally:
        torch.set_num_threads(threads)
    print(
        f"digits: accuracy {accuracy[-1]:.3f} after {len(accuracy)} rounds, {accuracy[0]:.3f} after the first"
    )
    assert accuracy[-1] > 0.90


@pytest.mark.slow
def test_the_control_of_text_trains_each_replica_alone_on_a_share_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = "[strategy]\nlocal_steps = 2\naggregation_rounds = 2\n"
    settings = parse_run_file(run_file, workload_defaults=Text.run_defaults())
    first, second = each_alone(settings, 2, tmp_path)
    assert len(first) == len(second) == 2
    assert first != second
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in told] == [
        "alone on share 1 of 2: 4 local steps",
        "alone on share 2 of 2: 4 local steps",
    ]


def test_the_readmes_code_runs_as_it_stands_and_is_the_examples_class() -> None:
    readme = EXAMPLES.parent.joinpath("README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    shown, example = namespace["Digits"], load_workload(parse_spec(f"{EXAMPLES}/digits.py:Digits"))
    source = inspect.getsource(example)
    methods = code[code.index("    def model(") :].split("\n\n")
    assert len(methods) == 3
    for method in methods:
        assert method.rstrip() in source, "examples/digits.py has another"
    for kind in (shown, example):
        assert issubclass(kind, p2pcoord.Workload)
    losses = []
    for workload in (shown(), example()):
        torch.manual_seed(0)
        model, data = workload.model(), workload.data("train")
        assert len(data) == 1500
        assert len(workload.data("validation")) > 0
        losses.append(workload.loss(model, data[:32]).item())
    assert losses[0] == losses[1] > 0
