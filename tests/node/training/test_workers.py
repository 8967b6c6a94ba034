"""Combine and Step from files to files: the same bits as the vectors' rules, and what is refused."""

import math
from pathlib import Path

import numpy as np
import pytest

import node.training.workers
from node.training.workers import CombineInput, CombineOutcome, StepOutcome, combine, step
from p2pcoord.aggregation.mean import PARTIAL, Factors, Mean
from p2pcoord.aggregation.summation import NORM_LANES, norm, weighted_sum
from p2pcoord.content import manifest_of
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.layout import Layout, TensorSpec
from p2pcoord.optimization.optimizer import SGD, Adam
from p2pcoord.optimization.step import step as outer_step

# More elements than two pieces of the shrunken size below; an odd count, so that the integers lie unaligned.
LAYOUT = Layout(
    (
        TensorSpec("weight", (3, NORM_LANES), "float32", "parameter"),
        TensorSpec("running_mean", (3,), "float32", "float_buffer"),
        TensorSpec("num_batches_tracked", (), "int64", "integer_buffer"),
        TensorSpec("mask", (2,), "bool", "integer_buffer"),
        TensorSpec("bias", (4,), "bfloat16", "parameter"),
        TensorSpec("frozen", (10,), "float32", "frozen"),
    )
)
NESTEROV = SGD(momentum=0.9, nesterov=True, weight_decay=0.01)
ADAM = Adam(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0)

# What the bytes of a whole round are, whichever machine, numpy and vector unit computed them.
NORM_HEX = "0x1.7a7bc703b3facp+5"
RESULT_ROOT = "f78ae68f47dfef189cab728c0871c264f3fa772db59ac56952c9390b54a4f595"
STATE_ROOT = "1166388989270be2a734d694e0a732471de7c28e9c3a7ef9b1eba4041ea1b2f2"


def spread(seed: int, count: int) -> np.ndarray:
    """Numbers between 0 and 1 in no order (Knuth's multiplicative hash), the same with every numpy."""
    numbers = np.arange(count, dtype=np.uint64) + np.uint64(1_000_003 * seed + 1)
    return (numbers * np.uint64(2654435761) % np.uint64(2**32)).astype(np.float64) / 2**32


def contribution(seed: int, layout: Layout = LAYOUT, slots: int = 0) -> np.ndarray:
    octets = np.zeros(layout.state_bytes(slots), np.uint8)
    for section in (layout.parameters(octets), layout.float_buffers(octets), *layout.slots(octets)):
        section[:] = 0.1 + 0.9 * spread(seed, section.size)
    for spec in layout.specs:
        if spec.role == "integer_buffer":
            limit = 2 if spec.dtype == "bool" else 100
            values = np.floor(limit * spread(seed, spec.count)).reshape(spec.shape)
            layout.tensor_views(octets)[spec.name][...] = values
    return octets


def stored(directory: Path, name: str, octets: np.ndarray) -> Path:
    path = directory / name
    path.write_bytes(octets.tobytes())
    return path


def read(path: Path) -> np.ndarray:
    return np.fromfile(path, np.uint8)


def inputs_of(directory: Path, count: int, clip_norm: float | None = None) -> list[CombineInput]:
    vectors = [contribution(seed) for seed in range(count)]
    norms = [norm(LAYOUT.parameters(vector)) for vector in vectors]
    factors = Mean(clip_norm=clip_norm).factors(list(range(1, count + 1)), norms)
    return [
        CombineInput(stored(directory, f"in{at}", vector), factor)
        for at, (vector, factor) in enumerate(zip(vectors, factors, strict=True))
    ]


@pytest.fixture(params=["one piece", "many pieces"])
def pieces(request, monkeypatch):
    if request.param == "many pieces":
        monkeypatch.setattr(node.training.workers, "PIECE", NORM_LANES)


@pytest.mark.usefixtures("pieces")
def test_a_combined_file_is_the_weighted_sum_section_by_section(tmp_path):
    inputs = inputs_of(tmp_path, 3, clip_norm=1.0)
    outcome = combine(LAYOUT, inputs, tmp_path / "out")
    vectors, out = [read(entry.path) for entry in inputs], read(tmp_path / "out")
    parameters, buffers = np.empty(LAYOUT.parameter_count, np.float32), np.empty(3, np.float32)
    entries = list(zip(vectors, inputs, strict=True))
    weighted_sum(
        [(LAYOUT.parameters(vector), entry.factors.parameters) for vector, entry in entries], parameters
    )
    weighted_sum(
        [(LAYOUT.float_buffers(vector), entry.factors.float_buffers) for vector, entry in entries], buffers
    )
    assert LAYOUT.parameters(out).tobytes() == parameters.tobytes()
    assert LAYOUT.float_buffers(out).tobytes() == buffers.tobytes()
    assert (LAYOUT.integers(out) == np.max([LAYOUT.integers(vector) for vector in vectors], axis=0)).all()
    assert outcome == CombineOutcome(True, norm(parameters), LAYOUT.contribution_bytes)
    assert out.size == LAYOUT.contribution_bytes
    assert outcome.norm <= 1.0 + 1e-6


