"""For MkDocs: docs/*.ipynb as pages, with the outputs that were committed. Nothing is run."""

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page {name}.md, and its pictures, for each {name}.ipynb."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = notebook.src_uri.removesuffix(".ipynb")
        markdown, pictures = to_markdown(json.loads(notebook.content_string), name)
        files.append(File.generated(config, f"{name}.md", content=markdown))
        for uri, data in pictures.items():
            files.append(File.generated(config, uri, content=data))
    return files


def to_markdown(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """The text of a notebook's cells and outputs, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(_fenced(source, "python"))
            for output in cell["outputs"]:
                data = output.get("data", {})
                if "image/png" in data:
                    uri = f"{name}-{len(pictures)}.png"
                    pictures[uri] = base64.b64decode("".join(data["image/png"]))
                    parts.append(f"![Output of the cell above]({Path(uri).name})")
                else:
                    text = "".join(output.get("text", data.get("text/plain", [])))
                    parts.append(_fenced(text.rstrip("\n"), "text"))
    return "\n\n".join(parts) + "\n", pictures


def _fenced(text: str, language: str) -> str:
    return f"~~~{language}\n{text}\n~~~"
