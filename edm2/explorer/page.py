"""The page: controls, three ways to look at a model, and what happens when something is touched."""

import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import torch

from dnnlib.errors import ConfigError
from edm2.explorer import show
from edm2.explorer.backend import Explorer, Pair
from edm2.explorer.choices import Choices
from edm2.explorer.grids import Film, Grid, Progress
from edm2.explorer.jobs import Jobs, Stopped, Waiting
from edm2.explorer.networks import Loading
from edm2.explorer.panel import AT_ONCE, build_panel, of_network, setting_of, unchecked, whole
from edm2.explorer.setting import Setting
from edm2.explorer.shown_commands import commands_for

TITLE = "Explore a model"
_WELCOME = "Loading the network"
# Handlers mostly wait for the one thread that computes; this many pages can do so at a time.
_NUM_HANDLERS = 32
_QUEUE = 64
_QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# The first value is the time at which the page read the others, which tells newer requests from older ones.
_STAMPED = "(_, ...values) => [Date.now(), ...values]"


class Page:
    """The explorer's page for `choices`; `demo` is the Gradio application."""

    def __init__(self, explorer: Explorer, choices: Choices, jobs: Jobs, *, given_device: str | None = None) -> None:
        self._explorer, self._jobs, self._given_device = explorer, jobs, given_device
        with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as self.demo:
            self._lay_out(choices)
            self._connect()
        self.demo.queue(default_concurrency_limit=_NUM_HANDLERS, max_size=_QUEUE)

    def _lay_out(self, choices: Choices) -> None:
        networks = self._explorer.networks
        gr.HTML(f"<h1>{TITLE}</h1>", elem_id="title", apply_default_css=False)
        with gr.Row(elem_id="layout"):
            with gr.Column(scale=1, min_width=300, elem_id="controls"):
                with gr.Row(elem_id="actions"):
                    self._go = gr.Button("Generate", variant="primary", elem_id="go", min_width=90)
                    self._cancel = gr.Button("Cancel", elem_id="cancel", min_width=90)
                self._stamp = gr.Number(0, visible=False)
                self._live = gr.Checkbox(True, label="Follow every change at once", elem_id="live", container=False)
                with gr.Row():
                    self._seed = _slider(0, 9999, 0, "Seed", "first_seed")
                    self._count = _slider(1, 64, 16, "Images", "num_images")
                with gr.Tabs(selected="a", elem_id="settings") as self._settings:
                    with gr.Tab("Setting A", id="a"):
                        self._a = build_panel(choices, networks, side="a")
                    with gr.Tab("Setting B", id="b"):
                        self._b = build_panel(choices, networks, side="b", guidance=1.0)
                        self._copy = gr.Button("Make B like A", size="sm", elem_id="copy")
            with gr.Column(scale=3, min_width=320, elem_id="main"):
                self._status = gr.HTML(show.status(_WELCOME), elem_id="status", apply_default_css=False)
                with gr.Tabs(selected="grid", elem_id="tabs") as self._picker:
                    with gr.Tab("Grid", id="grid") as grid_tab:
                        self._grid = gr.HTML(elem_id="grid", apply_default_css=False, js_on_load=show.CLICKS)
                    with gr.Tab("Compare", id="compare") as compare_tab, gr.Row(elem_id="pair"):
                        with gr.Column(min_width=280):
                            self._view_a = gr.HTML(elem_id="view-a", apply_default_css=False)
                        with gr.Column(min_width=280):
                            self._view_b = gr.HTML(elem_id="view-b", apply_default_css=False)
                    with gr.Tab("Film strip", id="film") as film_tab:
                        with gr.Row():
                            self._image = _slider(1, 64, 1, "Image of the grid", "image")
                            self._frames = _slider(2, 16, 8, "Noise levels", "frames")
                        self._film = gr.HTML(elem_id="film", apply_default_css=False)
        self._tabs = {"grid": grid_tab, "compare": compare_tab, "film": film_tab}
        self._active = gr.State("grid")
        self._views = [self._grid, self._view_a, self._view_b, self._film]

    def _connect(self) -> None:
        """Touching a control ends the visitor's running work, and then asks for new pictures with the newest values."""
        inputs = [
            self._stamp,
            self._live,
            self._active,
            self._seed,
            self._count,
            self._image,
            self._frames,
            *self._a.values,
            *self._b.values,
        ]
        outputs = [self._status, *self._views]
        work: dict[str, Any] = {**_QUIETLY, "outputs": outputs, "trigger_mode": "always_last", "js": _STAMPED}

        def follow(event: Any) -> None:
            event.then(self._touched, self._live, None, **AT_ONCE).then(self._follow_change, inputs, **work)

        panels = (self._a, self._b)
        plain = [self._seed, self._count, self._image, self._frames, *self._a.plain, *self._b.plain]
        plain += [control for panel in panels for control in (panel.guide, panel.limited)]
        gr.on([control.input for control in plain], self._touched, self._live, None, **AT_ONCE).then(
            self._follow_change, inputs, **work
        )
        for panel in panels:
            follow(panel.net.input(self._look, panel.net, [panel.facts, panel.ema, panel.class_idx], **AT_ONCE))
        for name, tab in self._tabs.items():
            follow(tab.select(_opened(name), None, [self._active, self._settings], **AT_ONCE))
        follow(self._grid.click(_film_of_clicked, None, [self._image, self._picker, self._active], **AT_ONCE))
        follow(self._copy.click(self._copied, self._a.values, [self._b.facts, *self._b.values], **AT_ONCE))
        self._go.click(self._touched, None, None, **AT_ONCE).then(self._refresh, inputs, **work)
        self._cancel.click(self._stop, None, None, **AT_ONCE)
        self.demo.load(self._refresh, inputs, **work)
        self.demo.unload(self._stop)

    def _touched(self, request: gr.Request, live: bool = True) -> None:
        if live:
            self._jobs.stop(_visitor(request), replaced=True)

    def _stop(self, request: gr.Request) -> None:
        self._jobs.stop(_visitor(request))

    def _look(self, source: str | None) -> tuple[Any, ...]:
        """What there is to choose for another network. What is wrong with it is said where its pictures are made."""
        try:
            return of_network((source or "").strip(), self._explorer.networks)
        except ConfigError:
            return "", gr.update(), gr.update()

    def _copied(self, *values: Any) -> tuple[Any, ...]:
        """What the controls of B become when they are to be like these of A."""
        net, length, chosen, *others = values
        facts, ema, class_idx = self._look(net)
        return facts, net, {**ema, "value": length}, {**class_idx, "value": chosen}, *others

    def _follow_change(self, request: gr.Request, stamp: float, live: bool, *values: Any) -> Iterator[dict[Any, Any]]:
        if live:
            yield from self._refresh(request, stamp, live, *values)
        else:
            yield {self._status: show.status("Something else is chosen now; Generate makes its pictures")}

    def _refresh(
        self, request: gr.Request, stamp: float, live: bool, active: str, *values: Any
    ) -> Iterator[dict[Any, Any]]:
        """The pictures of the open tab, and how far they are, until they are there. Every mistake is a line of text."""
        # Requests may overtake each other. What runs for older values ends here, also where these are a mistake.
        if not self._jobs.make_way(_visitor(request), stamp):
            return
        try:
            begun = time.monotonic()
            for record in self._jobs.submit(_visitor(request), self._work(active, *values)).follow():
                begun = time.monotonic() if isinstance(record, Waiting) else begun
                yield self._shown(active, record, time.monotonic() - begun)
        except ConfigError as error:
            yield {self._status: show.status(str(error), kind="error")}
        except (MemoryError, torch.OutOfMemoryError):
            text = "There is not enough memory for this; choose fewer images, or start with a smaller --cache-size"
            yield {self._status: show.status(text, kind="error")}
        except Exception as error:
            traceback.print_exc()  # a bug of ours, for whoever reports it
            text = f"This went wrong, which it should not ({type(error).__name__}); the terminal says more"
            yield {self._status: show.status(text, kind="error")}

    def _work(
        self, active: str, seed: Any, count: Any, image: Any, frames: Any, *values: Any
    ) -> Callable[[], Iterator[Any]]:
        """What is to be computed for the open tab, all values checked."""
        half = len(values) // 2
        a = setting_of(values[:half], seed, count)
        if active == "grid":
            return lambda: self._explorer.grid(a)
        if active == "film":
            position, num_frames = whole("image of the grid", image) - 1, whole("number of noise levels", frames)
            return lambda: self._explorer.film_of(a, position, num_frames=num_frames)
        b = setting_of(values[half:], seed, count)
        return lambda: self._explorer.both(a, b)

    def _shown(self, active: str, record: Any, seconds: float) -> dict[Any, Any]:
        """What changes on the page because of a record."""
        if isinstance(record, Waiting):
            return {self._status: show.status("Waiting for another page's pictures")}
        if isinstance(record, Stopped):
            # What replaces it says what is going on.
            return {self._status: gr.skip() if record.replaced else show.status("Stopped; what is there is unfinished")}
        if isinstance(record, Pair):
            running = record.a if record.b is None else record.b
            changed = {self._view_a: self._view(record.a, "a")}
            if record.b is not None:
                changed[self._view_b] = self._view(record.b, "b")
            share = None
            if not isinstance(record.b, Grid):
                own = running.share if isinstance(running, Progress) else 0.0
                share = (own + (1 if running is record.b else 0)) / 2
            side = "A" if running is record.a else "B"
            changed = {view: html for view, html in changed.items() if html is not None}
            text = f"{side}: {self._said(running, seconds)}" if share is not None else _differing(record)
            return {self._status: show.status(text, share=share), **changed}
        view = {"grid": self._grid, "film": self._film}[active]
        html = self._view(record, "grid")
        share = record.share if isinstance(record, Progress) else None
        text = self._said(record, seconds)
        return {self._status: show.status(text, share=share), **({} if html is None else {view: html})}

    def _view(self, record: Any, name: str) -> str | None:
        """The pictures of a record; None where they stay as they are."""
        if isinstance(record, Progress):
            return show.unfinished(record) or None
        if isinstance(record, Grid):
            return show.grid(record, self._commands(record.setting), name=name)
        if isinstance(record, Film):
            return show.film(record, self._commands(record.setting))
        return None

    def _said(self, record: Any, seconds: float) -> str:
        if isinstance(record, Loading | Progress):
            return show.progress_text(record)
        return f"Done in {seconds:.1f} s" if seconds >= 0.05 else "Done"

    def _commands(self, setting: Setting) -> list[str]:
        return commands_for(
            setting, self._explorer.networks, given_device=self._given_device, batch=self._explorer.batch
        )


