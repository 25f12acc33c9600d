# SPDX-License-Identifier: Apache-2.0
"""`rlhf-fast label FILE`: a person ranks or rates completions in a local web page (gradio).

The page shows a prompt and its completions in random order, without the models' names. Whatever a model wrote is shown
as the value of a text field, so nothing of it becomes markup. `desk.py` keeps the answers.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.data.examples import prompt_text
from rlhf_fast.errors import UserError

from .answer_file import Desk

KEYS = "1-9 answer, arrows choose a completion, Enter saves, s skips, u takes the last answer back"


def main(arguments: Sequence[str]) -> int:
    """Parse the options of the subcommand and serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser("rlhf-fast label", description="Rank or rate completions in a local web page.")
    parser.add_argument("file", help="feedback file, rated or not (rlhf-fast collect writes one)")
    parser.add_argument("--output", help="file that answers are appended to (default FILE.labels.jsonl)")
    parser.add_argument("--rate", action="store_true", help="rate each completion 1 to 7 (default: rank them)")
    parser.add_argument("--annotator", default="", help="name to begin with; the page lets everyone change it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default 7860)")
    options = parser.parse_args(list(arguments))
    output = options.output or str(Path(options.file).with_suffix(".labels.jsonl"))
    desk = Desk(options.file, output, rate=options.rate)
    print(f"answers go to {output}; the page is http://{options.host}:{options.port} (Ctrl-C ends it)", flush=True)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        build(desk, options.annotator).launch(
            server_name=options.host,
            server_port=options.port,
            share=False,
            quiet=True,
            footer_links=[],
            run_history=False,
            head=f"<script>{SCRIPT}</script>",
            css=STYLE,
        )
    except OSError as error:
        raise UserError(f"cannot serve the page: {error}") from None
    return 0


def build(desk: Desk, annotator: str = "") -> Any:
    """The page as gr.Blocks. Each open page has its own annotator and its own place in the file."""
    import gradio as gr

    size = max(len(item.completions) for item in desk.items)
    ask = "1 (bad) to 7 (good)" if desk.rate else "rank, 1 is best, equal ranks are ties"
    with gr.Blocks(title="rlhf-fast label", analytics_enabled=False) as page:
        task = gr.State(None)
        name = gr.Textbox(annotator, label="Your name", elem_id="name", info="press Enter to begin, or to change it")
        said = gr.Markdown("", elem_id="said")
        prompt = gr.Textbox(label="Prompt", interactive=False, visible=False, elem_id="prompt", max_lines=30)
        texts, grades = [], []
        for k in range(size):
            label = f"Completion {chr(ord('A') + k)}"
            texts.append(gr.Textbox(label=label, interactive=False, visible=False, elem_classes="text", max_lines=30))
            choices = list(range(1, desk.best() + 1))
            grades.append(gr.Radio(choices, label=ask, visible=False, elem_classes="grade"))
        with gr.Row():
            save = gr.Button("Save", variant="primary", elem_id="save")
            skip = gr.Button("Skip", elem_id="skip")
            undo = gr.Button("Undo", elem_id="undo")
        gr.Markdown(f"Keys: {KEYS}")
        shown = [task, said, prompt, *texts, *grades]

        def show(who: str, where: int | None = None, message: str = "") -> list[Any]:
            return _show(gr, desk, who.strip(), where, message, size)

        # The task, (annotator, item), says whose completions are shown in which order, whatever is in the name's field.
        def on_save(who: str, asked: tuple[str, int] | None, *numbers: int | None) -> list[Any]:
            if asked is not None:
                given = numbers[: len(desk.items[asked[1]].completions)]
                if any(number is None for number in given):
                    return [gr.skip(), "Give each completion a number first.", *[gr.skip()] * (1 + 2 * size)]
                desk.answer(*asked, [int(number) for number in given if number is not None])
            return show(who)

        def on_skip(who: str, asked: tuple[str, int] | None) -> list[Any]:
            if asked is not None:
                desk.skip(*asked)
            return show(who)

        def on_undo(who: str) -> list[Any]:
            return show(who, desk.undo(who.strip()), "Taken back." if who.strip() else "")

        page.load(show, name, shown)
        name.submit(show, name, shown)
        save.click(on_save, [name, task, *grades], shown)
        skip.click(on_skip, [name, task], shown)
        undo.click(on_undo, name, shown)
    return page


def _show(gr: Any, desk: Desk, who: str, where: int | None, message: str, size: int) -> list[Any]:
    """New values of all parts of the page: item `where`, or the annotator's next one."""
    if who and where is None:
        where = desk.next(who)
    if not who or where is None:
        done, total = desk.progress(who)
        said = f"Done: all {total} prompts. Thank you." if who else "Enter your name to begin."
        return [None, said, gr.update(visible=False), *[gr.update(visible=False)] * (2 * size)]
    done, total = desk.progress(who)
    item = desk.items[where]
    completions = [item.texts[k] for k in desk.order(who, where)]
    hidden = [gr.update(visible=False, value=None)] * (size - len(completions))
    return [
        (who, where),
        f"{message} {done} of {total} done.".strip(),
        gr.update(value=prompt_text(item.prompt), visible=True),
        *[gr.update(value=text.strip(), visible=True) for text in completions],
        *hidden,
        *[gr.update(value=None, visible=True) for _ in completions],
        *hidden,
    ]


STYLE = """
footer {display: none !important}
.grade {margin-bottom: 1rem}
textarea:disabled {opacity: 1; -webkit-text-fill-color: var(--body-text-color)}
"""

# The marked completion takes the next digit. Keys typed into a text field belong to it.
SCRIPT = """
let current = 0;
const groups = () => [...document.querySelectorAll('.grade')].filter(group => group.offsetParent);
function mark() {
  groups().forEach((group, i) => { group.style.outline = i === current ? '2px solid #3b82f6' : ''; });
}
function press(id) {
  current = 0;
  document.getElementById(id).click();
}
document.addEventListener('keydown', event => {
  const typing = event.target.matches('input[type=text], textarea:not([disabled])');
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const all = groups();
  if (/^[1-9]$/.test(event.key) && all[current]) {
    const choice = all[current].querySelectorAll('input[type=radio]')[event.key - 1];
    if (choice) {
      choice.click();
      current = Math.min(current + 1, all.length - 1);
    }
  } else if (event.key === 'ArrowDown') current = Math.min(current + 1, all.length - 1);
  else if (event.key === 'ArrowUp') current = Math.max(current - 1, 0);
  else if (event.key === 'Enter') press('save');
  else if (event.key === 's') press('skip');
  else if (event.key === 'u') press('undo');
  else return;
  event.preventDefault();
  mark();
});
setInterval(mark, 200);
"""
