"""How the page looks: Gradio's plain theme in the colours of the report, and a style sheet; nothing from elsewhere."""

import gradio as gr

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Liberation Sans", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")


def theme() -> gr.themes.Base:
    """Without fonts of the web."""
    plain = gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        font=SANS,
        font_mono=MONO,
        spacing_size=gr.themes.sizes.spacing_sm,
    )
    return plain.set(
        button_primary_background_fill="#1768ac",
        button_primary_background_fill_hover="#12558d",
        button_primary_text_color="#ffffff",
        button_primary_background_fill_dark="#2f7fc4",
        slider_color="#1768ac",
        slider_color_dark="#6db3f2",
    )


STYLE = """
footer { display: none !important; }
#title h1 { font-size: 1.35rem; font-weight: 600; margin: 0; }
#layout:not(:has(.state.busy)) #cancel { opacity: .5; }
#layout { gap: 1.6rem; align-items: flex-start; }
.state .bar { height: 4px; border-radius: 2px; background: var(--border-color-primary); overflow: hidden; }
.state .bar i { display: block; height: 100%; background: #1768ac; }
.state p { margin: .35rem 0 0; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.state.error p { color: #b3261e; }
.dark .state.error p { color: #ff9d94; }
.facts { margin: 0; color: var(--body-text-color-subdued); font-size: .85rem; }
.picture { display: block; max-width: 100%; height: auto; border-radius: 3px; background: #fff; }
.picture.sharp { image-rendering: pixelated; }
.sheet { cursor: pointer; display: inline-block; max-width: 100%; }
.below { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: baseline; margin: .7rem 0; }
.below .note { margin: 0; color: var(--body-text-color-subdued); font-size: .9rem; }
.command { border: 1px solid var(--border-color-primary); border-radius: 6px; overflow: hidden; }
.command .head { display: flex; justify-content: space-between; align-items: center; }
.command .head { padding: .25rem .3rem .25rem .8rem; }
.command .head { background: var(--background-fill-secondary); font-size: .85rem; }
.command pre { margin: 0; padding: .7rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.command pre span { display: inline-block; max-width: 100%; }
.command pre { font: .82rem/1.55 var(--font-mono); background: none; color: var(--body-text-color); }
.command button, a.download {
  border: 1px solid var(--border-color-primary); border-radius: 5px; padding: .15rem .7rem; font-size: .85rem;
  background: var(--background-fill-primary); color: var(--body-text-color); text-decoration: none; cursor: pointer;
}
[id$="-facts"] { background: var(--block-background-fill) !important; }
#controls input { text-overflow: ellipsis; }
#view-a::before, #view-b::before { display: block; font-weight: 600; margin: 0 0 .2rem 11px; }
#view-a::before { content: "A"; }
#view-b::before { content: "B"; }
.strip { display: flex; gap: .6rem; }
.sides { display: grid; grid-template-rows: 1.4rem 1fr 1fr .4rem; align-items: center; font-size: .8rem; }
.sides span { color: var(--body-text-color-subdued); }
.frames { display: flex; gap: .4rem; overflow-x: auto; padding-bottom: .4rem; }
.frames figure { margin: 0; flex: none; }
.frames figcaption { font-size: .8rem; text-align: center; color: var(--body-text-color-subdued); }
.frames img { margin-top: .3rem; }
@media (max-width: 700px) {
  #main { order: -1; }
  #layout { gap: 1rem; }
}
"""