def _differing(pair: Pair) -> str:
    """In what two finished settings differ, in words."""
    if not isinstance(pair.a, Grid) or not isinstance(pair.b, Grid):
        return ""
    names = pair.a.setting.differences(pair.b.setting)
    if not names:
        return "A and B are the same setting"
    one, two = pair.a.setting, pair.b.setting
    texts = [f"{_WORDS[name]} {_told(getattr(one, name))} and {_told(getattr(two, name))}" for name in names]
    return f"A and B differ: {', '.join(texts)}"


_WORDS = {
    "net": "network", "ema": "EMA length", "guide": "guide", "guidance": "guidance", "interval": "guided noise levels",
    "class_idx": "class", "first_seed": "first seed", "num_images": "images", "num_steps": "steps", "solver": "solver",
}  # fmt: skip


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        return " to ".join(f"{level:g}" for level in value)
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _visitor(request: gr.Request) -> str:
    """Who asks: a page in a browser's tab."""
    return str(request.session_hash)


def _slider(low: int, high: int, value: int, label: str, name: str) -> gr.Slider:
    slider = gr.Slider(low, high, value, step=1, label=label, buttons=[], elem_id=name, min_width=120)
    unchecked(slider)
    return slider


def _film_of_clicked(event: gr.EventData) -> tuple[Any, ...]:
    """Image, open tab and what it is called, after a click on an image of the grid."""
    return int(event.position) + 1, gr.Tabs(selected="film"), "film"


def _opened(name: str) -> Callable[[], tuple[Any, ...]]:
    """The tab that is open, and whose setting is at hand beside it."""
    return lambda: (name, gr.Tabs(selected="b" if name == "compare" else "a"))
