"""Seconds to plan a network of 300 layers with five bit choices each, by what is limited."""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from bitwright.bits import Cost, Problem, Term, TermSum, pareto, reachable, solve

WEIGHTS, ACTIVATIONS = (2, 3, 4, 6, 8), (4, 8, 16)


def network(layers: int, seed: int) -> Problem:
    """A chain whose sensitivities and sizes spread over orders of magnitude, as those of real networks do."""
    r = np.random.default_rng(seed)
    parameters = np.exp(r.uniform(7, 14.5, layers)).astype(int)
    macs = parameters * r.choice([49, 196, 784, 3136], layers)
    values = np.round(1e6 / (1 + np.arange(layers) / 20) * r.uniform(0.5, 1.5, layers))
    weights, activations = np.exp(r.normal(0, 2, layers)), 30 * np.exp(r.normal(-1, 1.5, layers))
    w, a = np.array(WEIGHTS), np.array(ACTIVATIONS)
    options: dict[str, tuple[int, ...]] = {}
    losses, size, operations = [], [], []
    for i in range(layers):
        options |= {f"w{i}": WEIGHTS, f"a{i}": ACTIVATIONS}
        losses.append(Term((f"w{i}",), weights[i] * 4.0**-w * np.exp(r.normal(0, 0.1, len(w)))))
        losses.append(Term((f"a{i}",), activations[i] * 4.0**-a))
        size.append(Term((f"w{i}",), np.ceil(parameters[i] * w / 8)))
        operations.append(Term((f"w{i}", f"a{i}"), macs[i] * np.multiply.outer(w, a)))
    peaks = [
        TermSum(tuple(Term((f"a{j}",), values[j] * a / 8) for j in range(i, min(i + 3, layers)))) for i in range(layers)
    ]
    stored = TermSum(tuple(size))
    costs = {
        "weight_bytes": Cost(stored),
        "activation_bytes": Cost(TermSum(()), tuple(peaks)),
        "total_bytes": Cost(stored, tuple(peaks)),
        "bit_operations": Cost(TermSum(tuple(operations))),
    }
    return Problem(options, tuple(losses), costs)


def main() -> None:
    """Prints one JSON line a seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    for seed in range(given.seeds):
        problem = network(given.layers, seed)
        reach = reachable(problem)
        row: dict[str, object] = {"layers": given.layers, "seed": seed}
        wanted = [("weight_bytes",), ("activation_bytes",), ("total_bytes",), ("bit_operations",), tuple(problem.costs)]
        for names in wanted:
            limits = {n: 0.75 * reach[n].least + 0.25 * reach[n].most for n in names}
            start = time.perf_counter()
            solve(problem, limits)
            row["+".join(names)] = round(time.perf_counter() - start, 2)
        start = time.perf_counter()
        pareto(problem, "weight_bytes", count=21)
        row["curve of 21"] = round(time.perf_counter() - start, 2)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
