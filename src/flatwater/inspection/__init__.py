"""The norm nodes in files of exported models, and whether each could be folded: for every file format alike."""

from flatwater.inspection.graph import Graph, Linear, Norm, Operation, Shift
from flatwater.inspection.report import Inspection, NormNode
from flatwater.inspection.ways import Way, find_way, inspect_graph

__all__ = [
    "Graph",
    "Inspection",
    "Linear",
    "Norm",
    "NormNode",
    "Operation",
    "Shift",
    "Way",
    "find_way",
    "inspect_graph",
]
