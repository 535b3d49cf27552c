// The page: what can be asked, asking it of several tasks at once, and stopping.

import { ask, keep } from "./api.js";
import { Column } from "./column.js";

const MOST = 6; // a browser opens no more connections to one server
const MANY = 12; // tasks from which on there is a field to find one
const byId = (id) => document.getElementById(id);

let models = [];
let chosen = null; // names; null until the first list has come
let running = null; // what stops the answers
let drawing = null; // what stops the heat maps

// ---------------------------------------------------------------- tasks

async function readModels() {
  try {
    models = (await ask("v1/models")).data;
  } catch (error) {
    if (error.status === 401) askForKey();
    say(error.message, true);
    return false;
  }
  byId("key-form").hidden = true;
  const base = models.find((model) => model.parent === null);
  const tasks = models.length - 1;
  byId("base").textContent = `${base.id} · ${tasks === 1 ? "one task" : `${tasks} tasks`}`;
  chosen ??= new Set([...models.filter((m) => m !== base).slice(0, 2), base].map((m) => m.id));
  chosen = new Set(models.map((m) => m.id).filter((id) => chosen.has(id)));
  showTasks();
  return true;
}

function showTasks() {
  const focused = document.activeElement?.dataset.model;
  byId("tasks").replaceChildren(...models.map((model) => {
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: chosen.has(model.id) });
    box.dataset.model = model.id;
    box.onchange = () => {
      if (box.checked) chosen.add(model.id);
      else chosen.delete(model.id);
      limit();
    };
    const name = document.createElement("span");
    name.textContent = model.id;
    label.append(box, name);
    label.classList.toggle("of-base", model.parent === null);
    if (focused === model.id) queueMicrotask(() => box.focus());
    return label;
  }));
  byId("filter").hidden = models.length <= MANY;
  filter();
  limit();
}

/** No more than may run at once. */
function limit() {
  const full = chosen.size >= MOST;
  for (const box of byId("tasks").querySelectorAll("input")) box.disabled = full && !box.checked;
  byId("tasks-hint").textContent = full ? "Six at once is the most: take one out to add another." : "Up to six at once.";
}

function filter() {
  const wanted = byId("filter").hidden ? "" : byId("filter").value.toLowerCase();
  for (const label of byId("tasks").children) {
    const box = label.querySelector("input");
    label.hidden = !box.checked && !box.dataset.model.toLowerCase().includes(wanted);
  }
}

function askForKey() {
  byId("key-form").hidden = false;
  byId("key").focus();
}

// ---------------------------------------------------------------- answers

async function write() {
  if (running) return;
  if (!models.length && !(await readModels())) return;
  const shown = models.filter((model) => chosen.has(model.id));
  if (!shown.length) {
    say("Choose at least one task, or the base model.", true);
    byId("tasks").querySelector("input")?.focus();
    return;
  }
  drawing?.abort();
  [running, drawing] = [new AbortController(), new AbortController()];
  busy(true);
  say(`Writing ${shown.length} ${shown.length === 1 ? "answer" : "answers"}…`);
  const columns = shown.map((model) => new Column(model));
  byId("answers").replaceChildren(...columns.map((column) => column.element));
  const asked = request();
  const problems = await Promise.all(columns.map((column) => column.run(asked, running.signal, drawing.signal)));
  const stopped = running.signal.aborted;
  running = null;
  busy(false);
  await settle(problems.filter(Boolean), shown.length, stopped);
}

/** Say how it ended, and do what can be done about it. */
async function settle(problems, count, stopped) {
  const denied = problems.find((problem) => problem.status === 401);
  if (problems.some((problem) => problem.status === 404)) await readModels();
  if (denied) {
    askForKey();
    say(denied.message, true);
  } else if (problems.length) {
    const all = problems.length === count;
    say(all && new Set(problems.map((p) => p.message)).size === 1 ? problems[0].message
      : `${problems.length} of ${count} answers failed; each says why.`, true);
  } else {
    say(stopped ? "Stopped." : "Done.");
  }
}

function request() {
  const seed = byId("seed").value;
  return {
    kind: new FormData(byId("form")).get("kind"),
    prompt: byId("prompt").value,
    strength: Number(byId("strength-exact").value),
    max_tokens: Number(byId("max-tokens").value),
    temperature: Number(byId("temperature").value),
    ...(seed === "" ? {} : { seed: Number(seed) }),
  };
}

function stop() {
  running?.abort();
}

function busy(yes) {
  // The focus goes along, so that it isn't lost on a button that is off.
  const [from, to] = yes ? [byId("go"), byId("stop")] : [byId("stop"), byId("go")];
  const follows = document.activeElement === from;
  byId("stop").disabled = !yes;
  byId("go").disabled = yes;
  if (follows) to.focus();
}

function say(text, wrong = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("wrong", wrong);
}

// ---------------------------------------------------------------- what people do

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  keep(byId("key").value.trim());
  byId("key").value = "";
  if (await readModels()) {
    say("The key is accepted.");
    byId("prompt").focus();
  }
});
byId("stop").addEventListener("click", stop);
byId("filter").addEventListener("input", filter);
byId("filter").addEventListener("keydown", (event) => {
  if (event.key === "Enter") event.preventDefault(); // it finds as one types
});
byId("strength").addEventListener("input", () => { byId("strength-exact").value = byId("strength").value; });
byId("strength-exact").addEventListener("input", () => { byId("strength").value = byId("strength-exact").value; });
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running && !event.target.closest?.("#key-form")) {
    event.preventDefault();
    byId("form").requestSubmit();
  } else if (event.key === "Escape" && running) {
    event.preventDefault();
    stop();
  }
});
document.addEventListener("visibilitychange", () => { // tasks come and go while one looks elsewhere
  if (!document.hidden && !running && models.length) readModels();
});

byId("prompt").focus();
readModels();
