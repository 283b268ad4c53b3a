"""Layouts: what of the shared page a worker sees, and in which order.

A layout only arranges segments. What is written, encoded, moved and sampled is the engine's
business and the same for all layouts, so a new one is a class with a `view`:

    class HistoryOnly(Layout):
        name = "history-only"

        def view(self, page, worker):
            return [page.prompt, page.history, *page.finishing, page.live[worker]]

    hx.Hogwild(model, tokenizer, layout=HistoryOnly())

What the workers are told about it stands in `Prompts.how_to_read`, by the layout's name.
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
    history: Segment  # finished paragraphs, of layouts that commit
    others_heading: Segment
    own_heading: Segment
    # Each worker's unfinished paragraph; in layouts that do not commit, all that it wrote.
    live: list[Segment]
    unfinished: list[Segment]  # what stands behind a live paragraph for its other readers
    writing: list[int] = field(default_factory=list)  # the workers that have not ended, ascending
    # Paragraphs whose last token comes in this very step: everybody reads them behind the history
    # already, where they are moved after it.
    finishing: list[Segment] = field(default_factory=list)

    def others(self, worker: int) -> list[int]:
        """All other workers, also those that have ended."""
        return [other for other in range(len(self.live)) if other != worker]


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
        """The segments that `worker` reads, in its order; its own live one is the last.

        From one step to the next it may grow by what is written, and by paragraphs that are
        finished: room is kept for these.

        A text that is the same in all steps (the prompt, a heading) is encoded once, in the first
        view of the first step that shows it, behind what stands before it there. One that no view
        of the first step shows stays empty.
        """


class Combined(Layout):
    """The paper's layout (section 3.1): the history, the others' live paragraphs, one's own."""

    name = "combined"

    def view(self, page: Page, worker: int) -> list[Segment]:
        seen = [page.prompt, page.history, *page.finishing]
        if others := [other for other in page.writing if other != worker]:
            seen.append(page.others_heading)
            for other in others:
                seen += [page.live[other], page.unfinished[other]]
            seen.append(page.own_heading)
        return [*seen, page.live[worker]]


class Contiguous(Layout):
    """Each worker's text in one piece (the paper's appendix): the others' pieces, then one's own.

    Nothing is ever moved, so everybody always reads what it read before, only longer.
    """

    name = "contiguous"
    commits = False

    def view(self, page: Page, worker: int) -> list[Segment]:
        seen, writing = [page.prompt], set(page.writing)
        if others := page.others(worker):
            seen.append(page.others_heading)
            for other in others:
                seen.append(page.live[other])
                if other in writing:
                    seen.append(page.unfinished[other])
            seen.append(page.own_heading)
        return [*seen, page.live[worker]]


class Interleaved(Layout):
    """The history and one's own paragraph: the others' become visible when they are finished."""

    name = "interleaved"

    def view(self, page: Page, worker: int) -> list[Segment]:
        return [page.prompt, page.history, *page.finishing, page.live[worker]]


LAYOUTS: dict[str, type[Layout]] = {
    layout.name: layout for layout in (Combined, Contiguous, Interleaved)
}


def layout_from(layout: str | Layout) -> Layout:
    """The layout of this name, or the one given. Raises ValueError for an unknown name."""
    if isinstance(layout, Layout):
        if not isinstance(getattr(layout, "name", None), str):
            raise TypeError(
                f"layout: expected a Layout with a name, a string, got {checks.describe(layout)}"
            )
        return layout
    if not isinstance(layout, str):
        raise TypeError(
            f"layout: expected a name or a Layout object, got {checks.describe(layout)}"
        )
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    return LAYOUTS[layout]()
