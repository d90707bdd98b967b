"""The controls of one setting, and the setting that they stand for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gradio as gr

from dnnlib.errors import ConfigError
from edm2.explorer.choices import NO_GUIDE, Choices, length_for, needs_length
from edm2.explorer.networks import NetworkFacts, Networks
from edm2.explorer.setting import Setting
from training.sampling.solvers import SOLVERS

RANDOM, ALL, NO_CLASS = "random", "all", "none"
_SOLVER_NAMES = {"heun": "Heun", "euler": "Euler", "dpmpp2m": "DPM++ 2M"}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The controls of a setting, apart from its seeds."""

    net: gr.Dropdown
    facts: gr.HTML
    ema: gr.Slider
    class_idx: gr.Dropdown
    num_steps: gr.Slider
    solver: gr.Dropdown
    guide: gr.Dropdown
    guidance: gr.Slider
    limited: gr.Checkbox
    low: gr.Slider
    high: gr.Slider

    @property
    def values(self) -> list[Any]:
        """What `setting_of` needs, in its order."""
        return [
            self.net, self.ema, self.class_idx, self.num_steps, self.solver, self.guide, self.guidance, self.limited,
            self.low, self.high,
        ]  # fmt: skip

    @property
    def plain(self) -> list[Any]:
        """Controls whose change asks for new pictures and nothing else."""
        return [self.ema, self.class_idx, self.num_steps, self.solver, self.guidance, self.low, self.high]


def build_panel(choices: Choices, networks: Networks, *, side: str, **changes: Any) -> Panel:
    """Lay the controls out where they are called for; `side` names them in the page, `changes` are first values."""
    net = choices.networks[0][1] if choices.networks else ""
    facts = networks.facts(net) if net else None
    length = None if facts is None else length_for(facts)
    guide = choices.guide

    def slider(name: str, low: float, high: float, value: float, **more: Any) -> gr.Slider:
        made = gr.Slider(low, high, changes.get(name, value), buttons=[], elem_id=f"{side}-{name}", **more)
        unchecked(made)
        return made

    with gr.Group():
        panel_net = gr.Dropdown(
            choices.networks, value=net, label="Network", allow_custom_value=choices.typed, elem_id=f"{side}-net",
            info="A file, a model folder, or the folder of a run" if choices.typed else None,
        )  # fmt: skip
        panel_facts = gr.HTML(_told(facts), elem_id=f"{side}-facts", apply_default_css=False)
        ema = slider("ema", 0.01, 0.25, length or 0.1, step=0.001, label="EMA length", visible=length is not None)
    class_idx = gr.Dropdown(
        _classes(facts),
        value=RANDOM,
        label="Class",
        elem_id=f"{side}-class_idx",
        visible=bool(facts and facts.label_dim),
    )
    with gr.Row():
        num_steps = slider("num_steps", 1, 64, 18, step=1, label="Steps", min_width=130, scale=3)
        solver = gr.Dropdown(
            [(_SOLVER_NAMES.get(name, name), name) for name in SOLVERS],
            value="heun", label="Solver", filterable=False, elem_id=f"{side}-solver", min_width=110, scale=2,
        )  # fmt: skip
    panel_guide = gr.Dropdown(
        choices.guides, value=guide, label="Guide", allow_custom_value=choices.typed, elem_id=f"{side}-guide"
    )
    with gr.Column(visible=guide != NO_GUIDE, elem_id=f"{side}-guiding", elem_classes="plain") as guiding:
        guidance = slider("guidance", 0, 4, choices.guidance, step=0.05, label="Guidance (1 = none)")
        limited = gr.Checkbox(False, label="Only at some noise levels", elem_id=f"{side}-limited")
        with gr.Row(visible=False) as levels:
            low = slider("low", 0, 10, 0.28, step=0.01, label="Above σ", min_width=120)
            high = slider("high", 0.01, 80, 2.9, step=0.01, label="Up to σ", min_width=120)
    panel_guide.change(lambda name: gr.Column(visible=_guide(name) is not None), panel_guide, guiding, **AT_ONCE)
    limited.change(lambda on: gr.Row(visible=on), limited, levels, **AT_ONCE)
    return Panel(
        net=panel_net, facts=panel_facts, ema=ema, class_idx=class_idx, num_steps=num_steps, solver=solver,
        guide=panel_guide, guidance=guidance, limited=limited, low=low, high=high,
    )  # fmt: skip


# Events that only rearrange the page: not in the queue, and not shown as work.
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def of_network(source: str, networks: Networks) -> tuple[Any, ...]:
    """Updates of facts, EMA length and class for another network. Raises ConfigError for what is none."""
    facts = networks.facts(source)
    length = length_for(facts)
    return (
        _told(facts),
        gr.update(visible=length is not None, **({} if length is None else {"value": length})),
        gr.update(choices=_classes(facts), value=RANDOM, visible=bool(facts.label_dim)),
    )


def setting_of(values: Sequence[Any], first_seed: Any, num_images: Any) -> Setting:
    """The setting that a panel's `values` stand for. Raises ConfigError."""
    net, ema, class_idx, num_steps, solver, guide, guidance, limited, low, high = values
    guide = _guide(guide)
    net = (net or "").strip()
    return Setting(
        net=net,
        ema=round(_number("EMA length", ema), 3) if needs_length(net) else None,
        guide=guide,
        guidance=_number("guidance", guidance) if guide is not None else 1.0,
        interval=(_number("noise level", low), _number("noise level", high)) if guide is not None and limited else None,
        class_idx=_class(class_idx),
        first_seed=whole("first seed", first_seed),
        num_images=whole("number of images", num_images),
        num_steps=whole("number of steps", num_steps),
        solver=str(solver),
    )


def _told(facts: NetworkFacts | None) -> str:
    return "" if facts is None else f'<p class="facts">{facts}</p>'


def _classes(facts: NetworkFacts | None) -> list[tuple[str, str]]:
    count = 0 if facts is None else facts.label_dim
    found = [("random", RANDOM), ("all, a row for each", ALL), *((str(i), str(i)) for i in range(count))]
    return [*found, (NO_CLASS, NO_CLASS)] if facts is not None and facts.label_dropout else found


def _guide(value: Any) -> str | None:
    """The guide that was chosen or typed; None for none."""
    name = str(value or "").strip()
    return None if name in ("", NO_GUIDE) else name


def _class(value: Any) -> int | Literal["all", "none"] | None:
    if value in (RANDOM, None):
        return None
    if value == NO_CLASS:
        return "none"
    return "all" if value == ALL else whole("class", value)


def _number(what: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"the {what} is empty or no number; give one") from None


def whole(what: str, value: Any) -> int:
    """`value` as a whole number; raises ConfigError where it is none."""
    number = _number(what, value)
    if number != round(number):
        raise ConfigError(f"{number:g} is no {what}; give a whole number")
    return round(number)


def unchecked(*sliders: gr.Slider) -> None:
    """Take whatever was typed beside a slider as it is: settings say in their words what is wrong with it."""
    for slider in sliders:
        slider.preprocess = lambda payload: payload
