// The adapters of the fleet, with their cards.

import { label, painted } from "./colours.js";
import { element, empty } from "./elements.js";

export function cards(adapters) {
  if (!adapters.length) return [empty("No adapters yet. Train some: lorafleet train")];
  return [element("ul", { class: "cards" }, ...adapters.map(card))];
}

function card(adapter) {
  const facts = [
    adapter.family && adapter.family,
    adapter.rank && `rank ${adapter.rank}`,
    adapter.alpha && `alpha ${adapter.alpha}`,
    adapter.rows != null && `${adapter.rows.toLocaleString("en")} rows`,
    adapter.origin,
    adapter.state && adapter.state !== "ready" && adapter.state,
  ].filter(Boolean);
  return painted(
    element(
      "li",
      {},
      element("h3", {}, label(adapter.task)),
      element("p", { class: "name" }, adapter.name),
      element("p", { class: "facts" }, ...facts.map((fact) => element("span", {}, String(fact)))),
      more(adapter),
    ),
    adapter.task,
  );
}

function more(adapter) {
  const known = { error: adapter.error, base: adapter.base, created: date(adapter.created), modules: adapter.modules, ...adapter.card };
  const said = ["name", "task", "family", "rows"];
  const rows = Object.entries(known)
    .filter(([name, value]) => value != null && !said.includes(name))
    .flatMap(([name, value]) => [element("dt", {}, name.replaceAll("_", " ")), element("dd", {}, plain(value))]);
  return rows.length ? element("details", {}, element("summary", {}, "Card"), element("dl", {}, ...rows)) : null;
}

function date(created) {
  if (created == null) return null;
  const time = new Date(typeof created === "number" ? 1000 * created : created);
  return Number.isNaN(time.getTime()) ? String(created) : time.toISOString().slice(0, 10);
}

function plain(value) {
  if (Array.isArray(value)) return value.map(plain).join(", ");
  if (typeof value === "object" && value !== null) {
    return Object.entries(value).map(([name, inner]) => `${name} ${plain(inner)}`).join(", ");
  }
  return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(4))) : String(value);
}
