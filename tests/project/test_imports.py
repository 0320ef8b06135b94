"""No module imports itself by way of others, not even lazily or for types alone."""

from __future__ import annotations

import grimp


def test_imports_have_no_cycle() -> None:
    graph = grimp.build_graph("headtune", cache_dir=None)
    assert len(graph.modules) > 150, "the packages behind the links are part of it"
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            chain = graph.find_shortest_chain(importer=imported, imported=module)
            assert chain is None, " imports ".join((module, *chain))
