"""The run file: what it may say, how its mistakes are told, and that its page says what the code does."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord import run_config, run_file, run_sections
from p2pcoord.errors import LocalError, RemoteError, UserError
from p2pcoord.run_config import (
    LocalOptimizer,
    RunConfig,
    RunSettings,
    Strategy,
    decode,
    derive_seed,
    encode,
    found_run,
    run_id,
)
from p2pcoord.run_file import Documented, parse_run_file, reference

PAGE = Path(__file__).parent.parent / "docs" / "run-file.md"


def founded(settings: RunSettings | None = None, **changes: object) -> RunConfig:
    said = {"founder": "12D3KooWFounder", "nonce": bytes(16), "workload_spec": "text", **changes}
    return found_run(settings or RunSettings(), **said)  # type: ignore[arg-type]


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_run_file(text, "run.toml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_an_empty_run_file_gives_the_defaults() -> None:
    assert parse_run_file("") == RunSettings()


def test_every_field_of_every_section_can_be_set_to_its_default_and_that_changes_nothing() -> None:
    sections: dict[str, list[str]] = {}
    for field in reference():
        if field.default != "unset" and field.name not in (
            "momentum",
            "nesterov",
            "beta1",
            "beta2",
            "epsilon",
        ):
            sections.setdefault(field.section, []).append(f"{field.name} = {field.default}")
    text = "\n".join(f"[{name}]\n" + "\n".join(lines) for name, lines in sections.items())
    assert parse_run_file(text) == RunSettings()


def test_values_arrive_where_the_file_puts_them() -> None:
    settings = parse_run_file(
        """
        [strategy]
        local_steps = 500
        aggregation_rounds = 7
        [optimization]
        kind = "adam"
        learning_rate = 0.01
        [local]
        batch_size = 8
        optimizer = { kind = "sgd", learning_rate = 1, momentum = 0.5 }
        [workload]
        width = 64
        names = ["a", "b"]
        deeper = { yes = true }
        """
    )
    assert settings.strategy == Strategy(local_steps=500, aggregation_rounds=7)
    assert settings.optimization.kind == "adam"
    assert settings.local.optimizer == LocalOptimizer(kind="sgd", learning_rate=1.0, momentum=0.5)
    assert isinstance(settings.local.optimizer.learning_rate, float)
    assert settings.workload == {"width": 64, "names": ["a", "b"], "deeper": {"yes": True}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[strategy]\nlocal_epoch = 3", "run.toml line 2: [strategy] local_epoch: unknown key; did you mean 'local_epochs'?"),
        ("\n# stratgy\n[stratgy]\nkind = 'x'", "run.toml line 3: [stratgy]: unknown section; did you mean 'strategy'?"),
        ("rounds = 3", "run.toml line 1: [rounds]: unknown section; known here: strategy"),
        ("[strategy]\n\n# first\nlocal_epochs = 0", "run.toml line 4: [strategy] local_epochs: int >= 1, not 0"),
        ("[strategy]\nlocal_epochs = 'all'", "run.toml line 2: [strategy] local_epochs: int, got str"),
        ("[strategy]\nlocal_epochs = true", "run.toml line 2: [strategy] local_epochs: int, got bool"),
        ("[strategy]\nlocal_epochs = 1\nlocal_steps = 1", "run.toml line 3: [strategy] local_steps: a round's local work"),
        ("[strategy]\nsync_interval_s = -1", "run.toml line 2: [strategy] sync_interval_s: float > 0.0, not -1"),
        ("[optimization]\nlearning_rate = nan", "run.toml line 2: [optimization] learning_rate: float > 0.0, not nan"),
        ("[optimization]\nlearning_rate = inf", "run.toml line 2: [optimization] learning_rate: float <= 1000.0, not inf"),
        ("[optimization]\nkind = 'adam'", "run.toml line 2: [optimization] kind: adam needs a learning_rate of its own"),
        ("[optimization]\nbeta1 = 0.5", "run.toml line 2: [optimization] beta1: means nothing with kind = 'sgd'"),
        ("[optimization]\nmomentum = 0", "run.toml line 1: [optimization] nesterov: needs a momentum above 0"),
        ("[local]\noptimizer = { kind = 'adm' }", "run.toml line 2: [local.optimizer] kind: one of 'adamw', 'adam', 'sgd'"),
        ("[local.optimizer]\nmomentum = 0.9", "run.toml line 2: [local.optimizer] momentum: means nothing with kind = 'adamw'"),
        ("local.batch_size = 0", "run.toml line 1: [local] batch_size: int >= 1, not 0"),
        ("local = 3", "run.toml line 1: [local]: a table, not a number"),
        ("[data]\nmode = 'deal'", "run.toml line 2: [data] mode: one of 'dealt', 'own', not 'deal'; did you mean 'dealt'?"),
        ("[coordination]\ncommittee_size = 4", "run.toml line 2: [coordination] committee_size: one of 1, 3, 5, 7, not 4"),
        ("[workload]\nx = 1\ny = [\n 1,\n 1979-05-27,\n]", "run.toml line 3: [workload] y: a string, number, boolean"),
        ("[workload.a]\nb = nan", "run.toml line 2: [workload.a] b: a finite number, not nan"),
        ("[strategy]\nkind = hybrid", "run.toml: Invalid value (at line 2, column 8)"),
        ("[workload]\na = 1\n\nb = [1,\n2,\n", "run.toml: Invalid value (in the statement of line 4)"),
        ("[strategy]\nlocal_epochs = 1\nlocal_epochs = 2", "run.toml: Cannot overwrite a value (in the statement of line 3)"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_file_line_and_key(text: str, told: str) -> None:
    assert told in refusal(text)


def test_the_line_is_right_after_strings_of_many_lines_that_look_like_keys() -> None:
    text = '[workload]\nnote = """\nfan_out = 1\n[aggregation]\n"""\n[aggregation]\nfan_out = 1\n'
    assert refusal(text).startswith("run.toml line 7: [aggregation] fan_out:")


def test_a_run_file_that_is_too_large_or_nested_too_deep_is_refused() -> None:
    assert "at most" in refusal("[workload]\nx = '" + "a" * run_file.MAX_RUN_FILE_BYTES + "'")
    assert "at most" in refusal("[workload]\nx = '" + "a" * run_sections.MAX_CONFIG_BYTES + "'")
    assert "nested deeper" in refusal("[workload]\nx = " + "{ a = " * 20 + "1" + " }" * 20)


def test_the_file_overrides_the_workloads_defaults_key_by_key() -> None:
    defaults = {
        "strategy": {"local_steps": 50, "aggregation_rounds": 20},
        "local": {"optimizer": {"learning_rate": 0.5, "beta1": 0.8}},
    }
    assert parse_run_file("", workload_defaults=defaults).strategy == Strategy(
        local_steps=50, aggregation_rounds=20
    )
    file = "[strategy]\nlocal_epochs = 3\n[local.optimizer]\nlearning_rate = 0.25"
    settings = parse_run_file(file, workload_defaults=defaults)
    assert settings.strategy == Strategy(local_epochs=3, aggregation_rounds=20)
    assert settings.local.optimizer == LocalOptimizer(learning_rate=0.25, beta1=0.8)
    other = parse_run_file("[local.optimizer]\nkind = 'sgd'", workload_defaults=defaults)
    assert other.local.optimizer == LocalOptimizer(kind="sgd"), (
        "defaults made for AdamW say nothing about SGD"
    )


def test_a_mistake_in_the_workloads_defaults_is_the_workloads() -> None:
    with pytest.raises(
        UserError, match=r"run_defaults\(\) of the workload: \[strategy\] local_epochs: int >= 1"
    ):
        parse_run_file("", workload_defaults={"strategy": {"local_epochs": 0}})


def test_a_config_survives_the_wire_and_its_hash_names_it() -> None:
    config = founded(parse_run_file("[workload]\nx = 1.5\ny = ['a']"), open=True)
    assert decode(encode(config)) == config
    assert len(run_id(config)) == 32
    assert run_id(config) == run_id(decode(encode(config)))
    others = [
        msgspec.structs.replace(config, nonce=b"1" * 16),
        msgspec.structs.replace(config, founder="12D3KooWOther"),
        msgspec.structs.replace(config, open=False),
        msgspec.structs.replace(config, strategy=Strategy(aggregation_rounds=31)),
        msgspec.structs.replace(config, workload={"x": 1.5, "y": ["b"]}),
    ]
    assert len({run_id(config), *map(run_id, others)}) == len(others) + 1


@pytest.mark.parametrize(
    "change",
    [
        {"optimization": run_config.Optimization(learning_rate=float("nan"))},
        {"optimization": run_config.Optimization(momentum=0.0)},
        {"aggregation": run_config.Aggregation(fan_out=1)},
        {"strategy": Strategy(local_epochs=0)},
        {"workload": {"x": float("inf")}},
        {"workload": {"x": b"bytes"}},
        {"nonce": b"short"},
        {"founder": ""},
    ],
)
def test_a_config_that_breaks_a_rule_is_refused_from_a_peer_and_never_founded(
    change: dict[str, object],
) -> None:
    config = msgspec.structs.replace(founded(), **change)
    with pytest.raises(RemoteError) as caught:
        decode(encode(config))
    assert caught.value.kind in ("bad_type", "out_of_range")
    said = {name: getattr(config, name) for name in ("founder", "nonce", "workload_spec")}
    with pytest.raises(LocalError):
        found_run(config, **said)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_config_raise_nothing_but_remote_errors(data: bytes) -> None:
    with pytest.raises(RemoteError):
        decode(data)


@given(st.integers(0, 1 << 40), st.text(max_size=20))
def test_seeds_of_different_purposes_differ_and_fit_every_generator(number: int, word: str) -> None:
    run = bytes(32)
    seed = derive_seed(run, word, number)
    assert 0 <= seed < 1 << 63
    assert seed == derive_seed(run, word, number)
    assert seed != derive_seed(run, word, number + 1)
    assert seed != derive_seed(b"1" * 32, word, number)


def test_the_page_lists_every_field_with_its_type_unit_default_and_reason() -> None:
    """Run this file as a program to see the rows that the page should have."""
    page = PAGE.read_text(encoding="utf-8")
    for field in reference():
        assert table_row(field) in page, (
            f"docs/run-file.md lacks or contradicts [{field.section}] {field.name}"
        )
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(list(reference())), "docs/run-file.md lists a field that is none"


def table_row(field: Documented) -> str:
    default = field.default if field.default == "unset" else f"`{field.default}`"
    unit = field.unit or "-"
    return f"| `{field.name}` | {field.meaning} | {field.type} | {unit} | {default} | {field.why} |"


if __name__ == "__main__":
    last = ""
    for documented in reference():
        if documented.section != last:
            print(
                f"\n## [{documented.section}]\n\n| key | meaning | type | unit | default | why |\n|---|---|---|---|---|---|"
            )
            last = documented.section
        print(table_row(documented))
