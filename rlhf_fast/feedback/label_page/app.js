// SPDX-License-Identifier: Apache-2.0
// The label page. All text of models and people is set by textContent, so that none of it becomes markup.
"use strict";

const TASKS = {
  choose: {
    title: "Which answer is better?",
    what: "You will see a prompt and two answers, A and B, that a language model gave. Say which one is better, or that " +
      "they are equally good.",
  },
  rank: {
    title: "Put answers in order",
    what: "You will see a prompt and several answers that a language model gave. Give each a rank: 1 is the best, and " +
      "answers that are equally good get the same rank.",
  },
  rate: {
    title: "Rate answers",
    what: "You will see a prompt and several answers that a language model gave. Rate each from 1 (bad) to 7 (good).",
  },
};
const byId = id => document.getElementById(id);
const token = new URLSearchParams(location.hash.slice(1)).get("token") ?? "";
const letter = k => String.fromCharCode(65 + k);

let task = null;      // as the server sent it
let scales = [];      // what digits answer: {completion, criterion or null, value, best, buttons, element}
let current = 0;      // index of the scale that the next digit answers
let choice = null;    // of two: 0, 1 or "tie"
let busy = false;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function button(text, key, act, properties = {}) {
  const made = make("button", { type: "button", ...properties }, text);
  if (key) made.append(" ", make("kbd", {}, key));
  made.addEventListener("click", event => {
    if (event.detail > 1) return;  // a double click would answer the next prompt too
    if (event.detail) made.blur();  // a click leaves the keys to the page
    act();
  });
  return made;
}

function say(text) { byId("message").textContent = text; }

async function ask(path, body) {
  const options = { headers: { Authorization: `Bearer ${token}` } };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Nothing that was saved is lost: start rlhf-fast label again and open " +
      "its new address.");
  }
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

async function go(path, body, message = "") {
  if (busy) return;
  busy = true;
  try {
    task = await ask(path, body);
    show(message);
  } catch (error) {
    say(error.message);
  } finally {
    busy = false;
  }
}

const begin = name => go(`api/task?annotator=${encodeURIComponent(name)}`);
const skip = () => go("api/skip", { annotator: task.annotator, place: task.place }, "Skipped.");
const undo = () => go("api/undo", { annotator: task.annotator }, "Undone.");

function save() {
  const numbers = task.task === "choose"
    ? { 0: [1, 2], 1: [2, 1], tie: [1, 1] }[choice]
    : scales.filter(scale => scale.criterion === null).map(scale => scale.value);
  if (!numbers) return say("Choose the better one first.");
  if (numbers.includes(null)) return say("Give each completion a number first.");
  const criteria = {};
  for (const name of task.criteria) {
    const values = scales.filter(scale => scale.criterion === name).map(scale => scale.value);
    if (values.every(value => value === null)) continue;
    if (values.includes(null)) return say(`Rate all answers by "${name}", or none of them.`);
    criteria[name] = values;
  }
  go("api/answer", { annotator: task.annotator, place: task.place, numbers, criteria });
}

function choose(side) {
  choice = side;
  if (!task.criteria.length) return save();
  mark();
}

function setValue(scale, value) {
  scale.value = value;
  scale.buttons.forEach((one, i) => one.setAttribute("aria-pressed", String(i + 1 === value)));
  mark();
}

function mark() {
  scales.forEach((scale, i) => scale.element.classList.toggle("current", i === current));
  document.querySelectorAll(".card").forEach((card, k) => card.classList.toggle("chosen", choice === k));
  document.querySelectorAll("[data-side]").forEach(one =>
    one.setAttribute("aria-pressed", String(one.dataset.side === String(choice))));
}

function move(by) {
  current = Math.max(0, Math.min(scales.length - 1, current + by));
  mark();
  scales[current]?.element.scrollIntoView({ block: "nearest" });
}

function show(message = "") {
  const named = "done" in task;
  byId("top").hidden = byId("actions").hidden = !named;
  scales = []; current = 0; choice = null;
  byId("actions").replaceChildren();
  say(message);
  if (!named) return showStart();
  byId("progress").textContent = `${task.annotator}: ${task.done} of ${task.total} done`;
  byId("bar").value = task.done / task.total;
  showAgreement();
  if (task.place === null) showEnd(); else showTask();
  if (task.done) byId("actions").append(button("Undo the last", "u", undo, { id: "undo" }));
  byId("actions").append(button("Keys", "?", toggleKeys, { id: "keys" }));
  window.scrollTo(0, 0);
  byId("main").focus();
}

function showAgreement() {
  const found = task.agreement;
  byId("agreement").textContent = found
    ? `annotators agree on ${Math.round(100 * found.raw)} % of ${found.pairs} pairs` +
      (found.alpha === null ? "" : ` (alpha ${found.alpha.toFixed(2)})`)
    : "";
}

