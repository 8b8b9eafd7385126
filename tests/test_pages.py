"""Pages of a run and of a plan in a real browser, at the widths of a desk and of a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

from rootnoise.cli import main
from rootnoise.runs import report
from rootnoise.runs.config import RunConfig
from rootnoise.runs.run import run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")

# A page in a frame of some width; a script looks at it and writes down what it finds.
FRAME = """<!doctype html><body><iframe width="%d" height="800" srcdoc="%s"></iframe>
<script>
const errors = [];
addEventListener("error", e => errors.push(e.message));
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument, all = [];
  const width = page.documentElement.clientWidth;
  for (const e of page.querySelectorAll("h1, h2, p, th, td, dt, dd, li, svg, figcaption, pre")) {
    const box = e.getBoundingClientRect();
    if (box.width && (box.right > width + 1 || box.left < -1)) all.push(e.textContent.slice(0, 40));
    if (e.scrollWidth > e.clientWidth + 1 && e.matches("td, th, p, pre")) all.push(e.textContent);
  }
  const words = [...page.querySelectorAll("svg text")].map(e => e.getBoundingClientRect());
  let over = 0;
  words.forEach((a, i) => words.slice(i + 1).forEach(b => {
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (x > 2 && y > 0.4 * Math.min(a.height, b.height)) over += 1;
  }));
  const style = getComputedStyle(page.body);
  const loud = s => getComputedStyle(page.querySelector(s)).color;
  document.title = JSON.stringify({cut: all, over, errors, wide: page.body.scrollWidth > width,
    ink: style.color, paper: style.backgroundColor, text: loud("svg text") || style.color,
    least: Math.min(...words.map(w => w.height)), shown: [...page.querySelectorAll("th")]
      .filter(e => e.getBoundingClientRect().width).map(e => e.textContent)});
});
</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report, a comparison and a plan."""
    folder = tmp_path_factory.mktemp("pages")
    config = RunConfig(dataset="digits", model="logistic", epsilon=4.0, epochs=2, batch_size=200)
    run(config, folder / "run", report=True)
    two = [report.read(folder / "run")] * 2
    job = "plan --dataset-size 600 --batch-size 50 --epochs 4 --epsilon 6 --delta 1e-5"
    assert main([*job.split(), "--momentum", "0.9", "--html", str(folder / "plan.html")]) == 0
    return {
        "report": (folder / "run/report.html").read_text(),
        "comparison": report.comparison(two),
        "plan": (folder / "plan.html").read_text(),
    }


def seen(folder, text, width, dark):
    """Return what the browser finds on a page in a frame of that width."""
    file = folder / "frame.html"
    file.write_text(FRAME % (width, escape(text)))
    scheme = 0 if dark else 1
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900", file.as_uri()]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", made.stdout, re.DOTALL)
    assert title is not None, made.stderr[-500:]
    return json.loads(unescape(title[1]))


def brightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("name", ["report", "comparison", "plan"])
def test_nothing_is_cut_and_all_can_be_read(pages, tmp_path, name, width, dark):
    found = seen(tmp_path, pages[name], width, dark)
    assert found["errors"] == []
    assert found["cut"] == []
    assert not found["wide"]
    assert found["over"] == 0
    assert found["least"] > 7  # pixels of the smallest letters of a picture
    ink, paper = brightness(found["ink"]), brightness(found["paper"])
    assert (ink > 0.8, paper < 0.2) == (dark, dark)
    assert found["text"] == found["ink"]
    if name == "plan":
        assert {"mechanism", "memory", "error", "gap"} <= set(found["shown"])
        assert ("bands" in found["shown"]) == (width > 1000)
