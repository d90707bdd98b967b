"""The controls of one setting, and the setting that their values stand for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gradio as gr

from dnnlib.errors import ConfigError
from edm2.explorer.networks import NetworkFacts, Networks, is_run_folder
from edm2.explorer.setting import NO_GUIDE, Choices, Setting
from training.sampling.solvers import SOLVERS

# Events that only rearrange the page: outside the queue, and not shown as work.
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

_RANDOM, _ALL, _NO_CLASS = "random", "all", "none"
_SOLVER_NAMES = {"heun": "Heun", "euler": "Euler", "dpmpp2m": "DPM++ 2M"}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The controls of a setting, apart from its seeds."""

    net: gr.Dropdown
    facts: gr.HTML
    ema: gr.Slider
    class_idx: gr.Dropdown
    values: list[Any]  # the controls that `setting_of` reads, in its order


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
        ema = slider(0.01, 0.25, length or 0.1, "EMA length", 0.001, visible=length is not None, **named("ema"))
    class_idx = gr.Dropdown(
        _classes(facts), value=_RANDOM, label="Class", visible=bool(facts and facts.label_dim), **named("class_idx")
    )
    with gr.Row():
        num_steps = slider(1, 64, 18, "Steps", min_width=130, scale=3, **named("num_steps"))
        solver = gr.Dropdown(
            [(_SOLVER_NAMES.get(name, name), name) for name in SOLVERS],
            value="heun", label="Solver", filterable=False, min_width=110, scale=2, **named("solver"),
        )  # fmt: skip
    guide = gr.Dropdown(
        choices.guides, value=choices.guide, label="Guide", allow_custom_value=choices.typed, **named("guide")
    )
    with gr.Column(visible=choices.guide != NO_GUIDE, elem_classes="plain") as guiding:
        strength = slider(0, 4, guidance, "Guidance (1 = none)", 0.05, **named("guidance"))
        limited = gr.Checkbox(False, label="Only at some noise levels", **named("limited"))
        with gr.Row(visible=False) as levels:
            low = slider(0, 10, 0.28, "Above σ", 0.01, min_width=120, **named("low"))
            high = slider(0.01, 80, 2.9, "Up to σ", 0.01, min_width=120, **named("high"))
    guide.change(lambda name: gr.Column(visible=_guide(name) is not None), guide, guiding, **AT_ONCE)
    limited.change(lambda on: gr.Row(visible=on), limited, levels, **AT_ONCE)
    values = [net_picker, ema, class_idx, num_steps, solver, guide, strength, limited, low, high]
    return Panel(net=net_picker, facts=facts_html, ema=ema, class_idx=class_idx, values=values)


def slider(low: float, high: float, value: float, label: str, step: float = 1, **more: Any) -> gr.Slider:
    """Return a slider that accepts any number typed next to it: settings have better messages than Gradio's check."""
    made = gr.Slider(low, high, value, label=label, step=step, buttons=[], **more)
    made.preprocess = lambda payload: payload
    return made


def of_network(source: str, networks: Networks) -> tuple[Any, Any, Any]:
    """Return updates of facts, EMA length and class for another network. Raises ConfigError."""
    facts = networks.facts(source)
    length = {} if facts.length is None else {"value": facts.length}
    return (
        _facts_html(facts),
        gr.update(visible=facts.length is not None, **length),
        gr.update(choices=_classes(facts), value=_RANDOM, visible=bool(facts.label_dim)),
    )


def setting_of(values: Sequence[Any], first_seed: Any, num_images: Any) -> Setting:
    """Return the setting that a panel's `values` stand for. Raises ConfigError."""
    net, ema, class_idx, num_steps, solver, guide, guidance, limited, low, high = values
    guide = _guide(guide)
    net = (net or "").strip()
    return Setting(
        net=net,
        ema=round(_number("EMA length", ema), 3) if is_run_folder(net) else None,
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
    choices = [("random", _RANDOM), ("all, a row for each", _ALL), *((str(i), str(i)) for i in range(count))]
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
