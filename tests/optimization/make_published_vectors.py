"""Makes published_vectors.json: what public optimizers do with the same parameters and gradients, in float64.

    python -m venv VENV; VENV/bin/pip install torch optax==0.2.8 timm==1.0.31 torch-optimizer==0.3.0 pytorch-optimizer==4.1.0
    VENV/bin/python tests/optimization/make_published_vectors.py

The libraries are no dependencies of the project: the file is what the tests read. timm's package imports torchvision for its
models; only its Lamb is loaded here.
"""

import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytorch_optimizer
import torch
import torch_optimizer
from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

jax.config.update("jax_enable_x64", True)

for package in ("timm", "timm.optim"):
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = list(spec.submodule_search_locations)
timm_lamb = importlib.import_module("timm.optim.lamb").Lamb

STEPS = 20
KEPT = (1, 2, 3, 5, 10, 20)
SHAPES = {
    "mixed": [
        (5, 3),
        (4,),
        (),
        (2, 3, 2),
        (3, 2),
    ],  # the second is zeros, which have no norm; the fourth has one above 10
    "tensors": [(5, 3), (4,), (2, 3, 2), (2, 2, 2, 3)],
    "matrices": [(6, 4), (3, 5)],
    "flat": [(7, 5), (4,)],
}

Tensors = list[np.ndarray]
Optimize = Callable[[Tensors, list[Tensors]], Iterator[Tensors]]


def inputs(name: str) -> tuple[Tensors, list[Tensors]]:
    random = np.random.default_rng(7)
    shapes = SHAPES[name]

    def draw() -> Tensors:
        return [random.standard_normal(shape).astype(np.float32) for shape in shapes]

    parameters, gradients = draw(), [draw() for _ in range(STEPS)]
    if name == "mixed":
        parameters[1][...] = 0
        parameters[3] *= np.float32(20)
    return parameters, gradients


