"""The page: controls, three views of a model, and the events that connect them."""

import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from dnnlib.errors import ConfigError
from edm2.explorer import show
from edm2.explorer.grids import Explorer, Film, Grid, Pair, Progress
from edm2.explorer.networks import Loading
from edm2.explorer.panel import AT_ONCE, build_panel, number, of_network, setting_of, whole
from edm2.explorer.setting import NO_GUIDE, Choices, Setting, commands_for
from edm2.explorer.visit import Stopped, Visit

TITLE = "Explore a model"
_MAX_WAITING = 16  # requests in Gradio's queue; a page with one more is told that the server is busy
# All that computes shares one place in Gradio's queue: a network on a GPU has buffers for one request.
_IN_TURN: dict[str, Any] = {
    "concurrency_id": "networks", "concurrency_limit": 1, "trigger_mode": "always_last", "show_progress": "hidden",
    "api_visibility": "private",
}  # fmt: skip
# The page's clock, in place of the first input, tells newer requests from older ones.
_STAMPED = "(_, ...values) => [performance.now(), ...values]"
_FITTING = f"(guide, misfits) => JSON.parse(misfits).includes(guide) ? {NO_GUIDE!r} : guide"

Update = dict[Any, Any]


class Page:
    """The explorer's page for `choices`; `demo` is the Gradio application."""

    def __init__(self, explorer: Explorer, choices: Choices, *, given_device: str | None = None) -> None:
        self._explorer, self._choices, self._given_device = explorer, choices, given_device
        self._running: Visit | None = None
        with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as self.demo:
            self._add_components(choices)
            self._connect()
        self.demo.queue(max_size=_MAX_WAITING)

    def _add_components(self, choices: Choices) -> None:
        networks = self._explorer.networks
        self._stamp, self._visit, self._active = gr.Number(0, visible=False), gr.State(Visit()), gr.State("grid")
        gr.HTML(f"<h1>{TITLE}</h1>", elem_id="title", apply_default_css=False)
        with gr.Row(elem_id="layout"):
            with gr.Column(scale=1, min_width=300, elem_id="controls"):
                with gr.Row(elem_id="actions"):
                    self._go = gr.Button("Generate", variant="primary", elem_id="go", min_width=90)
                    self._cancel = gr.Button("Cancel", elem_id="cancel", min_width=90)
                self._live = gr.Checkbox(True, label="Follow every change at once", elem_id="live", container=False)
                with gr.Row():
                    self._seed = number(0, 9999, 0, "Seed", elem_id="first_seed", min_width=120)
                    self._count = number(1, 64, 16, "Images", elem_id="num_images", min_width=120)
                with gr.Tabs(selected="a", elem_id="settings") as self._settings:
                    with gr.Tab("Setting A", id="a"):
                        self._a = build_panel(choices, networks, side="a", guidance=choices.guidance)
                    with gr.Tab("Setting B", id="b"):
                        self._b = build_panel(choices, networks, side="b", guidance=1.0)
                        self._copy = gr.Button("Make B like A", size="sm", elem_id="copy")
            with gr.Column(scale=3, min_width=320, elem_id="main"):
                self._status = gr.HTML(show.status("Loading the network"), elem_id="status", apply_default_css=False)
                with gr.Tabs(selected="grid", elem_id="tabs") as self._picker:
                    self._add_views()

    def _add_views(self) -> None:
        with gr.Tab("Grid", id="grid") as grid_tab:
            clicks = Path(__file__).with_name("clicks.js").read_text(encoding="utf-8")
            self._grid = gr.HTML(elem_id="grid", apply_default_css=False, js_on_load=clicks)
        with gr.Tab("Compare", id="compare") as compare_tab, gr.Row(elem_id="pair"):
            with gr.Column(min_width=280):
                self._view_a = gr.HTML(elem_id="view-a", apply_default_css=False)
            with gr.Column(min_width=280):
                self._view_b = gr.HTML(elem_id="view-b", apply_default_css=False)
        with gr.Tab("Film strip", id="film") as film_tab:
            with gr.Row():
                self._image = number(1, 64, 1, "Image of the grid", elem_id="image", min_width=120)
                self._frames = number(2, 16, 8, "Noise levels", elem_id="frames", min_width=120)
            self._film = gr.HTML(elem_id="film", apply_default_css=False)
        self._tabs = {"grid": grid_tab, "compare": compare_tab, "film": film_tab}

    def _connect(self) -> None:
        """A change ends the page's running request at once, and then asks for images with the newest values."""
        a, b = self._a, self._b
        request = [self._stamp, self._visit, self._live]
        pairs = [self._seed, self._count, self._image, self._frames]
        inputs = [*request, self._active, *(pair.number for pair in pairs), *a.values, *b.values]
        outputs = [self._status, self._grid, self._view_a, self._view_b, self._film]

        def follow(event: Callable[..., Any], announce: Callable[..., Any], work: Callable[..., Any]) -> None:
            event(announce, request, self._status, js=_STAMPED, **AT_ONCE).then(
                work, inputs, outputs, js=_STAMPED, **_IN_TURN
            )

        def on_change(event: Callable[..., Any]) -> None:
            follow(event, self._announce_change, self._follow_change)

        controls = [control for pair in pairs for control in (pair.number, pair.slider)] + a.changed + b.changed
        on_change(lambda *args, **options: gr.on([control.input for control in controls], *args, **options))
        for panel in (a, b):
            looked = panel.net.input(self._look, panel.net, panel.found, **AT_ONCE)
            # In the browser, since the guide may have changed while the server looked.
            fitting = looked.then(None, [panel.guide, panel.misfits], panel.guide, js=_FITTING, **AT_ONCE)
            on_change(fitting.then)
        for name, tab in self._tabs.items():
            on_change(tab.select(_opened(name), None, [self._active, self._settings], **AT_ONCE).then)
        on_change(
            self._grid.click(_film_of_clicked, None, [self._image.number, self._picker, self._active], **AT_ONCE).then
        )
        on_change(self._copy.click(self._copied, a.values, [*b.found[:2], b.misfits, *b.values], **AT_ONCE).then)
        follow(self._go.click, self._announce, self._refresh)
        follow(self.demo.load, self._announce, self._refresh)
        self._cancel.click(self._stop, request, self._status, js=_STAMPED, **AT_ONCE)

    def _announce_change(self, stamp: float, visit: Visit, live: bool) -> Any:
        return self._announce(stamp, visit, live) if live else show.status(show.CHANGED)

    def _announce(self, stamp: float, visit: Visit, live: bool) -> Any:
        visit.announce(stamp)
        if self._running in (None, visit):
            return gr.skip()
        return show.status("Waiting for another page's images", share=0)

    def _stop(self, stamp: float, visit: Visit, live: bool) -> Any:
        # A request that runs says itself that it was stopped.
        return show.status(show.STOPPED) if visit.cancel(stamp) else gr.skip()

    def _look(self, source: str | None) -> tuple[Any, ...]:
        """Return what can be chosen for another network. The request for its images reports errors."""
        try:
            return of_network((source or "").strip(), self._choices, self._explorer.networks)
        except ConfigError:
            return "", *[gr.update()] * 5

    def _copied(self, *values: Any) -> tuple[Any, ...]:
        net, length, class_idx, num_steps, solver, guide, *others = values
        facts, box, _, class_update, guide_update, misfits = self._look(net)
        class_update, guide_update = {**class_update, "value": class_idx}, {**guide_update, "value": guide}
        return facts, box, misfits, net, length, class_update, num_steps, solver, guide_update, *others

    def _follow_change(self, stamp: float, visit: Visit, live: bool, *values: Any) -> Iterator[Update]:
        if live:
            yield from self._refresh(stamp, visit, live, *values)
        else:  # once more, after the last word of a request that was still running
            yield {self._status: show.status(show.CHANGED)}

    def _refresh(self, stamp: float, visit: Visit, live: bool, active: str, *values: Any) -> Iterator[Update]:
        """Yield the images of the open tab and their progress until they are finished. Errors become one line."""
        if not visit.begin(stamp):
            yield {self._status: gr.skip()}  # Gradio clears all outputs of a generator that yields nothing
            return
        self._running = visit
        try:
            begun = time.monotonic()
            self._explorer.networks.enter_thread()
            for record in visit.follow(stamp, self._records(active, *values)):
                yield self._shown(active, record, time.monotonic() - begun)
                self._explorer.networks.enter_thread()  # Gradio may have resumed this in another thread
        except ConfigError as error:
            yield {self._status: show.status(str(error), kind="error")}
        except (MemoryError, torch.OutOfMemoryError):
            text = "Not enough memory; choose fewer images, or start with a smaller --cache-size"
            yield {self._status: show.status(text, kind="error")}
        except Exception as error:
            traceback.print_exc()  # a bug of ours
            text = f"An unexpected error occurred ({type(error).__name__}); see the terminal for details"
            yield {self._status: show.status(text, kind="error")}
        finally:
            if self._running is visit:  # after a page was closed, Gradio may start the next request before this
                self._running = None

    def _records(self, active: str, seed: Any, count: Any, image: Any, frames: Any, *values: Any) -> Any:
        half = len(values) // 2
        a = setting_of(values[:half], seed, count)
        if active == "grid":
            return self._explorer.grid(a)
        if active == "film":
            position, num_frames = whole("image of the grid", image) - 1, whole("number of noise levels", frames)
            return self._explorer.film(a, position, num_frames=num_frames)
        return self._explorer.both(a, setting_of(values[half:], seed, count))

    def _shown(self, active: str, record: Any, seconds: float) -> Update:
        if isinstance(record, Stopped):
            return {self._status: show.status("Waiting", share=0) if record.replaced else show.status(show.STOPPED)}
        if isinstance(record, Pair):
            return self._pair_shown(record, seconds)
        share = record.share if isinstance(record, Progress) else None
        view = {"grid": self._grid, "film": self._film}[active]
        return {self._status: show.status(_text(record, seconds), share=share), **self._view(view, record)}

    def _pair_shown(self, pair: Pair, seconds: float) -> Update:
        views = {**self._view(self._view_a, pair.a, "a"), **self._view(self._view_b, pair.b, "b")}
        if isinstance(pair.a, Grid) and isinstance(pair.b, Grid):
            return {self._status: show.status(show.differences(pair.a.setting, pair.b.setting)), **views}
        side, running, done = ("A", pair.a, 0.0) if pair.b is None else ("B", pair.b, 1.0)
        share = (done + (running.share if isinstance(running, Progress) else 0.0)) / 2
        return {self._status: show.status(f"{side}: {_text(running, seconds)}", share=share), **views}

    def _view(self, view: gr.HTML, record: Any, name: str = "grid") -> Update:
        """Return the update of `view` for a record; empty if its images stay as they are."""
        if isinstance(record, Progress) and record.images is not None:
            return {view: show.unfinished(record)}
        if isinstance(record, Grid):
            names = self._class_names(record.setting)
            return {view: show.grid(record, self._commands(record.setting), name=name, class_names=names)}
        if isinstance(record, Film):
            return {view: show.film(record, self._commands(record.setting), self._class_names(record.setting))}
        return {}

    def _class_names(self, setting: Setting) -> tuple[str, ...]:
        return self._explorer.networks.facts(setting.net).class_names

    def _commands(self, setting: Setting) -> list[str]:
        return commands_for(
            setting, self._explorer.networks, given_device=self._given_device, batch=self._explorer.batch
        )


def _text(record: Any, seconds: float) -> str:
    if isinstance(record, Loading | Progress):
        return record.text
    return f"Done in {seconds:.1f} s" if seconds >= 0.05 else "Done"


def _film_of_clicked(event: gr.EventData) -> tuple[Any, ...]:
    return int(event.position) + 1, gr.Tabs(selected="film"), "film"


def _opened(name: str) -> Callable[[], tuple[Any, ...]]:
    return lambda: (name, gr.Tabs(selected="b" if name == "compare" else "a"))
