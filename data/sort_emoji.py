"""Sort the images of the npm package emoji-datasource-google into a folder for each category.

    npm pack emoji-datasource-google@16.0.0
    tar -xf emoji-datasource-google-16.0.0.tgz
    python data/sort_emoji.py --source=package --dest=emoji

The images are Noto Emoji, under Apache-2.0, with transparent pixels. See docs/own-data.md.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, which need not be installed

from dnnlib.cli import PATH

IMAGES = Path("img", "google", "64")
LEFT_OUT = "Component"  # five plain squares in skin colors


@click.command()
@click.option("--source", type=PATH, required=True, help="The folder `package` of the package.")
@click.option("--dest", type=PATH, required=True, help="Folder to write.")
def main(source: Path, dest: Path) -> None:
    """Write DEST/{category}/{emoji}.png for all emoji with an image in the package, skin tones included."""
    try:
        emoji = json.loads((source / "emoji.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{source} is not the folder of emoji-datasource-google: {error}") from None
    number = 0
    for entry in emoji:
        if entry["category"] == LEFT_OUT:
            continue
        folder = dest / re.sub(r"\W+", "-", entry["category"]).lower()
        folder.mkdir(parents=True, exist_ok=True)
        for variant in (entry, *entry.get("skin_variations", {}).values()):
            path = source / IMAGES / variant["image"]
            if path.is_file():
                shutil.copyfile(path, folder / variant["image"])
                number += 1
    click.echo(f"{dest}: {number} images in {len(list(dest.iterdir()))} folders")


if __name__ == "__main__":
    main()
