// A question to the endpoint: first why, by /v1/route, then the answers, one stream a method.

import * as api from "./api.js";
import { cards } from "./adapters.js";
import { Column } from "./answers.js";
import { reserve } from "./colours.js";
import { byId, empty, fault } from "./elements.js";
import { neighbours } from "./neighbours.js";
import * as settings from "./settings.js";
import { startTheme } from "./theme.js";
import { found, sliders } from "./weights.js";

const PATIENCE_MS = 200;
const byHand = byId("by-hand");
const chosen = new Map();
let tasks = [];
let routed = null;
let routing = new AbortController();
let answering = new AbortController();
let soon = 0;

const say = (text) => byId("status").replaceChildren(text);

// The latest call wins; those before it are called off.
async function explain() {
  routing.abort();
  routing = new AbortController();
  const { signal } = routing;
  const wish = settings.read();
  settings.toFragment();
  try {
    const answer = await api.route({ input: wish.question, ...retrieval(wish) }, signal);
    if (signal.aborted) return;
    routed = answer;
    byId("neighbours").replaceChildren(...neighbours(answer.neighbours));
    if (!byHand.checked) showWeights();
  } catch (error) {
    if (error.name === "AbortError" || signal.aborted) return;
    routed = null;
    byId("neighbours").replaceChildren(refused(error));
    if (!byHand.checked) showWeights();
  }
}

function showWeights() {
  if (byHand.checked) {
    const order = routed ? Object.keys(routed.shares) : [];
    const all = [...new Set([...order, ...tasks])];
    byId("weights").replaceChildren(...(all.length ? sliders(all, chosen) : [empty("No adapter is known yet.")]));
  } else if (routed) {
    const { shares } = routed;
    const none = empty("No adapter's rows are near this question: the base model answers.");
    byId("weights").replaceChildren(...(Object.keys(shares).length ? found(routed, settings.read().p) : [none]));
  } else {
    byId("weights").replaceChildren(empty("No question has been routed."));
  }
}

function retrieval({ weigher, p, neighbours: k }) {
  return weigher === "nucleus" ? { weigher, p, top_k: k } : { top_k: k };
}

function composition(wish) {
  if (!byHand.checked) return retrieval(wish);
  return { weights: Object.fromEntries([...chosen].filter(([, weight]) => weight > 0)) };
}

async function ask() {
  const wish = settings.read();
  if (!wish.question) {
    say("Type a question first.");
    byId("question").focus();
    return;
  }
  answering.abort();
  answering = new AbortController();
  const { signal } = answering;
  clearTimeout(soon);
  const explained = explain();
  const columns = wish.methods.map((method) => new Column(method));
  byId("answers").replaceChildren(...(columns.length ? columns.map((column) => column.node) : [empty("No method is chosen.")]));
  byId("stop").disabled = false;
  say("Answering");
  const whole = await Promise.all(columns.map((column) => column.run(wish, composition(wish), signal)));
  await explained;
  if (answering.signal !== signal) return;
  byId("stop").disabled = true;
  if (signal.aborted) say("Stopped");
  else say(whole.every(Boolean) ? "Done" : "Not every answer came");
}

function refused(error) {
  if (error.status === 401) byId("key-box").open = true;
  return fault(error.message);
}

async function showAdapters() {
  try {
    const adapters = await api.adapters();
    tasks = adapters.map((adapter) => adapter.task).sort();
    reserve(tasks);
    byId("adapters-count").textContent = adapters.length;
    byId("adapters").replaceChildren(...cards(adapters));
  } catch (error) {
    byId("adapters").replaceChildren(refused(error));
  }
}

function useKey() {
  api.key.set(byId("key").value.trim());
  showAdapters();
}

function listen() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      byId("form").requestSubmit();
    }
  });
  byId("stop").addEventListener("click", () => {
    answering.abort();
    routing.abort();
  });
  byId("examples").addEventListener("click", ({ target }) => {
    if (target.tagName !== "BUTTON") return;
    byId("question").value = target.textContent;
    byId("form").requestSubmit();
  });
  byId("methods").addEventListener("change", settings.bound);
  for (const id of ["weigher", "p", "k"]) {
    byId(id).addEventListener("input", () => {
      settings.bound();
      clearTimeout(soon);
      if (routed && byId(id).checkValidity()) soon = setTimeout(explain, PATIENCE_MS);
    });
  }
  byHand.addEventListener("change", () => {
    if (byHand.checked) {
      chosen.clear();
      for (const [task, weight] of Object.entries(routed?.weights ?? {})) chosen.set(task, Math.round(20 * weight) / 20);
    }
    showWeights();
  });
  byId("key").value = api.key.get();
  byId("key").addEventListener("change", useKey);
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    byId("key-box").open = false;
  });
  window.addEventListener("hashchange", open);
}

// A link shows why at once; the answers, which cost more, wait to be asked for.
function open() {
  if (settings.fromFragment() && settings.read().question) explain();
}

startTheme(byId("theme"));
listen();
await showAdapters();
open();
