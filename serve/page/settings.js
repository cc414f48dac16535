// The form, and the fragment of the address that holds it: a link repeats a question with all its settings.

import { byId } from "./elements.js";

export const MOST_METHODS = 6;
const FIELDS = { q: "question", w: "weigher", p: "p", k: "k", max: "max", t: "temperature", as: "format" };

const boxes = () => [...byId("methods").querySelectorAll("input")];

export function methods() {
  return boxes().filter((box) => box.checked).map((box) => box.value);
}

export function read() {
  return {
    question: byId("question").value.trim(),
    weigher: byId("weigher").value,
    p: Number(byId("p").value),
    neighbours: Number(byId("k").value),
    maxTokens: Number(byId("max").value),
    temperature: Number(byId("temperature").value),
    chat: byId("format").value === "chat",
    methods: methods(),
  };
}

// More columns than a browser has connections to one host would wait for each other.
export function bound() {
  const full = methods().length >= MOST_METHODS;
  for (const box of boxes()) box.disabled = full && !box.checked;
  byId("p").disabled = byId("weigher").value !== "nucleus";
  byId("p-value").value = Number(byId("p").value).toFixed(2);
}

export function toFragment() {
  const values = new URLSearchParams();
  for (const [name, id] of Object.entries(FIELDS)) values.set(name, byId(id).value);
  values.set("m", methods().join(","));
  history.replaceState(null, "", `#${values}`);
}

export function fromFragment() {
  const values = new URLSearchParams(location.hash.slice(1));
  for (const [name, id] of Object.entries(FIELDS)) {
    const field = byId(id);
    const before = field.value;
    if (values.has(name)) field.value = values.get(name);
    if (!field.checkValidity() || field.value === "") field.value = before;
  }
  if (values.has("m")) {
    const wanted = values.get("m").split(",").slice(0, MOST_METHODS);
    for (const box of boxes()) box.checked = wanted.includes(box.value);
  }
  bound();
  return values.has("q");
}
