"""The controls of one setting, and the setting that their values stand for."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gradio as gr

from dnnlib.errors import ConfigError
from edm2.explorer.networks import NetworkFacts, Networks, is_run_folder
from edm2.explorer.setting import NO_GUIDE, Choices, Setting
from training.sampling.denoisers import SELF
from training.sampling.solvers import SOLVERS

# Events that only rearrange the page: outside the queue, and not shown as work.
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

_RANDOM, _ALL, _NO_CLASS = "random", "all", "none"
_SOLVER_NAMES = {"heun": "Heun", "euler": "Euler", "dpmpp2m": "DPM++ 2M"}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The controls of a setting, apart from its seeds."""

    net: gr.Dropdown
    found: list[Any]  # what another network changes: the outputs of `of_network`
    guide: gr.Dropdown
    misfits: gr.Textbox  # hidden: names of guides that do not fit the network, as JSON
    values: list[Any]  # the controls that `setting_of` reads, in its order
    changed: list[Any]  # those and sliders, without the network: what a user changes


def build_panel(choices: Choices, networks: Networks, *, side: str, guidance: float) -> Panel:
    """Add the controls to the current block; `side` is the prefix of their ids in the page."""
    net = choices.networks[0][1] if choices.networks else ""
    facts = networks.facts(net) if net else None
    length = None if facts is None else facts.length

    def named(name: str) -> dict[str, Any]:
        return {"elem_id": f"{side}-{name}"}

    with gr.Group():
        net_picker = gr.Dropdown(
            choices.networks, value=net, label="Network", allow_custom_value=choices.typed, **named("net"),
            info="A file, a model folder, or the folder of a run" if choices.typed else None,
        )  # fmt: skip
        facts_html = gr.HTML(_facts_html(facts), apply_default_css=False, **named("facts"))
        ema = number(0.01, 0.25, length or 0.1, "EMA length", 0.001, visible=length is not None, **named("ema"))
    class_idx = gr.Dropdown(
        _classes(facts), value=_RANDOM, label="Class", visible=bool(facts and facts.label_dim), **named("class_idx")
    )
    with gr.Row():
        num_steps = number(1, 64, 18, "Steps", min_width=130, scale=3, **named("num_steps"))
        solver = gr.Dropdown(
            [(_SOLVER_NAMES.get(name, name), name) for name in SOLVERS],
            value="heun", label="Solver", filterable=False, min_width=110, scale=2, **named("solver"),
        )  # fmt: skip
    guide = gr.Dropdown(
        choices.guides, value=choices.guide, label="Guide", allow_custom_value=choices.typed, **named("guide")
    )
    with gr.Column(visible=choices.guide != NO_GUIDE, elem_classes="plain") as guiding:
        strength = number(0, 4, guidance, "Guidance (1 = none)", 0.05, **named("guidance"))
        limited = gr.Checkbox(False, label="Only at some noise levels", **named("limited"))
        with gr.Row(visible=False) as levels:
            low = number(0, 10, 0.28, "Above σ", 0.01, min_width=120, **named("low"))
            high = number(0.01, 80, 2.9, "Up to σ", 0.01, min_width=120, **named("high"))
    guide.change(lambda name: gr.Column(visible=_guide(name) is not None), guide, guiding, **AT_ONCE)
    limited.change(lambda on: gr.Row(visible=on), limited, levels, **AT_ONCE)
    misfits = gr.Textbox("[]", visible=False)
    numbers = [num_steps, strength, low, high]
    pickers = [class_idx, solver, guide, limited]
    return Panel(
        net=net_picker,
        found=[facts_html, ema.box, ema.number, class_idx, guide, misfits],
        guide=guide,
        misfits=misfits,
        values=[net_picker, ema.number, class_idx, num_steps.number, solver, guide, strength.number, limited,
                low.number, high.number],
        changed=[*pickers, *(each for pair in (ema, *numbers) for each in (pair.number, pair.slider))],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A number to type, and a slider for the usual ones. The number counts: what it shows is what is computed."""

    box: gr.Column
    number: gr.Number
    slider: gr.Slider


def number(
    low: float,
    high: float,
    value: float,
    label: str,
    step: float = 1,
    *,
    elem_id: str,
    visible: bool = True,
    **box: Any,
) -> Pair:
    """Add a number and its slider. Any number can be typed: settings have better messages than Gradio's check."""
    with gr.Column(elem_id=elem_id, elem_classes="number", visible=visible, **box) as column, gr.Group():
        typed = gr.Number(value, label=label, step=step)
        slid = gr.Slider(low, high, min(max(value, low), high), step=step, label=label, show_label=False, buttons=[])
    slid.input(None, slid, typed, js="value => value", **AT_ONCE)
    typed.change(None, typed, slid, js=f"value => Math.min(Math.max(value ?? {low}, {low}), {high})", **AT_ONCE)
    return Pair(box=column, number=typed, slider=slid)


def of_network(source: str, choices: Choices, networks: Networks) -> tuple[Any, ...]:
    """Return updates of a panel's `found` for another network. Raises ConfigError."""
    facts = networks.facts(source)
    guides = choices.guides_of(source, facts)
    # Names that were typed may fit or not; their images tell.
    misfits = {SELF, *(name for _, name, _ in choices.known)} - {name for _, name in guides}
    return (
        _facts_html(facts),
        gr.update(visible=facts.length is not None),
        gr.skip() if facts.length is None else facts.length,
        gr.update(choices=_classes(facts), value=_RANDOM, visible=bool(facts.label_dim)),
        gr.update(choices=guides),
        json.dumps(sorted(misfits)),
    )


def setting_of(values: Sequence[Any], first_seed: Any, num_images: Any) -> Setting:
    """Return the setting that a panel's `values` stand for. Raises ConfigError."""
    net, ema, class_idx, num_steps, solver, guide, guidance, limited, low, high = values
    guide = _guide(guide)
    net = (net or "").strip()
    return Setting(
        net=net,
        ema=_number("EMA length", ema) if is_run_folder(net) else None,
        guide=guide,
        guidance=_number("guidance", guidance) if guide is not None else 1.0,
        interval=(_number("noise level", low), _number("noise level", high)) if guide is not None and limited else None,
        class_idx=_class(class_idx),
        first_seed=whole("first seed", first_seed),
        num_images=whole("number of images", num_images),
        num_steps=whole("number of steps", num_steps),
        solver=str(solver),
    )


def whole(what: str, value: Any) -> int:
    """Return `value` as an integer. Raises ConfigError if it is not a whole number."""
    number = _number(what, value)
    if number != round(number):
        raise ConfigError(f"the {what} must be a whole number, not {number:g}")
    return round(number)


def _number(what: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"the {what} must be a number") from None


def _facts_html(facts: NetworkFacts | None) -> str:
    return "" if facts is None else f'<p class="facts">{facts}</p>'


def _classes(facts: NetworkFacts | None) -> list[tuple[str, str]]:
    count = 0 if facts is None else facts.label_dim
    names = () if facts is None else facts.class_names
    texts = [f"{i} {names[i]}" if i < len(names) else str(i) for i in range(count)]
    choices = [("random", _RANDOM), ("all, a row for each", _ALL), *((text, str(i)) for i, text in enumerate(texts))]
    return [*choices, (_NO_CLASS, _NO_CLASS)] if facts is not None and facts.label_dropout else choices


def _class(value: Any) -> int | Literal["all", "none"] | None:
    if value in (_RANDOM, None):
        return None
    if value == _NO_CLASS:
        return "none"
    return "all" if value == _ALL else whole("class", value)


def _guide(value: Any) -> str | None:
    name = str(value or "").strip()
    return None if name in ("", NO_GUIDE) else name
