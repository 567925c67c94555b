"""How a workflow lies on the canvas of the real frontend: what is hidden, what is too small to read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

TITLE = 30
"""Height of a node's title, above its position."""
SLACK = 12
"""A link starts and ends so far inside its node, and a little under an edge hides nothing."""


def fit(page) -> float:
    """Show the whole graph, as the template browser does; the zoom."""
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1500)
    return page.evaluate("app.canvas.ds.scale")


def smallest_note(page) -> float:
    """Height in pixels of the smallest text in any note, as it is on the screen now."""
    return page.evaluate(
        "() => Math.min(...app.graph._nodes.filter(n => n.type === 'MarkdownNote').flatMap(n => {"
        " const text = document.querySelector(`[data-node-id='${n.id}']`) ?? n.widgets[0].element;"
        " return [...text.querySelectorAll('h1, h2, h3, p, li')].filter(e => e.offsetHeight).map(e =>"
        "  parseFloat(getComputedStyle(e).fontSize) * e.getBoundingClientRect().height / e.offsetHeight)}))"
    )


def unread_notes(page) -> list[str]:
    """Notes whose text does not fit."""
    return page.evaluate(
        "() => [...document.querySelectorAll('.comfy-markdown .tiptap')]"
        ".filter(e => e.scrollHeight > e.clientHeight + 2).map(e => e.textContent.slice(0, 40))"
    )


def nodes_on_nodes(page) -> list[str]:
    boxes = _boxes(page)
    return [
        f"{boxes[b]['title']} lies on {boxes[a]['title']}"
        for a in boxes
        for b in boxes
        if a < b and not _apart(boxes[a], boxes[b])
    ]


def links_behind_nodes(page) -> list[str]:
    """Every node that a link passes behind, its own ends included where it turns back."""
    boxes = _boxes(page)
    links = page.evaluate(
        "() => [...app.graph.links.values()].map(l => ({from: l.origin_id, to: l.target_id,"
        " stops: [[...app.graph.getNodeById(l.origin_id).getConnectionPos(false, l.origin_slot)],"
        "  ...(function bends(id) { const bend = app.graph.reroutes.get(id);"
        "   return bend ? [...bends(bend.parentId), [...bend.pos]] : [] })(l.parentId),"
        "  [...app.graph.getNodeById(l.target_id).getConnectionPos(true, l.target_slot)]]}))"
    )
    hidden = {}
    for link in links:
        for x, y in itertools.chain.from_iterable(map(_curve, link["stops"], link["stops"][1:])):
            for number, box in boxes.items():
                if box["x"] + SLACK < x < box["x"] + box["w"] - SLACK and box["y"] < y < box["y"] + box["h"]:
                    names = (boxes[str(link["from"])]["title"], boxes[str(link["to"])]["title"], box["title"])
                    hidden[link["from"], link["to"], number] = "the link {} - {} passes behind {}".format(*names)
    return list(hidden.values())


def _boxes(page) -> dict[str, dict[str, Any]]:
    """Nodes with their titles' bars, by id."""
    return page.evaluate(
        "title => Object.fromEntries(app.graph._nodes.map(n => [n.id, {title: n.title, x: n.pos[0],"
        " y: n.pos[1] - title, w: n.size[0], h: n.size[1] + title}]))",
        TITLE,
    )


def _apart(a: dict[str, Any], b: dict[str, Any]) -> bool:
    beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
    return beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


def _curve(start: list[float], end: list[float]) -> Iterator[tuple[float, float]]:
    """Points of the spline that LiteGraph draws: it leaves to the right, a quarter of the way, and so arrives."""
    reach = math.dist(start, end) / 4
    x = start[0], start[0] + reach, end[0] - reach, end[0]
    y = start[1], start[1], end[1], end[1]
    for step in range(101):
        t = step / 100
        weights = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
        yield sum(map(float.__mul__, weights, map(float, x))), sum(map(float.__mul__, weights, map(float, y)))
