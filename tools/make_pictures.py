"""Makes the pictures of README.md from pages that jaxft wrote: docs/images/*.png.

    make demo && python tools/make_pictures.py

Needs Chromium, which draws the pages without a window.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from pictures import ROOT, begin, check_size

# Name of the picture: the page, the heading that it begins with, its height in pixels.
PICTURES = {
    "report": ("runs/demo/finetune/report.html", "", 832),
    "plan": ("docs/plans/llama-3.1-8b.html", "Memory of one device", 812),
}
WIDTH = 960
LARGEST = 150_000  # bytes

# Moves the page up so that the heading comes first.
SCROLL = """<script>addEventListener("load", () => {
  const found = [...document.querySelectorAll("h1, h2, h3")]
    .find(heading => heading.textContent.includes(%r));
  if (found) document.body.style.marginTop = `${20 - found.getBoundingClientRect().top}px`;
});</script>"""


def main() -> int:
    """Draws each picture, and says what is missing."""
    chromium, output = begin(__doc__, ROOT / "docs/images")
    output.mkdir(parents=True, exist_ok=True)
    for name, (page, heading, height) in PICTURES.items():
        if not (ROOT / page).is_file():
            sys.exit(f"There is no {page}; run `make demo` first.")
        picture = output / f"{name}.png"
        draw(chromium, ROOT / page, picture, heading=heading, height=height)
        check_size(picture, LARGEST)
    return 0


def draw(chromium: str, page: Path, picture: Path, *, heading: str, height: int) -> None:
    """Writes the part of a page that begins with a heading; the top if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        shown = Path(folder) / "page.html"
        shown.write_text(page.read_text("utf-8") + (SCROLL % heading if heading else ""), "utf-8")
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--window-size={WIDTH},{height}", f"--screenshot={picture}", shown.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    sys.exit(main())
