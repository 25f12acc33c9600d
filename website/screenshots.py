# SPDX-License-Identifier: Apache-2.0
"""The pictures of docs/images, of a run of the tiny project that `rlhf-fast init` writes: `make screenshots`.

    python website/screenshots.py FOLDER [report | label | live]

report.png is the run's report and label.png the page of `rlhf-fast label`, both in a headless Chromium; live.png is
the terminal while PPO runs, as a terminal emulator (pyte) has it.
"""

from __future__ import annotations

import html
import os
import pty
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import termios
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pyte
from playwright.sync_api import Browser, sync_playwright

COLUMNS, LINES = 110, 22
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COMMAND = [sys.executable, "-m", "rlhf_fast"]
SHOWN_AT = 0.6  # of the steps of PPO
STYLE = "margin:0;padding:14px;background:#111827;color:#e5e7eb;font:14px/1.35 'DejaVu Sans Mono',monospace"
COLORS = {"green": "#4ade80", "red": "#f87171", "brown": "#facc15", "cyan": "#22d3ee", "magenta": "#e879f9"}


def run_in_a_terminal(project: Path, folder: Path) -> str:
    """`rlhf-fast run` on the project; the screen as HTML at SHOWN_AT of PPO's steps."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    main, side = pty.openpty()
    ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    command = [*COMMAND, "run", "--config", project.name + "/config.yaml", "--output-dir", "runs/first"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "", "COLUMNS": str(COLUMNS)}
    process = subprocess.Popen(command, cwd=folder, stdin=side, stdout=side, stderr=side, env=environment)
    os.close(side)
    shown = ""
    while True:
        try:
            data = os.read(main, 4096)
        except OSError:  # the process has ended
            break
        if not data:
            break
        stream.feed(data)
        steps = re.search(r"ppo\b.*?(\d+)/(\d+)", "\n".join(screen.display))
        if not shown and steps and int(steps[1]) >= SHOWN_AT * int(steps[2]):
            shown = as_html(screen)
    if process.wait() or not shown:
        raise SystemExit("the run failed:\n" + "\n".join(line.rstrip() for line in screen.display))
    return shown


def as_html(screen: Any) -> str:
    """The screen's lines in their colours, without the empty ones at its end."""
    lines = []
    for row in range(screen.lines):
        cells = (screen.buffer[row][column] for column in range(screen.columns))
        lines.append("".join(_cell(cell) for cell in cells))
    empty = re.compile(r"^\s*$")
    while lines and empty.match(lines[-1]):
        lines.pop()
    return f'<pre style="{STYLE};width:{COLUMNS}ch">rlhf-fast run\n' + "\n".join(lines) + "</pre>"


def _cell(cell: Any) -> str:
    color = COLORS.get(cell.fg) or (f"#{cell.fg}" if re.fullmatch("[0-9a-f]{6}", cell.fg) else "")
    style = (f"color:{color};" if color else "") + ("font-weight:bold" if cell.bold else "")
    text = html.escape(cell.data)
    return f"<span style='{style}'>{text}</span>" if style else text


def picture(browser: Browser, address: str, path: Path, size: tuple[int, int], whole: bool = False) -> None:
    """A page as it stands, in light colours."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme="light")
    page.goto(address)
    page.wait_for_timeout(500)
    if whole:
        page.locator("pre").screenshot(path=path)
    else:
        page.screenshot(path=path)
    page.close()


def label_page(browser: Browser, project: Path, path: Path) -> None:
    """The page as an annotator sees it who has begun."""
    source = project / "data" / "formats" / "feedback-to-label.jsonl"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [*COMMAND, "label", str(source), "--annotator", "ann", "--port", port]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
        page = browser.new_page(viewport={"width": 900, "height": 720}, color_scheme="light")
        page.goto(address)
        page.get_by_role("button", name="Begin").click()
        page.get_by_text("orders").first.wait_for()
        page.screenshot(path=path)
    finally:
        server.kill()
        server.wait()


def main(folder: Path, only: str = "") -> None:
    """Write the pictures, or the one of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, sync_playwright() as driver:
        work = Path(place)
        project = work / "my-reward"
        subprocess.run([*COMMAND, "init", str(project)], check=True, stdout=subprocess.DEVNULL)
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        if only in ("", "label"):
            label_page(browser, project, folder / "label.png")
        if only in ("", "report", "live"):
            screen = work / "live.html"
            screen.write_text(f"<meta charset=utf-8>{run_in_a_terminal(project, work)}", encoding="utf-8")
            picture(browser, screen.as_uri(), folder / "live.png", (1000, 400), whole=True)
            picture(browser, (work / "runs" / "first" / "report.html").as_uri(), folder / "report.png", (1000, 900))
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
