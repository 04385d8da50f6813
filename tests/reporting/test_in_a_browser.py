"""Each kind of page in a real browser, on a phone and on a desktop: nothing is wider than the window, no error."""

import json
import re
import shutil
import subprocess

import page_examples
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
WIDTHS = (390, 1280)
# A window of a browser has a least width, a frame has not. Frames from `srcdoc` can be read by the page around them.
MEASURE = """
<!DOCTYPE html><meta charset="utf-8"><body><pre id="found"></pre><script>
const found = [];
let open = 0;
function measured(frame, name) {
  const page = frame.contentDocument, all = [...page.querySelectorAll("body *")];
  const scrolls = (e) => e.closest(".scroll, pre");
  const wide = all.filter((e) => !scrolls(e) && e.getBoundingClientRect().right > frame.contentWindow.innerWidth + 1);
  const cut = [...page.querySelectorAll("ol.net .is, .tiles li")].filter((e) => e.scrollWidth > e.clientWidth + 1);
  found.push([name, frame.contentWindow.innerWidth, page.documentElement.scrollWidth, wide.length + cut.length,
    page.querySelectorAll("section").length].join(" "));
  if (--open === 0) document.getElementById("found").textContent = "FOUND " + found.sort().join("; ") + " END";
}
function show(name, width, text) {
  open++;
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:844px;border:0`;
  frame.onload = () => measured(frame, name);
  frame.srcdoc = text;
  document.body.append(frame);
}
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_each_page_fits_a_phone_and_a_desktop(tmp_path):
    pages = {name: make() for name, make in page_examples.KINDS.items()}
    shows = []
    for name, text in pages.items():
        opened = text.replace("<details>", "<details open>")
        quoted = json.dumps(opened).replace("</", "<\\/")
        shows += [f"show({name!r}, {width}, {quoted});" for width in WIDTHS]
    (tmp_path / "all.html").write_text(f"{MEASURE}{' '.join(shows)}</script>")
    done = subprocess.run(
        [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            *(
                "--window-size=1400,844",
                "--enable-logging=stderr",
                "--virtual-time-budget=5000",
                "--dump-dom",
            ),
            (tmp_path / "all.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    told = re.search(r"FOUND (.*?) END", done.stdout)
    assert told, f"{done.stdout:.2000}{done.stderr:.2000}"
    rows = [row.split() for row in told[1].split("; ")]
    assert len(rows) == len(pages) * len(WIDTHS)
    for name, width, scrolled, wider, sections in rows:
        assert int(width) in WIDTHS and int(scrolled) <= int(width), (name, width, scrolled)
        assert int(wider) == 0, f"{wider} elements of {name} are wider than {width} pixels"
        assert int(sections) == pages[name].count("<section")
