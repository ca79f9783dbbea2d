"""Values that only choose: which tokens are kept, which class is largest, where samples are taken.

Rounded, many of them are equal, and which of equal ones is taken is a matter of the runtime. Nothing is computed from
them, so that they cost nothing in float.
"""

from __future__ import annotations

import operator

from torch import fx

from bitwright.graph import ops

CHOOSING = frozenset({"argmax", "argmin", "argsort", "gt", "lt", "ge", "le", "eq", "ne"})
REASON = "only chooses among others, and equal values would be chosen by chance"
MULTIPLYING = frozenset({"linear", "matmul"})


def note_choices(graph: fx.GraphModule) -> None:
    """Writes ``meta["float"]`` at every value of a prepared graph that only chooses."""
    choosing: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):
        if node.op != "call_function" or not ops.is_float_tensor(node):
            continue
        if node.users and all(_only_chooses(node, user, choosing) for user in node.users):
            choosing.add(node)
            node.meta.setdefault("float", REASON)


def _only_chooses(node: fx.Node, user: fx.Node, choosing: set[fx.Node]) -> bool:
    """Whether what a reader makes of the value is no number that others compute with."""
    name = ops.base_name(user)
    if name in CHOOSING or (name in ops.SAMPLERS and user.args[0] is not node):
        return True
    if name in ops.PICK:
        return bool(user.users) and all(u.target is operator.getitem and u.args[1] == 1 for u in user.users)
    return user in choosing and ops.kind(user) not in MULTIPLYING