function showStart() {
  const name = make("input", { id: "name", value: task.annotator, autocomplete: "name", maxLength: 100, required: true });
  const form = make("form", {},
    make("label", {}, "Your name, which is saved with your answers", name),
    make("button", { className: "main", id: "begin" }, "Begin"));
  form.addEventListener("submit", event => { event.preventDefault(); begin(name.value); });
  const criteria = task.criteria.length
    ? ` You can also rate each by: ${task.criteria.join(", ")} (1 to ${task.best_rating}).` : "";
  byId("main").replaceChildren(make("div", { className: "start" },
    make("h1", {}, TASKS[task.task].title),
    make("p", {}, TASKS[task.task].what + criteria),
    make("p", {}, `There are ${task.total} prompts. Each answer is saved at once: stop whenever you like, come back ` +
      "under the same name, and undo what you did last. If you cannot decide, skip."),
    form));
  name.focus();
}

function showEnd() {
  byId("main").replaceChildren(make("div", { className: "start" },
    make("h1", {}, `Done: all ${task.total} prompts. Thank you.`),
    make("p", {}, "You can close this page.")));
}

function showTask() {
  const two = task.task === "choose";
  const prompt = make("section", { className: "prompt", id: "prompt", ariaLabel: "Prompt" }, make("h2", {}, "Prompt"));
  for (const { role, text } of task.prompt) {
    prompt.append(make("div", { className: "turn text" }, ...(role ? [make("b", {}, `${role}: `)] : []), text));
  }
  const cards = task.completions.map((text, k) => {
    const card = make("section", { className: "card", ariaLabel: `Answer ${letter(k)}` },
      make("h2", {}, `Answer ${letter(k)}`), make("div", { className: "text completion" }, text));
    if (!task.ended[k]) card.append(make("div", { className: "cut" }, "(cut off at the length limit)"));
    if (!two) card.append(makeScale(k, null, task.best));
    for (const name of task.criteria) card.append(makeScale(k, name, task.best_rating));
    return card;
  });
  byId("main").replaceChildren(prompt, make("div", { className: "cards" }, ...cards));
  const choices = [["A is better", "←", 0], ["Tie", "t", "tie"], ["B is better", "→", 1]];
  if (two) {
    byId("actions").append(make("div", { className: "choices" }, ...choices.map(([text, key, side]) => {
      const one = button(text, key, () => choose(side), { className: task.criteria.length ? "" : "main" });
      one.dataset.side = side;
      return one;
    })));
  }
  if (!two || task.criteria.length) byId("actions").append(button("Save", "Enter", save, { id: "save", className: "main" }));
  byId("actions").append(button("Skip", "s", skip, { id: "skip" }));
  mark();
}

function makeScale(completion, criterion, best) {
  const title = criterion ?? (task.task === "rank" ? "rank (1: best)" : "rating (7: good)");
  const scale = { completion, criterion, best, value: null, buttons: [] };
  scale.element = make("div", { className: "scale", role: "group", ariaLabel: `${title} of ${letter(completion)}` },
    make("b", {}, title));
  for (let number = 1; number <= best; number++) {
    const one = button(String(number), "", () => {
      current = scales.indexOf(scale);
      setValue(scale, scale.value === number ? null : number);
    }, { ariaPressed: "false" });
    scale.buttons.push(one);
    scale.element.append(one);
  }
  scales.push(scale);
  return scale.element;
}

function toggleKeys() {
  const open = byId("key-list");
  if (open) return open.remove();
  const rows = [
    ["1 to 9", "answer the marked scale and go to the next"], ["↑ ↓", "mark another scale"],
    ["Backspace", "clear the marked scale"], ["← t →", "of two answers: A is better, a tie, B is better"],
    ["Enter", "save"], ["s", "skip"], ["u", "undo the last answer or skip"], ["?", "show or hide this"],
  ];
  byId("main").append(make("table", { id: "key-list", className: "keys" }, make("tbody", {},
    ...rows.map(([key, what]) => make("tr", {}, make("td", {}, key), make("td", {}, what))))));
  byId("key-list").scrollIntoView({ block: "nearest" });
}

function pressed(event) {
  const key = event.key;
  const open = task && task.place !== undefined && task.place !== null;
  if (/^[1-9]$/.test(key) && open && scales[current]) {
    if (Number(key) > scales[current].best) say(`1 to ${scales[current].best}, please.`);
    else { setValue(scales[current], Number(key)); move(1); }
  } else if (key === "ArrowDown" && scales.length) move(1);
  else if (key === "ArrowUp" && scales.length) move(-1);
  else if (key === "Backspace" && open && scales[current]) setValue(scales[current], null);
  else if (key === "Enter" && open) save();
  else if (key === "s" && open) skip();
  else if (key === "u" && task.done) undo();
  else if (key === "?") toggleKeys();
  else if (open && task.task === "choose" && ["ArrowLeft", "ArrowRight", "t", "="].includes(key)) {
    choose(key === "ArrowLeft" ? 0 : key === "ArrowRight" ? 1 : "tie");
  } else return false;
  return true;
}

document.addEventListener("keydown", event => {
  const at = event.target;
  if (event.repeat && !["ArrowUp", "ArrowDown"].includes(event.key)) return;  // a held key answers one prompt
  if (event.ctrlKey || event.metaKey || event.altKey || !task || !("done" in task) || at.matches("input, textarea")) return;
  if (at.matches("button") && (event.key === "Enter" || event.key === " ")) return;  // presses that button
  if (pressed(event)) event.preventDefault();
});

go("api/task");
