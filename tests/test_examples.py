"""The examples do what the README says of them, here without a network."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from benchmarks.text_alone import each_alone, reach
from node.text_workload import Text
from node.workload_loading import load_workload, parse_spec
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


def test_the_readmes_class_is_the_examples() -> None:
    """The README shows the example's required methods; they stand there as they stand here."""
    source = inspect.getsource(load_workload(parse_spec(f"{EXAMPLES}/digits.py:Digits")))
    readme = EXAMPLES.parent.joinpath("README.md").read_text(encoding="utf-8")
    for name in ("model", "data", "loss"):
        method = source[source.index(f"    def {name}(") :].split("\n\n")[0].rstrip()
        assert method in readme, f"README.md shows another {name}()"
