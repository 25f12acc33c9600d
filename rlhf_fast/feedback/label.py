# SPDX-License-Identifier: Apache-2.0
"""`rlhf-fast label FILE`: a person ranks or rates completions in a local web page (gradio).

The page shows a prompt and its completions in random order, without the models' names. Model output is shown
as the value of a text field, so none of it becomes markup. `answer_file.py` writes the answers.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.data.examples import prompt_text
from rlhf_fast.errors import UserError

from .answer_file import AnswerFile

KEYS = "1-9 answer, arrows choose a completion, Enter saves, s skips, u undoes the last answer"


def main(arguments: Sequence[str]) -> int:
    """Parse the options of the subcommand and serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser("rlhf-fast label", description="Rank or rate completions in a local web page.")
    parser.add_argument("file", help="feedback file, rated or not (rlhf-fast collect writes one)")
    parser.add_argument("--output", help="file that answers are appended to (default FILE.labels.jsonl)")
    parser.add_argument("--rate", action="store_true", help="rate each completion 1 to 7 (default: rank them)")
    parser.add_argument("--annotator", default="", help="initial name; it can be changed on the page")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default 7860)")
    options = parser.parse_args(list(arguments))
    output = options.output or str(Path(options.file).with_suffix(".labels.jsonl"))
    answer_file = AnswerFile(options.file, output, rate=options.rate)
    print(f"answers go to {output}; the page is http://{options.host}:{options.port} (Ctrl-C ends it)", flush=True)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        build(answer_file, options.annotator).launch(
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


def build(answer_file: AnswerFile, annotator: str = "") -> Any:
    """The page as gr.Blocks. Each open page has its own annotator and position in the file."""
    import gradio as gr

    size = max(len(item.completions) for item in answer_file.items)
    scale = "1 (bad) to 7 (good)" if answer_file.rate else "rank, 1 is best, equal ranks are ties"
    with gr.Blocks(title="rlhf-fast label", analytics_enabled=False) as page:
        task = gr.State(None)
        name = gr.Textbox(annotator, label="Your name", elem_id="name", info="press Enter to begin, or to change it")
        status = gr.Markdown("", elem_id="said")
        prompt = gr.Textbox(label="Prompt", interactive=False, visible=False, elem_id="prompt", max_lines=30)
        texts, grades = [], []
        for k in range(size):
            label = f"Completion {chr(ord('A') + k)}"
            texts.append(gr.Textbox(label=label, interactive=False, visible=False, elem_classes="text", max_lines=30))
            choices = list(range(1, answer_file.best() + 1))
            grades.append(gr.Radio(choices, label=scale, visible=False, elem_classes="grade"))
        with gr.Row():
            save = gr.Button("Save", variant="primary", elem_id="save")
            skip = gr.Button("Skip", elem_id="skip")
            undo = gr.Button("Undo", elem_id="undo")
        gr.Markdown(f"Keys: {KEYS}")
        outputs = [task, status, prompt, *texts, *grades]

        def show(who: str, where: int | None = None, message: str = "") -> list[Any]:
            return _show(gr, answer_file, who.strip(), where, message, size)

        # Save under the annotator and item that are shown (`current`), even if the name field has changed since.
        def on_save(who: str, current: tuple[str, int] | None, *numbers: int | None) -> list[Any]:
            if current is not None:
                answers = numbers[: len(answer_file.items[current[1]].completions)]
                if any(number is None for number in answers):
                    return [gr.skip(), "Give each completion a number first.", *[gr.skip()] * (1 + 2 * size)]
                answer_file.answer(*current, [int(number) for number in answers if number is not None])
            return show(who)

        def on_skip(who: str, current: tuple[str, int] | None) -> list[Any]:
            if current is not None:
                answer_file.skip(*current)
            return show(who)

        def on_undo(who: str) -> list[Any]:
            return show(who, answer_file.undo(who.strip()), "Undone." if who.strip() else "")

        page.load(show, name, outputs)
        name.submit(show, name, outputs)
        save.click(on_save, [name, task, *grades], outputs)
        skip.click(on_skip, [name, task], outputs)
        undo.click(on_undo, name, outputs)
    return page


def _show(gr: Any, answer_file: AnswerFile, who: str, where: int | None, message: str, size: int) -> list[Any]:
    """New values of all the page's components, showing item `where` or else the annotator's next one."""
    if who and where is None:
        where = answer_file.next(who)
    if not who or where is None:
        done, total = answer_file.progress(who)
        status = f"Done: all {total} prompts. Thank you." if who else "Enter your name to begin."
        return [None, status, gr.update(visible=False), *[gr.update(visible=False)] * (2 * size)]
    done, total = answer_file.progress(who)
    item = answer_file.items[where]
    completions = [item.texts[k] for k in answer_file.order(who, where)]
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

# A digit answers the marked completion. Keys typed into a text field are left alone.
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