def test_clipping_leaves_float_buffers_at_their_mean(tmp_path):
    combine(LAYOUT, inputs_of(tmp_path, 2, clip_norm=1e-3), tmp_path / "out")
    means = np.average(
        [LAYOUT.float_buffers(read(tmp_path / name)) for name in ("in0", "in1")], axis=0, weights=[1, 2]
    )
    np.testing.assert_allclose(LAYOUT.float_buffers(read(tmp_path / "out")), means, rtol=1e-6)


def test_a_partial_sum_passes_through_an_interior_member_unchanged(tmp_path):
    inputs = inputs_of(tmp_path, 3)
    combine(LAYOUT, inputs[1:], tmp_path / "partial")
    combine(LAYOUT, [inputs[0], CombineInput(tmp_path / "partial", PARTIAL)], tmp_path / "root")
    combine(LAYOUT, inputs, tmp_path / "star")
    tree, star = (LAYOUT.parameters(read(tmp_path / name)) for name in ("root", "star"))
    np.testing.assert_allclose(tree, star, rtol=3e-7)
    combine(LAYOUT, [CombineInput(tmp_path / "partial", PARTIAL)], tmp_path / "again")
    assert (read(tmp_path / "again") == read(tmp_path / "partial")).all()


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(
    "chosen", [NESTEROV, ADAM, SGD(momentum=0.0, nesterov=False, weight_decay=0.0)], ids=str
)
def test_a_stepped_file_is_the_outer_step_section_by_section(tmp_path, chosen):
    state, result = contribution(1, slots=chosen.slots), contribution(2)
    paths = stored(tmp_path, "state", state), stored(tmp_path, "result", result)
    scalars = chosen.parameters(1, 0.7)
    outcome = step(LAYOUT, *paths, scalars, tmp_path / "out")
    out = read(tmp_path / "out")
    parameters = np.empty(LAYOUT.parameter_count, np.float32)
    slots = [np.empty_like(parameters) for _ in range(chosen.slots)]
    outer_step(
        LAYOUT.parameters(state), LAYOUT.parameters(result), LAYOUT.slots(state), scalars, parameters, slots
    )
    assert LAYOUT.parameters(out).tobytes() == parameters.tobytes()
    assert [slot.tobytes() for slot in LAYOUT.slots(out)] == [slot.tobytes() for slot in slots]
    assert LAYOUT.float_buffers(out).tobytes() == LAYOUT.float_buffers(result).tobytes()
    assert (LAYOUT.integers(out) == LAYOUT.integers(result)).all()
    assert outcome == StepOutcome(True, LAYOUT.state_bytes(chosen.slots))
    assert read(paths[0]).tobytes() == state.tobytes()


def test_a_round_has_these_bytes_on_every_machine(tmp_path):
    inputs = inputs_of(tmp_path, 3, clip_norm=50.0)
    outcome = combine(LAYOUT, inputs, tmp_path / "result")
    stored(tmp_path, "state", contribution(9, slots=2))
    step(LAYOUT, tmp_path / "state", tmp_path / "result", ADAM.parameters(3, 0.25), tmp_path / "new")
    assert outcome.norm.hex() == NORM_HEX
    assert manifest_of(read(tmp_path / "result")).root.hex() == RESULT_ROOT
    assert manifest_of(read(tmp_path / "new")).root.hex() == STATE_ROOT


@pytest.mark.parametrize(("section", "at"), [("parameters", 5), ("parameters", -1), ("float_buffers", 0)])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_who_sent_what_is_not_finite_is_named(tmp_path, section, at, poison):
    inputs = inputs_of(tmp_path, 4)
    for which in (1, 3):
        octets = read(inputs[which].path)
        getattr(LAYOUT, section)(octets)[at] = poison
        stored(tmp_path, inputs[which].path.name, octets)
    outcome = combine(LAYOUT, inputs, tmp_path / "out")
    assert not outcome.finite
    assert outcome.non_finite == (1, 3)


