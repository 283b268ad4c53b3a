"""Layouts: what of the shared page a worker sees, and in which order.

A layout only arranges segments. What is written, encoded, moved and sampled is the engine's
business and the same for all layouts, so a new one is a class with a `view`, and, if it shows
other headings, an `opening`:

    class OnlyHistory(Layout):
        name = "only-history"

        def view(self, page, worker):
            return [page.prompt, page.history, *page.finishing, page.live[worker]]

    hx.Hogwild(model, tokenizer, layout=OnlyHistory())
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from . import checks

if TYPE_CHECKING:
    from .cache import Segment


@dataclass
class Page:
    """All that stands on the shared page, as segments of one cache. Lists go by worker."""

    prompt: Segment  # instructions, problem, heading of the history
    history: Segment  # finished paragraphs
    others_heading: Segment
    own_heading: Segment
    live: list[Segment]  # each worker's unfinished paragraph
    unfinished: list[Segment]  # what stands behind a live paragraph for its other readers
    writing: list[int] = field(default_factory=list)  # the workers that have not ended, ascending
    # Paragraphs whose last token comes in this very step: everybody reads them behind the history
    # already, where they are moved after it.
    finishing: list[Segment] = field(default_factory=list)

    def others(self, worker: int) -> list[int]:
        """The other workers that are writing."""
        return [other for other in self.writing if other != worker]


class Layout(ABC):
    """Who sees what.

    Attributes:
        name: what `Hogwild(layout=...)` calls it.
        commits: whether a finished paragraph moves into the history.
    """

    name: ClassVar[str]
    commits: ClassVar[bool] = True

    @abstractmethod
    def view(self, page: Page, worker: int) -> list[Segment]:
        """The segments that `worker` reads, in its order; its own live one is the last."""

    def opening(self, page: Page) -> list[list[Segment]]:
        """The views in which the fixed texts are encoded, once; each writes its last segment.

        The first one is the prompt alone. Only texts that some view shows need to be here.
        """
        return [[page.prompt]]


class Combined(Layout):
    """The paper's layout (section 3.1): the history, the others' live paragraphs, one's own."""

    name = "combined"

    def view(self, page: Page, worker: int) -> list[Segment]:
        seen = [page.prompt, page.history, *page.finishing]
        if others := page.others(worker):
            seen.append(page.others_heading)
            for other in others:
                seen += [page.live[other], page.unfinished[other]]
            seen.append(page.own_heading)
        seen.append(page.live[worker])
        return seen

    def opening(self, page: Page) -> list[list[Segment]]:
        views = [[page.prompt]]
        if len(page.live) > 1:
            before = [page.prompt, page.others_heading]
            views += [before, [*before, page.own_heading]]
            pairs = zip(page.live, page.unfinished, strict=True)
            views += [[*before, live, unfinished] for live, unfinished in pairs]
        return views


LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in (Combined,)}


def layout_from(layout: str | Layout) -> Layout:
    """The layout of this name, or the one given. Raises ValueError for an unknown name."""
    if isinstance(layout, Layout):
        return layout
    if not isinstance(layout, str):
        raise TypeError(
            f"layout: expected a name or a Layout object, got {checks.describe(layout)}"
        )
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    return LAYOUTS[layout]()
