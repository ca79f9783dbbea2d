"""The float network in the form that quantizers are inserted into: the teacher of everything that follows."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import fx

from bitwright.graph import branches, fold, rewrite
from bitwright.graph.capture import TOLERANCE, Captured, assert_outputs_equal, relative_difference
from bitwright.graph.choices import note_choices
from bitwright.graph.divisors import note_divisors
from bitwright.graph.joins import note_joins
from bitwright.graph.marks import note_marks


def prepare(captured: Captured) -> Captured:
    """Folds norms, merges parallel branches, spells attention out; the outputs may change by 1e-5 and no more.

    Args:
        captured: not changed.

    Raises:
        ModelError: the prepared graph disagrees with the captured one.
    """
    held = [*captured.graph.buffers(), *captured.graph.parameters()]
    graph = copy.deepcopy(captured.graph, {id(t): t for t in held})
    rewrite.free_of_views(graph)
    rewrite.propagate(graph, captured.example)
    rewrite.rewrite(graph)
    unfolded = fold.fold(graph)
    while branches.merge(graph):
        unfolded = fold.fold(graph)
    rewrite.propagate(graph, captured.example)
    rewrite.channels_last(graph)
    note_marks(graph)
    note_divisors(graph)
    note_choices(graph)
    note_joins(graph)
    _check(captured, graph)
    return replace(captured, graph=graph, unfolded=unfolded)


def _check(captured: Captured, graph: fx.GraphModule) -> None:
    """Ten times float32's own rounding error is allowed where a deep network makes that more than 1e-5."""
    with torch.no_grad():
        expected, found = captured.graph(captured.example), graph(captured.example)
        worst = max(map(relative_difference, expected, found), default=0.0)
        tolerance = TOLERANCE
        if worst > TOLERANCE:
            exact = copy.deepcopy(captured.graph).double()(captured.example.double())
            tolerance = max(TOLERANCE, 10 * max(map(relative_difference, exact, expected)))
    assert_outputs_equal(expected, found, captured.outputs, "the folded graph", tolerance)