def by_torch(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> Optimize:
    def run(parameters: Tensors, gradients: list[Tensors]) -> Iterator[Tensors]:
        held = [torch.nn.Parameter(torch.tensor(tensor, dtype=torch.float64)) for tensor in parameters]
        optimizer = make(held)
        for gradient in gradients:
            for parameter, part in zip(held, gradient, strict=True):
                parameter.grad = torch.tensor(part, dtype=torch.float64)
            optimizer.step()
            yield [parameter.detach().numpy().copy() for parameter in held]

    return run


def by_optax(made: optax.GradientTransformation) -> Optimize:
    def run(parameters: Tensors, gradients: list[Tensors]) -> Iterator[Tensors]:
        held = [jax.numpy.asarray(tensor, jax.numpy.float64) for tensor in parameters]
        state = made.init(held)
        for gradient in gradients:
            given = [jax.numpy.asarray(part, jax.numpy.float64) for part in gradient]
            updates, state = made.update(given, state, held)
            held = optax.apply_updates(held, updates)
            yield [np.asarray(tensor) for tensor in held]

    return run


def lamb(library: str, run: Optimize, **options: Any) -> dict[str, Any]:
    return {"library": library, "run": run, "kind": "lamb", "shapes": "mixed", "options": options}


def shampoo(library: str, shapes: str, run: Optimize, **options: Any) -> dict[str, Any]:
    return {
        "library": library,
        "run": run,
        "kind": "distributed_shampoo",
        "shapes": shapes,
        "options": options,
    }


RATE = 0.05
MOMENTS = {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-6}
TIMM = {"lr": RATE, "betas": (0.9, 0.99), "eps": 1e-6, "max_grad_norm": None, "foreach": False}
DASH = {
    "lr": RATE,
    "matrix_eps": 1e-12,
    "inverse_root_method": "eigh",
    "eps": 1e-8,
}

CASES = [
    *(
        lamb(
            "optax",
            by_optax(optax.lamb(RATE, b1=0.9, b2=0.99, eps=1e-6, weight_decay=decay)),
            **MOMENTS,
            weight_decay=decay,
            convention="paper",
        )
        for decay in (0.0, 0.1)
    ),
    *(
        lamb(
            "timm",
            by_torch(
                lambda held, decay=decay: timm_lamb(held, **TIMM, weight_decay=decay, always_adapt=True)
            ),
            **MOMENTS,
            weight_decay=decay,
            convention="paper",
        )
        for decay in (0.0, 0.1)
    ),
    lamb(
        "timm",
        by_torch(
            lambda held: timm_lamb(held, **TIMM, weight_decay=0.1, always_adapt=True, bias_correction=False)
        ),
        **MOMENTS,
        weight_decay=0.1,
        convention="uncorrected",
    ),
    *(
        lamb(
            "timm",
            by_torch(lambda held, decay=decay: timm_lamb(held, **TIMM, weight_decay=decay)),
            **MOMENTS,
            weight_decay=decay,
            convention="apex",
        )
        for decay in (0.0, 0.1)
    ),
    lamb(
        "torch-optimizer",
        by_torch(
            lambda held: torch_optimizer.Lamb(held, lr=RATE, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
        ),
        **MOMENTS,
        weight_decay=0.1,
        convention="clamped",
    ),
    shampoo(  # Gupta et al. 2018, algorithm 2
        "pytorch-optimizer",
        "tensors",
        by_torch(lambda held: pytorch_optimizer.Shampoo(held, lr=RATE, matrix_eps=1e-2)),
        beta1=0.0,
        epsilon=1e-2,
        grafting="none",
    ),
    *(
        shampoo(  # Anil et al. 2020, with the step length of AdaGrad and of SGD
            "pytorch-optimizer",
            "matrices",
            by_torch(
                lambda held, graft=graft: pytorch_optimizer.ScalableShampoo(
                    held,
                    lr=RATE,
                    betas=(0.9, 0.95),
                    graft_type=graft,
                    start_preconditioning_step=1,
                    preconditioning_compute_steps=1,
                    shape_interpretation=False,
                    use_svd=True,
                    matrix_eps=1e-13,
                )
            ),
            beta1=0.0,
            beta2=0.95,
            momentum=0.9,
            nesterov=True,
            grafting=name,
        )
        for name, graft in (("adagrad", LayerWiseGrafting.ADAGRAD), ("sgd", LayerWiseGrafting.SGD))
    ),
    shampoo(  # Shi et al. 2023: filtered gradient, grafting from Adam, blocks with a rest
        "pytorch-optimizer",
        "flat",
        by_torch(
            lambda held: pytorch_optimizer.DASH(
                held,
                betas=(0.9, 0.95),
                block_size=3,
                precondition_frequency=1,
                start_preconditioning_step=1,
                weight_decay=0.1,
                **DASH,
            )
        ),
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.1,
        block_size=3,
        grafting="adam",
        grafting_epsilon=1e-8,
    ),
    shampoo(  # the same with old roots and momentum
        "pytorch-optimizer",
        "flat",
        by_torch(
            lambda held: pytorch_optimizer.DASH(
                held,
                betas=(0.5, 0.9),
                block_size=4,
                precondition_frequency=6,
                start_preconditioning_step=6,
                momentum=0.8,
                nesterov=True,
                **DASH,
            )
        ),
        beta1=0.5,
        beta2=0.9,
        momentum=0.8,
        nesterov=True,
        block_size=4,
        preconditioning_interval=6,
        grafting="adam",
        grafting_epsilon=1e-8,
    ),
]


def flat(tensors: Tensors) -> np.ndarray:
    return np.concatenate([np.asarray(tensor).reshape(-1) for tensor in tensors])


def main() -> None:
    libraries = ("torch", "jax", "optax", "timm", "torch-optimizer", "pytorch-optimizer")
    cases = []
    for case in CASES:
        states = case.pop("run")(*inputs(case["shapes"]))
        kept = {
            str(number): flat(state).tolist()
            for number, state in enumerate(states, start=1)
            if number in KEPT
        }
        cases.append({**case, "learning_rate": RATE, "states": kept})
    found = {
        "made_with": {name: version(name) for name in libraries},
        "inputs": {
            name: {
                "shapes": shapes,
                "parameters": flat(inputs(name)[0]).tolist(),
                "gradients": [flat(gradient).tolist() for gradient in inputs(name)[1]],
            }
            for name, shapes in SHAPES.items()
        },
        "cases": cases,
    }
    text = json.dumps(found)
    Path(__file__).with_name("published_vectors.json").write_text(
        text.replace('{"library"', '\n{"library"').replace('"inputs"', '\n"inputs"') + "\n"
    )


if __name__ == "__main__":
    main()
