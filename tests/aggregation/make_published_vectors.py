"""Makes published_vectors.json: what two public implementations compute of the same few vectors.

    pip install --no-deps byzfl==0.0.11; pip install flwr==1.42.0        (in an environment of their own)
    python tests/aggregation/make_published_vectors.py > tests/aggregation/published_vectors.json

ByzFL's package imports torchvision and matplotlib for its experiments; only its aggregators are loaded here.

Where they are not asked, and why:
- ByzFL's Krum and MultiKrum add up the n - f - 1 nearest, the paper (Blanchard et al. 2017) the n - f - 2 nearest. Asked for
  f + 1, they compute the paper's scores for f; that is done here. MultiKrum then takes n - f - 1 vectors.
- ByzFL has no Bulyan; Flower has, with Krum as in the paper.
- ByzFL's GeometricMedian starts from zero and stops after T steps. It is asked for so many that it has converged, since its
  limit, not its way, is what the paper defines.
- ByzFL's CenteredClipping refuses every start that it is given (its type check cannot be passed), so the start is set on the
  object.
"""

import importlib.metadata
import importlib.util
import json
import sys
import types
import warnings

import numpy as np

BYZANTINE = 2
COUNT, SIZE = 11, 6  # 4 * 2 + 3


def loaded_byzfl() -> tuple[types.ModuleType, types.ModuleType]:
    spec = importlib.util.find_spec("byzfl")
    assert spec is not None and spec.submodule_search_locations is not None
    package = types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["byzfl"] = package
    return (
        importlib.import_module("byzfl.aggregators.aggregators"),
        importlib.import_module("byzfl.aggregators.preaggregators"),
    )


def main() -> None:
    warnings.simplefilter("ignore")
    rules, before = loaded_byzfl()
    from flwr.server.strategy.aggregate import aggregate_bulyan, aggregate_krum

    random = np.random.default_rng(2024)
    # Multiples of 1/1024: exact in float32 and short in JSON.
    honest = np.round(random.normal(1, 0.5, (COUNT - BYZANTINE, SIZE)) * 1024) / 1024
    scenes = {
        "near outliers": np.vstack([honest[:4], honest[:1] + 2, honest[4:], honest[1:2] - 3]),
        "far outliers": np.vstack([np.full((1, SIZE), 1e6), honest, np.full((1, SIZE), -4096.0)]),
    }
    order = np.random.RandomState(7).permutation(COUNT)
    found: dict[str, object] = {}
    for name, vectors in scenes.items():
        results = [([row], 1) for row in vectors]
        clipping = rules.CenteredClipping(L=3, tau=1.5)
        clipping.m = vectors[1].copy()
        np.random.seed(7)
        bucketed = before.Bucketing(2)(vectors)
        byzfl = {
            "average": rules.Average()(vectors),
            "median": rules.Median()(vectors),
            "trimmed_mean": rules.TrMean(BYZANTINE)(vectors),
            "krum": rules.Krum(BYZANTINE + 1)(vectors),
            "multi_krum": rules.MultiKrum(BYZANTINE + 1)(vectors),
            "geometric_median": rules.GeometricMedian(nu=1e-6, T=2000)(vectors),
            "centered_clipping": clipping(vectors),
            "nearest_neighbour_mixing": before.NNM(BYZANTINE)(vectors),
            "bucketing": bucketed,
            "trimmed_mean after nearest_neighbour_mixing": rules.TrMean(BYZANTINE)(
                before.NNM(BYZANTINE)(vectors)
            ),
        }
        flower = {
            "krum": aggregate_krum(results, BYZANTINE, 0)[0],
            "multi_krum": aggregate_krum(results, BYZANTINE, 5)[0],
            "bulyan": aggregate_bulyan(list(results), BYZANTINE, aggregate_krum, to_keep=0)[0],
        }
        found[name] = {
            "updates": vectors.tolist(),
            "byzfl": {rule: np.asarray(value).tolist() for rule, value in byzfl.items()},
            "flower": {rule: np.asarray(value).tolist() for rule, value in flower.items()},
        }
    document = {
        "made by": f"byzfl {importlib.metadata.version('byzfl')}, flwr {importlib.metadata.version('flwr')}",
        "f": BYZANTINE,
        "centered_clipping": {"radius": 1.5, "iterations": 3, "start": 1},
        "multi_krum": {"byzfl m": COUNT - BYZANTINE - 1, "flower m": 5},
        "bucketing": {"size": 2, "order": order.tolist()},
        "scenes": found,
    }
    json.dump(document, sys.stdout)
    print()


if __name__ == "__main__":
    main()