def test_finite_inputs_that_overflow_together_are_nobodys_fault(tmp_path):
    octets = contribution(1)
    LAYOUT.parameters(octets)[7] = 3e38
    entry = CombineInput(stored(tmp_path, "in", octets), Factors(1.0, 1.0))
    outcome = combine(LAYOUT, [entry, entry], tmp_path / "out")
    assert (outcome.finite, outcome.non_finite, outcome.norm) == (False, (), math.inf)


@pytest.mark.parametrize("section", ["parameters", "float_buffers"])
def test_a_step_into_what_is_not_finite_says_so(tmp_path, section):
    result = contribution(2)
    getattr(LAYOUT, section)(result)[0] = math.nan
    paths = stored(tmp_path, "state", contribution(1, slots=1)), stored(tmp_path, "result", result)
    assert not step(LAYOUT, *paths, NESTEROV.parameters(1, 0.7), tmp_path / "out").finite


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_the_senders_mistake(tmp_path, change):
    good = stored(tmp_path, "good", contribution(1))
    state = stored(tmp_path, "state", contribution(1, slots=1))
    for path in (good, state):
        octets = path.read_bytes()
        path.with_name(f"bad-{path.name}").write_bytes(octets[:change] if change < 0 else octets + b"0")
    scalars = NESTEROV.parameters(1, 0.7)
    out = tmp_path / "out"
    attempts = [
        lambda: combine(
            LAYOUT, [CombineInput(good, PARTIAL), CombineInput(tmp_path / "bad-good", PARTIAL)], out
        ),
        lambda: step(LAYOUT, state, tmp_path / "bad-good", scalars, out),
        lambda: step(LAYOUT, tmp_path / "bad-state", good, scalars, out),
        lambda: step(LAYOUT, state, good, ADAM.parameters(1, 0.1), out),  # a slot is missing
    ]
    for attempt in attempts:
        with pytest.raises(RemoteError) as error:
            attempt()
        assert error.value.kind == "bad_size"
    assert not out.exists()


def test_an_integer_beyond_its_dtype_is_the_senders_mistake(tmp_path):
    octets = contribution(1)
    LAYOUT.tensor_views(octets)["mask"][1] = 2
    bad = stored(tmp_path, "bad", octets)
    state = stored(tmp_path, "state", contribution(1, slots=1))
    with pytest.raises(RemoteError, match="'mask' holds what is no bool"):
        combine(LAYOUT, [CombineInput(bad, PARTIAL)], tmp_path / "out")
    with pytest.raises(RemoteError, match="'mask' holds what is no bool"):
        step(LAYOUT, state, bad, NESTEROV.parameters(1, 0.7), tmp_path / "out")


@pytest.mark.usefixtures("pieces")
def test_work_that_is_stopped_leaves_no_file_behind(tmp_path):
    class StoppedError(Exception):
        pass

    def stop() -> None:
        raise StoppedError

    inputs = inputs_of(tmp_path, 2)
    state = stored(tmp_path, "state", contribution(1, slots=1))
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        combine(LAYOUT, inputs, out, stop)
    with pytest.raises(StoppedError):
        step(LAYOUT, state, inputs[0].path, NESTEROV.parameters(1, 0.7), out, stop)
    assert not out.exists()


def test_a_full_disk_is_an_error_of_the_operating_system(tmp_path):
    out = tmp_path / "out"
    out.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        combine(LAYOUT, inputs_of(tmp_path, 2), out)
    assert not out.is_symlink()


def test_a_missing_file_and_no_input_stop_the_work(tmp_path):
    with pytest.raises(FileNotFoundError):
        combine(LAYOUT, [CombineInput(tmp_path / "none", PARTIAL)], tmp_path / "out")
    with pytest.raises(LocalError):
        combine(LAYOUT, [], tmp_path / "out")


@pytest.mark.parametrize(
    "specs",
    [
        (),
        (TensorSpec("count", (), "int64", "integer_buffer"),),
        (TensorSpec("mean", (3,), "float32", "float_buffer"),),
        (TensorSpec("weight", (3,), "float32", "parameter"),),
    ],
    ids=["nothing", "integers", "buffers", "parameters"],
)
def test_sections_may_be_empty(tmp_path, specs):
    layout = Layout(specs)
    entry = CombineInput(stored(tmp_path, "in", contribution(1, layout)), PARTIAL)
    assert combine(layout, [entry, entry], tmp_path / "result").finite
    state = stored(tmp_path, "state", contribution(1, layout, slots=1))
    outcome = step(layout, state, tmp_path / "result", NESTEROV.parameters(1, 0.7), tmp_path / "out")
    assert outcome == StepOutcome(True, layout.state_bytes(1))
    assert read(tmp_path / "out").size == outcome.size_bytes
